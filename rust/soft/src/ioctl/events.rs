//! Events under way: KVM_GET/SET_VCPU_EVENTS, MP_STATE, KVM_INTERRUPT, KVM_NMI.

use super::{get, put, Answer};
use crate::board::Local;
use crate::cpu::{vector, Cpu, Fault};
use kvm_bindings::*;

const FLAGS: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING
    | KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | KVM_VCPUEVENT_VALID_SHADOW
    | KVM_VCPUEVENT_VALID_SMM
    | KVM_VCPUEVENT_VALID_PAYLOAD
    | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;

/// KVM_GET_VCPU_EVENTS.
pub(crate) fn get_events(cpu: &mut Cpu, local: &Local, arg: &mut [u8]) -> Answer {
    let flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
    let mut events = kvm_vcpu_events { flags, ..Default::default() };
    if let Some(fault) = cpu.pending.exception {
        events.exception.injected = 1;
        events.exception.nr = fault.vector;
        events.exception.has_error_code = fault.error.is_some() as u8;
        events.exception.error_code = fault.error.unwrap_or(0);
        if fault.vector == vector::PF {
            // An injected #PF has its address in CR2 already; that is where it is saved.
            cpu.cr2 = fault.payload;
        }
    }
    if let Some((vector, software)) = cpu.pending.interrupt {
        (events.interrupt.injected, events.interrupt.nr, events.interrupt.soft) = (1, vector, software as u8);
    }
    events.interrupt.shadow = if cpu.shadow != 0 { KVM_X86_SHADOW_INT_STI as u8 } else { 0 };
    events.nmi.injected = (cpu.pending.nmi && !cpu.nmi_blocked) as u8;
    events.nmi.pending = local.nmis() + (cpu.pending.nmi && cpu.nmi_blocked) as u8;
    events.nmi.masked = cpu.nmi_blocked as u8;
    events.smi.latched_init = local.init_pending() as u8;
    put(arg, &events)
}

/// KVM_SET_VCPU_EVENTS.
pub(crate) fn set_events(cpu: &mut Cpu, local: &Local, arg: &[u8]) -> Answer {
    let events: kvm_vcpu_events = get(arg)?;
    let exception = &events.exception;
    let impossible = exception.nr > 31 || exception.nr == vector::NMI;
    if events.flags & !FLAGS != 0 || exception.injected != 0 && impossible {
        return Err(libc::EINVAL);
    }
    let smi = &events.smi;
    if events.flags & KVM_VCPUEVENT_VALID_SMM != 0 && (smi.smm | smi.pending | smi.smm_inside_nmi) != 0 {
        return Err(libc::EINVAL);
    }
    let pending = exception.injected != 0 || events.flags & KVM_VCPUEVENT_VALID_PAYLOAD != 0 && exception.pending != 0;
    if pending && impossible {
        return Err(libc::EINVAL);
    }
    cpu.pending.exception = pending.then(|| Fault {
        vector: exception.nr,
        error: (exception.has_error_code != 0).then_some(exception.error_code),
        payload: if events.exception_has_payload != 0 {
            events.exception_payload
        } else {
            implied_payload(cpu, exception.nr)
        },
    });
    let interrupt = &events.interrupt;
    cpu.pending.interrupt = (interrupt.injected != 0).then_some((interrupt.nr, interrupt.soft != 0));
    if events.flags & KVM_VCPUEVENT_VALID_SHADOW != 0 {
        cpu.shadow = (interrupt.shadow != 0) as u8;
    }
    cpu.pending.nmi = events.nmi.injected != 0;
    cpu.nmi_blocked = events.nmi.masked != 0;
    if events.flags & KVM_VCPUEVENT_VALID_NMI_PENDING != 0 {
        local.set_nmis(events.nmi.pending);
    }
    if events.flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR != 0 {
        local.set_sipi(events.sipi_vector as u8);
    }
    if events.flags & KVM_VCPUEVENT_VALID_SMM != 0 && smi.latched_init != 0 {
        local.set_init();
    }
    Ok(0)
}

/// What a restored exception's payload is when user space does not say.
fn implied_payload(cpu: &Cpu, nr: u8) -> u64 {
    if nr == vector::PF {
        cpu.cr2
    } else {
        0
    }
}

/// KVM_GET_MP_STATE.
pub(crate) fn get_mp_state(cpu: &Cpu, local: &Local, arg: &mut [u8]) -> Answer {
    let mp_state = if cpu.wait_sipi {
        if local.was_initialised() {
            KVM_MP_STATE_INIT_RECEIVED
        } else {
            KVM_MP_STATE_UNINITIALIZED
        }
    } else if cpu.halted {
        KVM_MP_STATE_HALTED
    } else {
        KVM_MP_STATE_RUNNABLE
    };
    put(arg, &kvm_mp_state { mp_state })
}

/// KVM_SET_MP_STATE.
pub(crate) fn set_mp_state(cpu: &mut Cpu, local: &Local, arg: &[u8]) -> Answer {
    let state = get::<kvm_mp_state>(arg)?.mp_state;
    if local.lapic().is_none() && state != KVM_MP_STATE_RUNNABLE || state > KVM_MP_STATE_SIPI_RECEIVED {
        return Err(libc::EINVAL);
    }
    cpu.halted = state == KVM_MP_STATE_HALTED;
    cpu.wait_sipi =
        matches!(state, KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED);
    local.set_initialised(state != KVM_MP_STATE_UNINITIALIZED);
    if state == KVM_MP_STATE_SIPI_RECEIVED {
        local.raise_sipi();
    }
    Ok(0)
}

/// KVM_INTERRUPT: without an in-engine irqchip only.
pub(crate) fn interrupt(cpu: &mut Cpu, local: &Local, arg: &[u8]) -> Answer {
    let vector = get::<kvm_interrupt>(arg)?.irq;
    let vector = u8::try_from(vector).map_err(|_| libc::EINVAL)?;
    if local.lapic().is_some() {
        return Err(libc::ENXIO);
    }
    if cpu.pending.interrupt.is_some() {
        return Err(libc::EEXIST);
    }
    cpu.pending.interrupt = Some((vector, false));
    Ok(0)
}

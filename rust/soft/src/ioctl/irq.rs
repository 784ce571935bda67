//! Interrupt hardware of a VM: creation, lines, MSIs, routing, state.

use super::{get, get_at, put, Answer};
use crate::clock::lock;
use crate::irqchip::{IrqChip, IrqError};
use crate::vm::Machine;
use kvm_bindings::*;
use std::sync::Arc;

fn errno(error: IrqError) -> i32 {
    error.errno()
}

impl Machine {
    fn chip(&self, absent: i32) -> Answer<&Arc<IrqChip>> {
        self.irqchip().ok_or(absent)
    }

    /// KVM_CREATE_IRQCHIP: before the first vCPU.
    pub(crate) fn create_irqchip(&self) -> Answer {
        let setup = lock(&self.setup);
        if self.irqchip().is_some() {
            return Err(libc::EEXIST);
        }
        if self.peers.len() != 0 {
            return Err(libc::EINVAL);
        }
        let chip = IrqChip::new(self.peers.clone()).map_err(|error| error.raw_os_error().unwrap_or(libc::ENOMEM))?;
        let stored = self.keep_irqchip(chip);
        drop(setup);
        if stored {
            Ok(0)
        } else {
            Err(libc::EEXIST)
        }
    }

    /// KVM_CREATE_PIT2.
    pub(crate) fn create_pit(&self, arg: &[u8]) -> Answer {
        let config: kvm_pit_config = get(arg)?;
        self.chip(libc::ENOENT)?.create_pit(config.flags).map_err(errno)?;
        Ok(0)
    }

    /// KVM_IRQ_LINE and, with the status going back, KVM_IRQ_LINE_STATUS.
    pub(crate) fn irq_line(&self, arg: &mut [u8], with_status: bool) -> Answer {
        let mut line: kvm_irq_level = get(arg)?;
        // SAFETY: the union's members are 32-bit numbers.
        let gsi = unsafe { line.__bindgen_anon_1.irq };
        let status = self.chip(libc::ENXIO)?.set_irq(gsi, line.level != 0);
        if with_status {
            line.__bindgen_anon_1.status = status;
            put(arg, &line)?;
        }
        Ok(0)
    }

    /// KVM_SIGNAL_MSI: more than 0 when it was delivered.
    pub(crate) fn signal_msi(&self, arg: &[u8]) -> Answer {
        let msi: kvm_msi = get(arg)?;
        if msi.flags != 0 {
            return Err(libc::EINVAL);
        }
        let address = (msi.address_hi as u64) << 32 | msi.address_lo as u64;
        let delivered = self.chip(libc::EINVAL)?.signal_msi(address, msi.data);
        // KVM tells "no such APIC" apart only without its map of APIC IDs.
        Ok(delivered.max(0) as i64)
    }

    /// KVM_SET_GSI_ROUTING.
    pub(crate) fn set_gsi_routing(&self, arg: &[u8]) -> Answer {
        let chip = self.chip(libc::EINVAL)?;
        let (count, flags): (u32, u32) = (get_at(arg, 0)?, get_at(arg, 4)?);
        if flags != 0 || count > IrqChip::max_gsis() {
            return Err(libc::EINVAL);
        }
        let step = size_of::<kvm_irq_routing_entry>();
        let entries: Answer<Vec<kvm_irq_routing_entry>> =
            (0..count as usize).map(|index| get_at(arg, 8 + step * index)).collect();
        chip.set_routing(&entries?).map_err(errno)?;
        Ok(0)
    }

    /// KVM_IRQFD.
    pub(crate) fn irqfd(&self, arg: &[u8]) -> Answer {
        let request: kvm_irqfd = get(arg)?;
        if request.flags & !(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE) != 0 {
            return Err(libc::EINVAL);
        }
        self.chip(libc::EAGAIN)?.irqfd(&request).map_err(errno)?;
        Ok(0)
    }

    /// KVM_GET_IRQCHIP.
    pub(crate) fn get_irqchip(&self, arg: &mut [u8]) -> Answer {
        let mut chip: kvm_irqchip = get(arg)?;
        self.chip(libc::ENXIO)?.state(&mut chip).map_err(errno)?;
        put(arg, &chip)
    }

    /// KVM_SET_IRQCHIP.
    pub(crate) fn set_irqchip(&self, arg: &[u8]) -> Answer {
        let chip: kvm_irqchip = get(arg)?;
        self.chip(libc::ENXIO)?.set_state(&chip).map_err(errno)?;
        Ok(0)
    }

    /// KVM_GET_PIT2.
    pub(crate) fn get_pit(&self, arg: &mut [u8]) -> Answer {
        let state = self.chip(libc::ENXIO)?.pit_state().map_err(errno)?;
        put(arg, &state)
    }

    /// KVM_SET_PIT2.
    pub(crate) fn set_pit(&self, arg: &[u8]) -> Answer {
        let state: kvm_pit_state2 = get(arg)?;
        self.chip(libc::ENXIO)?.set_pit_state(&state).map_err(errno)?;
        Ok(0)
    }

    /// KVM_REINJECT_CONTROL.
    pub(crate) fn reinject_control(&self, arg: &[u8]) -> Answer {
        // `struct kvm_reinject_control`: the flag, then reserved bytes.
        let reinject = *arg.first().ok_or(libc::EFAULT)? != 0;
        self.chip(libc::ENXIO)?.set_pit_reinject(reinject).map_err(errno)?;
        Ok(0)
    }
}

//! What a guest's kernel asks by VMCALL or VMMCALL (Documentation/virt/kvm/x86/hypercalls.rst).
//!
//! As in KVM, a call is served whether CPUID told of it or not; nobody switched the other behaviour on
//! (KVM_CAP_ENFORCE_PV_FEATURE_CPUID). Privilege and the widths of arguments are the caller's business.
//! Left out: KVM_HC_MAP_GPA_RANGE, of confidential guests.

use crate::board::Local;
use crate::clock::Pairing;
use crate::cpu::exec::system::HC_SEND_IPI as SEND_IPI;
use std::sync::atomic::Ordering::*;

const VAPIC_POLL_IRQ: u64 = 1;
const KICK_CPU: u64 = 5;
const CLOCK_PAIRING: u64 = 9;
const SCHED_YIELD: u64 = 11;
/// KVM_CLOCK_PAIRING_WALLCLOCK: the only clock there is.
const WALL_CLOCK: u64 = 0;

/// Errors are KVM's own numbers (include/uapi/linux/kvm_para.h), most of them errno's.
const ENOSYS: u64 = 1000u64.wrapping_neg();
const EINVAL: u64 = (libc::EINVAL as u64).wrapping_neg();
const EFAULT: u64 = (libc::EFAULT as u64).wrapping_neg();
const EOPNOTSUPP: u64 = (libc::EOPNOTSUPP as u64).wrapping_neg();

/// What the caller finds in RAX.
pub(crate) fn call(vcpu: &Local, nr: u64, args: [u64; 4]) -> u64 {
    match nr {
        VAPIC_POLL_IRQ => 0,
        KICK_CPU => kick(vcpu, args[1]),
        CLOCK_PAIRING => pair_clocks(vcpu, args[0], args[1]),
        SEND_IPI => send_ipi(vcpu, args),
        SCHED_YIELD => yield_to(vcpu, args[0]),
        _ => ENOSYS,
    }
}

/// Ends the halt of the vCPU with that APIC ID; where there is none, nobody's. An ID is 32 bits wide.
fn kick(vcpu: &Local, apic_id: u64) -> u64 {
    vcpu.machine.peers.with(apic_id as u32, |peer| {
        peer.unhalted.store(true, SeqCst);
        peer.look_up();
    });
    0
}

/// Writes the host's wall-clock time and what the caller's TSC read then.
fn pair_clocks(vcpu: &Local, gpa: u64, clock: u64) -> u64 {
    // Two engines that run the same guest write memory of their own, and nobody would write it in both.
    if clock != WALL_CLOCK || vcpu.steal.frozen.load(Relaxed) {
        return EOPNOTSUPP;
    }
    let pairing = Pairing::now(&vcpu.peer.tsc);
    if vcpu.machine.slots().write(gpa, &pairing.bytes()) {
        0
    } else {
        EFAULT
    }
}

/// An interrupt to every APIC ID in a bitmap; how many were reached.
fn send_ipi(vcpu: &Local, [low, high, min, icr]: [u64; 4]) -> u64 {
    let Some(chip) = vcpu.machine.irqchip() else { return ENOSYS };
    chip.send_pv_ipi([low, high], 64, min as u32, icr as u32).unwrap_or(EINVAL)
}

/// The caller waits for another vCPU: its thread lets others of the host run. Which, the host's kernel decides, for
/// user space cannot name one.
fn yield_to(vcpu: &Local, apic_id: u64) -> u64 {
    let other = vcpu.machine.peers.with(apic_id as u32, |peer| peer.id != vcpu.peer.id && peer.is_inside());
    if other == Some(true) {
        std::thread::yield_now();
    }
    0
}

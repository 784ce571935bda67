//! General registers, debug registers, guest debugging, address translation.

use super::{get, put, Answer};
use crate::cpu::state::{cr0, rflags};
use crate::cpu::walk::Access;
use crate::cpu::{vector, Cpu, Fault};
use kvm_bindings::*;

/// Bits of KVM_SET_GUEST_DEBUG that x86 has.
const DEBUG_FLAGS: u32 = KVM_GUESTDBG_ENABLE
    | KVM_GUESTDBG_SINGLESTEP
    | KVM_GUESTDBG_USE_SW_BP
    | KVM_GUESTDBG_USE_HW_BP
    | KVM_GUESTDBG_INJECT_DB
    | KVM_GUESTDBG_INJECT_BP
    | KVM_GUESTDBG_BLOCKIRQ;

/// KVM_GET_REGS.
pub(crate) fn get_regs(cpu: &Cpu, arg: &mut [u8]) -> Answer {
    let r = &cpu.regs;
    let regs = kvm_regs {
        rax: r[0],
        rcx: r[1],
        rdx: r[2],
        rbx: r[3],
        rsp: r[4],
        rbp: r[5],
        rsi: r[6],
        rdi: r[7],
        r8: r[8],
        r9: r[9],
        r10: r[10],
        r11: r[11],
        r12: r[12],
        r13: r[13],
        r14: r[14],
        r15: r[15],
        rip: cpu.rip,
        rflags: cpu.rflags(),
    };
    put(arg, &regs)
}

/// KVM_SET_REGS. A pending exception goes, as with KVM; so does an access that user space had not
/// yet completed.
pub(crate) fn set_regs(cpu: &mut Cpu, arg: &[u8]) -> Answer {
    let regs: kvm_regs = get(arg)?;
    cpu.regs[..16].copy_from_slice(&[
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9, regs.r10,
        regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ]);
    cpu.rip = regs.rip;
    cpu.set_rflags(regs.rflags);
    cpu.pending.exception = None;
    cpu.io.retire();
    update_cpl(cpu);
    Ok(0)
}

/// CPL is SS's DPL in protected mode, 3 in virtual-8086 mode, 0 in real mode.
pub(crate) fn update_cpl(cpu: &mut Cpu) {
    cpu.cpl = if cpu.cr0 & cr0::PE == 0 {
        0
    } else if cpu.sys_flags as u64 & rflags::VM != 0 {
        3
    } else {
        cpu.segs[crate::cpu::state::seg::SS].dpl & 3
    };
    cpu.update_modes();
}

/// KVM_GET_DEBUGREGS.
pub(crate) fn get_debugregs(cpu: &Cpu, arg: &mut [u8]) -> Answer {
    let mut regs = kvm_debugregs { dr6: cpu.dr[6], dr7: cpu.dr[7], ..Default::default() };
    regs.db.copy_from_slice(&cpu.dr[..4]);
    put(arg, &regs)
}

/// KVM_SET_DEBUGREGS.
pub(crate) fn set_debugregs(cpu: &mut Cpu, arg: &[u8]) -> Answer {
    let regs: kvm_debugregs = get(arg)?;
    let wide = |value: u64| value > u32::MAX as u64;
    if regs.flags != 0 || wide(regs.dr6) || wide(regs.dr7) {
        return Err(libc::EINVAL);
    }
    cpu.dr[..4].copy_from_slice(&regs.db);
    cpu.dr[6] = regs.dr6 & 0xe00f | 0xffff_0ff0;
    cpu.dr[7] = regs.dr7 & 0xffff_2bff | 0x400;
    cpu.breakpoints_changed();
    Ok(0)
}

/// KVM_SET_GUEST_DEBUG.
pub(crate) fn set_guest_debug(cpu: &mut Cpu, arg: &[u8]) -> Answer {
    let debug: kvm_guest_debug = get(arg)?;
    if debug.control & !DEBUG_FLAGS != 0 {
        return Err(libc::EINVAL);
    }
    let inject = debug.control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP);
    if inject != 0 {
        if cpu.pending.exception.is_some() {
            return Err(libc::EBUSY);
        }
        let db = inject & KVM_GUESTDBG_INJECT_DB != 0;
        let vector = if db { vector::DB } else { vector::BP };
        cpu.pending.exception = Some(Fault { vector, error: None, payload: 0 });
    }
    let on = debug.control & KVM_GUESTDBG_ENABLE != 0;
    cpu.guest_debug = if on { debug.control & !(KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP) } else { 0 };
    let hardware = on && debug.control & KVM_GUESTDBG_USE_HW_BP != 0;
    cpu.guest_debug_dr = if hardware { debug.arch.debugreg } else { [0; 8] };
    cpu.breakpoints_changed();
    Ok(0)
}

/// KVM_TRANSLATE: a supervisor's read, nothing changed.
pub(crate) fn translate(cpu: &mut Cpu, arg: &mut [u8]) -> Answer {
    let mut translation: kvm_translation = get(arg)?;
    match cpu.try_walk(translation.linear_address, Access::default(), false) {
        Ok(page) => {
            translation.physical_address = page.gpa;
            (translation.valid, translation.writeable, translation.usermode) = (1, 1, 0);
        }
        Err(_) => {
            translation.physical_address = u64::MAX;
            (translation.valid, translation.writeable, translation.usermode) = (0, 1, 0);
        }
    }
    put(arg, &translation)
}

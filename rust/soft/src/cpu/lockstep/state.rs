//! What makes two processors the same: all that a guest could see of them, but for memory.

use crate::cpu::Cpu;

macro_rules! compared {
    ($one:expr, $other:expr, $differences:expr, $($field:ident),*) => {
        $(if $one.$field != $other.$field {
            $differences.push(format!(
                "{}: {:x?}, {:x?}", stringify!($field), $one.$field, $other.$field
            ));
        })*
    };
}

/// The parts that differ: name, `one`'s value, `other`'s.
pub(super) fn differences(one: &Cpu, other: &Cpu) -> Vec<String> {
    let mut found = Vec::new();
    for register in 0..16 {
        let (a, b) = (one.regs[register], other.regs[register]);
        if a != b {
            found.push(format!("register {register}: {a:x}, {b:x}"));
        }
    }
    if one.rflags() != other.rflags() {
        found.push(format!("rflags: {:x}, {:x}", one.rflags(), other.rflags()));
    }
    compared!(one, other, found, rip, retired, cpl, code_size, segs, ldtr, tr, gdtr, idtr);
    compared!(one, other, found, cr0, cr2, cr3, cr4, efer, xcr0, pkru, dr, msr, nmi_blocked, halted, pending);
    if one.fp.bytes() != other.fp.bytes() {
        let at = one.fp.bytes().iter().zip(other.fp.bytes()).position(|(a, b)| a != b).unwrap_or(0);
        let (a, b) = (&one.fp.bytes()[at & !15..][..16], &other.fp.bytes()[at & !15..][..16]);
        found.push(format!("extended state at {:#x}: {a:02x?}, {b:02x?}", at & !15));
    }
    found
}

/// Makes `to` what `from` is.
pub(super) fn copy(from: &Cpu, to: &mut Cpu) {
    to.regs = from.regs;
    to.flags = from.flags;
    to.sys_flags = from.sys_flags;
    to.rip = from.rip;
    to.retired = from.retired;
    to.cpl = from.cpl;
    to.shadow = from.shadow;
    to.nmi_blocked = from.nmi_blocked;
    (to.segs, to.ldtr, to.tr) = (from.segs, from.ldtr, from.tr);
    (to.gdtr, to.idtr) = (from.gdtr, from.idtr);
    (to.cr0, to.cr2, to.cr3, to.cr4) = (from.cr0, from.cr2, from.cr3, from.cr4);
    (to.efer, to.xcr0, to.pkru, to.dr) = (from.efer, from.xcr0, from.pkru, from.dr);
    to.msr = from.msr;
    to.cpuid = from.cpuid.clone();
    to.phys_bits = from.phys_bits;
    to.pending = from.pending;
    to.halted = from.halted;
    to.wait_sipi = from.wait_sipi;
    to.guest_debug = from.guest_debug;
    to.guest_debug_dr = from.guest_debug_dr;
    to.pdptr = from.pdptr;
    to.fp = from.fp.clone();
    to.flush_all();
    to.update_modes();
    to.breakpoints_changed();
}

//! KVM_GET/SET_SREGS and SREGS2: segments, control registers, and the checks KVM makes of them.

use super::regs::update_cpl;
use super::{get, put, Answer};
use crate::board::Local;
use crate::cpu::state::{cr0, cr4, efer, seg, DescriptorTable, Segment};
use crate::cpu::Cpu;
use kvm_bindings::*;

/// CR4 bits some CPU model offers.
const CR4_VALID: u64 = cr4::VME
    | cr4::PVI
    | cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::FSGSBASE
    | cr4::PCIDE
    | cr4::OSXSAVE
    | cr4::SMEP
    | cr4::SMAP;
const EFER_VALID: u64 = efer::SCE | efer::LME | efer::LMA | efer::NXE;

fn segment_out(s: &Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind,
        present: s.present as u8,
        dpl: s.dpl,
        db: s.db as u8,
        s: s.s as u8,
        l: s.l as u8,
        g: s.g as u8,
        avl: s.avl as u8,
        unusable: s.unusable as u8,
        padding: 0,
    }
}

fn segment_in(s: &kvm_segment) -> Segment {
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        kind: s.type_ & 15,
        present: s.present != 0,
        dpl: s.dpl & 3,
        db: s.db != 0,
        s: s.s != 0,
        l: s.l != 0,
        g: s.g != 0,
        avl: s.avl != 0,
        unusable: s.unusable != 0,
    }
}

fn table_out(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

fn table_in(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit }
}

/// PDPTEs are in use: PAE paging outside of long mode.
fn uses_pdptrs(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && efer & efer::LMA == 0
}

fn common(cpu: &Cpu, local: &Local) -> kvm_sregs2 {
    kvm_sregs2 {
        es: segment_out(&cpu.segs[seg::ES]),
        cs: segment_out(&cpu.segs[seg::CS]),
        ss: segment_out(&cpu.segs[seg::SS]),
        ds: segment_out(&cpu.segs[seg::DS]),
        fs: segment_out(&cpu.segs[seg::FS]),
        gs: segment_out(&cpu.segs[seg::GS]),
        tr: segment_out(&cpu.tr),
        ldt: segment_out(&cpu.ldtr),
        gdt: table_out(&cpu.gdtr),
        idt: table_out(&cpu.idtr),
        cr0: cpu.cr0,
        cr2: cpu.cr2,
        cr3: cpu.cr3,
        cr4: cpu.cr4,
        cr8: local.cr8(),
        efer: cpu.efer,
        apic_base: local.apic_base(),
        flags: 0,
        pdptrs: [0; 4],
    }
}

/// KVM_GET_SREGS.
pub(crate) fn get_sregs(cpu: &Cpu, local: &Local, arg: &mut [u8]) -> Answer {
    let c = common(cpu, local);
    let mut sregs = kvm_sregs {
        cs: c.cs,
        ds: c.ds,
        es: c.es,
        fs: c.fs,
        gs: c.gs,
        ss: c.ss,
        tr: c.tr,
        ldt: c.ldt,
        gdt: c.gdt,
        idt: c.idt,
        cr0: c.cr0,
        cr2: c.cr2,
        cr3: c.cr3,
        cr4: c.cr4,
        cr8: c.cr8,
        efer: c.efer,
        apic_base: c.apic_base,
        interrupt_bitmap: [0; 4],
    };
    if let Some((vector, false)) = cpu.pending.interrupt {
        sregs.interrupt_bitmap[vector as usize / 64] |= 1 << (vector % 64);
    }
    put(arg, &sregs)
}

/// KVM_GET_SREGS2.
pub(crate) fn get_sregs2(cpu: &Cpu, local: &Local, arg: &mut [u8]) -> Answer {
    let mut sregs = common(cpu, local);
    if uses_pdptrs(cpu.cr0, cpu.cr4, cpu.efer) {
        sregs.pdptrs = cpu.pdptr;
        sregs.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID as u64;
    }
    put(arg, &sregs)
}

/// KVM_SET_SREGS.
pub(crate) fn set_sregs(cpu: &mut Cpu, local: &Local, arg: &[u8]) -> Answer {
    let s: kvm_sregs = get(arg)?;
    let common = kvm_sregs2 {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        flags: 0,
        pdptrs: [0; 4],
    };
    apply(cpu, local, &common)?;
    if uses_pdptrs(cpu.cr0, cpu.cr4, cpu.efer) {
        // Not loadable means the guest's tables are not there yet: user space restores memory later.
        cpu.load_pdptrs();
    }
    let word = s.interrupt_bitmap.iter().position(|&word| word != 0);
    if let Some(index) = word {
        let vector = 64 * index as u32 + s.interrupt_bitmap[index].trailing_zeros();
        cpu.pending.interrupt = Some((vector as u8, false));
    }
    Ok(0)
}

/// KVM_SET_SREGS2.
pub(crate) fn set_sregs2(cpu: &mut Cpu, local: &Local, arg: &[u8]) -> Answer {
    let s: kvm_sregs2 = get(arg)?;
    let given = s.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID as u64 != 0;
    if s.flags & !(KVM_SREGS2_FLAGS_PDPTRS_VALID as u64) != 0 || given && !uses_pdptrs(s.cr0, s.cr4, s.efer) {
        return Err(libc::EINVAL);
    }
    apply(cpu, local, &s)?;
    if given {
        cpu.pdptr = s.pdptrs;
    } else if uses_pdptrs(cpu.cr0, cpu.cr4, cpu.efer) {
        cpu.load_pdptrs();
    }
    Ok(0)
}

/// As KVM's `kvm_is_valid_sregs`: what no processor can be in.
fn valid(cpu: &Cpu, s: &kvm_sregs2) -> bool {
    let paging = s.cr0 & cr0::PG != 0;
    let long = s.efer & efer::LME != 0 && paging;
    let modes = if long {
        s.cr4 & cr4::PAE != 0 && s.efer & efer::LMA != 0 && s.cr3 >> cpu.phys_bits == 0
    } else {
        s.efer & efer::LMA == 0 && s.cs.l == 0
    };
    let cr0 = s.cr0 >> 32 == 0 && (s.cr0 & cr0::NW == 0 || s.cr0 & cr0::CD != 0) && (!paging || s.cr0 & cr0::PE != 0);
    modes && cr0 && s.cr4 & !CR4_VALID == 0 && s.efer & !EFER_VALID == 0 && s.cr8 < 16
}

fn apply(cpu: &mut Cpu, local: &Local, s: &kvm_sregs2) -> Answer<()> {
    if !valid(cpu, s) {
        return Err(libc::EINVAL);
    }
    local.restore_apic_base(s.apic_base).map_err(|_| libc::EINVAL)?;
    local.set_cr8(s.cr8);
    cpu.segs = [&s.es, &s.cs, &s.ss, &s.ds, &s.fs, &s.gs].map(segment_in);
    cpu.tr = segment_in(&s.tr);
    cpu.ldtr = segment_in(&s.ldt);
    cpu.gdtr = table_in(&s.gdt);
    cpu.idtr = table_in(&s.idt);
    (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4, cpu.efer) = (s.cr0 | cr0::ET, s.cr2, s.cr3, s.cr4, s.efer);
    // A page fault restored as pending takes the CR2 that is restored, whichever comes first.
    if let Some(fault) = cpu.pending.exception.as_mut() {
        if fault.vector == crate::cpu::vector::PF {
            fault.payload = s.cr2;
        }
    }
    cpu.flush_all();
    update_cpl(cpu);
    Ok(())
}

/// The state of a vCPU after its reset vector was set up, which also ends a halt: KVM's rule for
/// user space that resets a boot processor without KVM_SET_MP_STATE.
pub(crate) fn looks_reset(cpu: &Cpu) -> bool {
    let cs = &cpu.segs[seg::CS];
    cpu.rip == 0xfff0 && cs.selector == 0xf000 && cs.base == 0xffff_0000 && cpu.cr0 & cr0::PE == 0
}

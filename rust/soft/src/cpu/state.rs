//! Architectural state beside the general registers: segments, control bits, RFLAGS, reset.
//!
//! SDM vol. 3, 2 (system registers), 3.4 (segments), 9.1 (state after reset).

use super::{attention, Cpu};
use std::sync::atomic::Ordering::*;

/// How CS makes code be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum CodeSize {
    B16,
    B32,
    B64,
}

/// Segment register numbers.
#[allow(missing_docs)]
pub mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// CR0 bits.
#[allow(missing_docs)]
pub mod cr0 {
    pub const PE: u64 = 1;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits.
#[allow(missing_docs)]
pub mod cr4 {
    pub const VME: u64 = 1;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
    pub const PKS: u64 = 1 << 24;
}

/// IA32_EFER bits.
#[allow(missing_docs)]
pub mod efer {
    pub const SCE: u64 = 1;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// RFLAGS bits outside of the arithmetic ones.
#[allow(missing_docs)]
pub mod rflags {
    pub const CF: u64 = 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const OF: u64 = 1 << 11;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// All bits kept in `sys_flags`.
    pub const SYS: u64 = TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
}

/// A segment register with its hidden part, as in `kvm_segment`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Segment {
    pub base: u64,
    /// In bytes, the granularity applied.
    pub limit: u32,
    pub selector: u16,
    /// Descriptor type, 4 bits.
    pub kind: u8,
    pub present: bool,
    pub dpl: u8,
    pub db: bool,
    /// Code or data (not system).
    pub s: bool,
    pub l: bool,
    pub g: bool,
    pub avl: bool,
    pub unusable: bool,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct DescriptorTable {
    pub base: u64,
    pub limit: u16,
}

/// MSRs that live in the CPU (the board keeps the APIC's, the TSC's and kvmclock's).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub arch_capabilities: u64,
    pub xss: u64,
    pub pkrs: u32,
    pub mcg_status: u64,
    pub mtrr_def_type: u64,
    pub bios_sign_id: u64,
    pub hwcr: u64,
    pub de_cfg: u64,
    pub misc_features: u64,
    pub tsc_adjust: u64,
}

/// One `kvm_cpuid_entry2`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CpuidEntry {
    pub function: u32,
    pub index: u32,
    /// The index matters (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
    pub indexed: bool,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// What CPUID answers, as set by KVM_SET_CPUID2.
#[derive(Clone, Debug, Default)]
pub struct CpuidTable {
    /// The entries, in the order given.
    pub entries: Vec<CpuidEntry>,
}

/// An event under delivery, as `kvm_vcpu_events` has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Pending {
    pub exception: Option<super::Fault>,
    /// External or software interrupt vector and whether it is a software one.
    pub interrupt: Option<(u8, bool)>,
    pub nmi: bool,
}

impl Cpu {
    /// RFLAGS as the guest sees it.
    pub fn rflags(&self) -> u64 {
        (self.flags >> 8) as u64 & 0xd5 | 2 | ((self.flags & 1) as u64) << 11 | self.sys_flags as u64
    }

    /// Sets all of RFLAGS; the caller has masked what the instruction may not change.
    pub fn set_rflags(&mut self, value: u64) {
        self.flags = ((value & 0xd5) as u16 | 2) << 8 | (value >> 11) as u16 & 1;
        let before = self.sys_flags as u64;
        self.sys_flags = (value & rflags::SYS) as u32;
        self.flags_changed(before);
    }

    /// Reacts to changed IF, TF, AC, VM bits; `before` is the old `sys_flags`.
    #[inline]
    pub fn flags_changed(&mut self, before: u64) {
        let now = self.sys_flags as u64;
        let changed = before ^ now;
        if changed & now & rflags::IF != 0 {
            self.native_out.held = 0;
            if self.board.has_interrupt() || self.pending.interrupt.is_some() {
                self.shared.attention.fetch_or(attention::IRQ, Relaxed);
            }
        }
        if now & (rflags::TF | rflags::RF) != 0 {
            self.shared.attention.fetch_or(attention::SINGLE, Relaxed);
        }
        if changed & rflags::AC != 0 {
            self.update_mmu_mode();
        }
    }

    /// CF.
    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.flags & 0x100 != 0
    }

    /// In long mode (compatibility or 64-bit).
    #[inline]
    pub fn lma(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// In protected mode proper: PE set, VM clear.
    #[inline]
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0 && self.sys_flags as u64 & rflags::VM == 0
    }

    /// IOPL.
    #[inline]
    pub fn iopl(&self) -> u8 {
        (self.sys_flags >> 12) as u8 & 3
    }

    /// Recomputes what is derived from CS, SS, FS, GS, CR0, EFER, RFLAGS.VM: code size, CPL's TLB
    /// array, effective bases. Call it after changing any of them.
    pub fn update_modes(&mut self) {
        let cs = &self.segs[seg::CS];
        self.code_size = match (self.lma() && cs.l, cs.db) {
            (true, _) => CodeSize::B64,
            (_, true) => CodeSize::B32,
            _ => CodeSize::B16,
        };
        self.legacy = self.code_size != CodeSize::B64;
        for index in 0..6 {
            let flat = !self.legacy && index < seg::FS;
            self.seg_base[index] = if flat { 0 } else { self.segs[index].base };
        }
        self.update_mmu_mode();
    }

    /// Power-on or RESET state. SDM vol. 3, table 9-1.
    pub fn reset(&mut self) {
        self.xcr0 = 1;
        self.pkru = 0;
        self.dr = [0; 8];
        self.cr2 = 0;
        self.msr = Msrs { pat: 0x0007_0406_0007_0406, misc_enable: 1, ..Msrs::default() };
        self.init();
        self.cr0 = cr0::CD | cr0::NW | cr0::ET;
    }

    /// INIT: as RESET, but CR0.CD/NW, MSRs, extended state and the TSC stay.
    pub fn init(&mut self) {
        self.regs = [0; 18];
        self.regs[2] = 0x600;
        self.flags = 0x0200;
        self.sys_flags = 0;
        self.rip = 0xfff0;
        self.cpl = 0;
        let data = Segment { limit: 0xffff, kind: 3, present: true, s: true, ..Segment::default() };
        self.segs = [data; 6];
        self.segs[seg::CS] = Segment { base: 0xffff_0000, selector: 0xf000, kind: 11, ..data };
        self.ldtr = Segment { kind: 2, s: false, ..data };
        self.tr = Segment { kind: 11, s: false, ..data };
        self.gdtr = DescriptorTable { base: 0, limit: 0xffff };
        self.idtr = DescriptorTable { base: 0, limit: 0xffff };
        self.cr0 = self.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = 0;
        self.efer = 0;
        self.dr = [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400];
        self.shadow = 0;
        self.nmi_blocked = false;
        self.pending = Pending::default();
        self.halted = false;
        self.flush_all();
        self.update_modes();
        self.breakpoints_changed();
    }
}

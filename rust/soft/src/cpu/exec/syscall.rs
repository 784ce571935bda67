//! SYSCALL, SYSRET, SYSENTER, SYSEXIT as Intel processors have them. SDM vol. 2; vol. 3, 5.8.7-8.
//!
//! The segments they load are fixed; no descriptor is read. Processors of AMD's have SYSCALL in
//! compatibility mode too, through CSTAR: so does a CPU model with that vendor.

use crate::cpu::debug::dr6;
use crate::cpu::mmu::canonical;
use crate::cpu::op::Op;
use crate::cpu::state::{cr0, efer, rflags, seg, CodeSize, Segment};
use crate::cpu::table::Row;
use crate::cpu::{vector, Cpu, Fault, Stop, R};
use crate::rows;

/// A flat code segment.
fn code(selector: u16, dpl: u8, l: bool) -> Segment {
    Segment { kind: 11, db: !l, l, ..flat(selector, dpl) }
}

/// A flat data segment.
fn flat(selector: u16, dpl: u8) -> Segment {
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        kind: 3,
        present: true,
        dpl,
        db: true,
        s: true,
        l: false,
        g: true,
        avl: false,
        unusable: false,
    }
}

impl Cpu {
    fn enter_flat(&mut self, cs: u16, ss: u16, dpl: u8, l: bool) {
        self.segs[seg::CS] = code(cs, dpl, l);
        self.segs[seg::SS] = flat(ss, dpl);
        self.cpl = dpl;
    }

    /// SYSCALL and SYSRET exist in 64-bit mode only.
    fn need_syscall(&mut self, compatibility: bool) -> R {
        let mode = self.code_size == CodeSize::B64 || compatibility && self.lma() && self.cpuid.amd();
        if !mode || self.efer & efer::SCE == 0 {
            return Err(self.ud());
        }
        Ok(())
    }

    /// TF traps by what it is at the end of these instructions, not at their start: after SYSRET,
    /// before the first instruction it returns to.
    fn trap_now(&mut self) {
        self.trace.tf = false;
        if self.sys_flags as u64 & rflags::TF != 0 {
            self.pending.exception = Some(Fault { vector: vector::DB, error: None, payload: dr6::BS });
        }
    }
}

unsafe fn syscall(cpu: &mut Cpu, op: &Op) -> R {
    cpu.need_syscall(true)?;
    let compatibility = cpu.legacy;
    cpu.regs[1] = cpu.next_rip(op);
    let flags = cpu.rflags() & !rflags::RF;
    cpu.regs[11] = flags;
    let cs = (cpu.msr.star >> 32) as u16 & 0xfffc;
    cpu.enter_flat(cs, cs.wrapping_add(8), 0, true);
    cpu.rip = if compatibility { cpu.msr.cstar } else { cpu.msr.lstar };
    cpu.set_rflags(flags & !cpu.msr.sfmask & !rflags::VM);
    cpu.update_modes();
    cpu.trap_now();
    Err(Stop::Branch)
}

unsafe fn sysret<const LONG: bool>(cpu: &mut Cpu, _: &Op) -> R {
    cpu.need_syscall(false)?;
    cpu.need_cpl0()?;
    let rip = if LONG { cpu.regs[1] } else { cpu.regs[1] & 0xffff_ffff };
    if !canonical(rip) {
        return Err(cpu.gp(0));
    }
    let base = (cpu.msr.star >> 48) as u16;
    let cs = base.wrapping_add(if LONG { 16 } else { 0 }) | 3;
    cpu.enter_flat(cs, base.wrapping_add(8) | 3, 3, LONG);
    cpu.rip = rip;
    cpu.set_rflags(cpu.regs[11] & 0x003c_7fd7 | 2);
    cpu.update_modes();
    cpu.trap_now();
    Err(Stop::Branch)
}

unsafe fn sysenter(cpu: &mut Cpu, _: &Op) -> R {
    let cs = cpu.msr.sysenter_cs as u16 & 0xfffc;
    if cpu.cr0 & cr0::PE == 0 || cs == 0 {
        return Err(cpu.gp(0));
    }
    let long = cpu.lma();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.regs[4] = cpu.msr.sysenter_esp & mask;
    cpu.rip = cpu.msr.sysenter_eip & mask;
    cpu.set_rflags(cpu.rflags() & !(rflags::VM | rflags::IF | rflags::RF));
    cpu.enter_flat(cs, cs.wrapping_add(8), 0, long);
    cpu.update_modes();
    Err(Stop::Branch)
}

unsafe fn sysexit<const LONG: bool>(cpu: &mut Cpu, _: &Op) -> R {
    let base = cpu.msr.sysenter_cs as u16;
    if base & 0xfffc == 0 || !cpu.protected() {
        return Err(cpu.gp(0));
    }
    cpu.need_cpl0()?;
    let (rip, rsp) = (cpu.regs[2], cpu.regs[1]);
    if LONG && !(canonical(rip) && canonical(rsp)) {
        return Err(cpu.gp(0));
    }
    let mask = if LONG { u64::MAX } else { 0xffff_ffff };
    let cs = base.wrapping_add(if LONG { 32 } else { 16 });
    cpu.enter_flat(cs | 3, cs.wrapping_add(8) | 3, 3, LONG);
    cpu.regs[4] = rsp & mask;
    cpu.rip = rip & mask;
    cpu.update_modes();
    Err(Stop::Branch)
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    System "SDM vol. 2B, SYSCALL SYSRET SYSENTER SYSEXIT" {
        Syscall => |_| Some(syscall),
        Sysret => |_| Some(sysret::<false>), Sysretq => |_| Some(sysret::<true>),
        Sysenter => |_| Some(sysenter),
        Sysexit => |_| Some(sysexit::<false>), Sysexitq => |_| Some(sysexit::<true>),
    }
};

#[cfg(test)]
mod tests {
    use crate::cpu::fixture::handler;
    use crate::cpu::run::RunEnd;
    use crate::cpu::state::{rflags, seg, CodeSize, CpuidEntry};
    use crate::cpu::testing::Bench;
    use crate::cpu::Exit;

    const CODE: u64 = 0x1_0000;

    fn bench(code: &[u8]) -> Bench {
        let mut bench = Bench::new(1 << 20).long(CODE).code(code);
        bench.cpu.msr.star = 0x001b_0008 << 32;
        bench.cpu.msr.lstar = 0x2_0000;
        bench.cpu.msr.sfmask = rflags::IF | rflags::DF | rflags::CF;
        bench
    }

    #[test]
    fn test_syscall_saves_rip_and_flags_and_masks() {
        let mut bench = bench(&[0x0f, 0x05]).user();
        bench.cpu.set_rflags(rflags::IF | rflags::DF | rflags::CF | rflags::ZF);
        bench.step();
        let cpu = &bench.cpu;
        assert_eq!((cpu.rip, cpu.regs[1], cpu.cpl), (0x2_0000, CODE + 2, 0));
        assert_eq!(cpu.regs[11], rflags::IF | rflags::DF | rflags::CF | rflags::ZF | 2);
        assert_eq!(cpu.rflags(), rflags::ZF | 2);
        assert_eq!((cpu.segs[seg::CS].selector, cpu.segs[seg::SS].selector), (8, 0x10));
    }

    #[test]
    fn test_sysret_to_64_bit_and_to_compatibility_mode() {
        for (code, cs, size) in [(&[0x48, 0x0f, 0x07][..], 0x2b, CodeSize::B64), (&[0x0f, 0x07], 0x1b, CodeSize::B32)] {
            let mut bench = bench(code);
            (bench.cpu.regs[1], bench.cpu.regs[11]) = (0x3_0000, rflags::IF | rflags::RF | rflags::VM);
            bench.step();
            let cpu = &bench.cpu;
            assert_eq!((cpu.rip, cpu.cpl, cpu.code_size), (0x3_0000, 3, size));
            assert_eq!((cpu.segs[seg::CS].selector, cpu.segs[seg::SS].selector), (cs, 0x23));
            assert_eq!(cpu.rflags(), rflags::IF | 2);
        }
    }

    #[test]
    fn test_sysret_to_non_canonical_rip_is_gp_at_kernel_level() {
        let mut bench = bench(&[0x48, 0x0f, 0x07]);
        bench.cpu.regs[1] = 1 << 47;
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.cpl), (handler(13), 0));
    }

    #[test]
    fn test_syscall_without_sce_or_in_compatibility_mode_is_ud() {
        let mut off = bench(&[0x0f, 0x05]).user();
        off.cpu.efer &= !1;
        off.step();
        assert_eq!(off.cpu.rip, handler(6));
        let mut compat = bench(&[0x0f, 0x05]).user();
        (compat.cpu.segs[seg::CS].l, compat.cpu.segs[seg::CS].db) = (false, true);
        compat.cpu.update_modes();
        compat.step();
        assert_eq!(compat.cpu.rip, handler(6));
    }

    #[test]
    fn test_syscall_of_an_amd_model_in_compatibility_mode_goes_through_cstar() {
        let mut bench = bench(&[0x0f, 0x05]).user();
        let [ebx, edx, ecx] = [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes);
        bench.cpu.cpuid.entries = vec![CpuidEntry { ebx, ecx, edx, ..CpuidEntry::default() }];
        bench.cpu.msr.cstar = 0x5_0000;
        (bench.cpu.segs[seg::CS].l, bench.cpu.segs[seg::CS].db) = (false, true);
        bench.cpu.update_modes();
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.code_size), (0x5_0000, CodeSize::B64));
    }

    #[test]
    fn test_sysret_that_sets_tf_traps_before_the_first_instruction() {
        let mut bench = bench(&[0x48, 0x0f, 0x07]);
        (bench.cpu.regs[1], bench.cpu.regs[11]) = (0x3_0000, rflags::TF);
        bench.load(handler(1), &[0xe6, 0x80]);
        let exit = Exit::Io { port: 0x80, size: 1, write: Some(0) };
        assert_eq!(bench.cpu.run(), RunEnd::Exit(exit));
        assert_eq!(bench.word(bench.cpu.regs[4]), 0x3_0000);
    }

    #[test]
    fn test_sysenter_and_sysexit() {
        let mut bench = bench(&[0x0f, 0x34]).user();
        (bench.cpu.msr.sysenter_cs, bench.cpu.msr.sysenter_eip, bench.cpu.msr.sysenter_esp) = (8, 0x2_0000, 0x7000);
        bench.load(0x2_0000, &[0x48, 0x0f, 0x35]);
        bench.cpu.set_rflags(rflags::IF);
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.regs[4], bench.cpu.cpl), (0x2_0000, 0x7000, 0));
        assert_eq!(bench.cpu.rflags(), 2);
        (bench.cpu.regs[2], bench.cpu.regs[1]) = (0x4_0000, 0x6000);
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.regs[4], bench.cpu.cpl), (0x4_0000, 0x6000, 3));
        assert_eq!((bench.cpu.segs[seg::CS].selector, bench.cpu.segs[seg::SS].selector), (0x2b, 0x33));
    }
}

//! Privileged and system instructions: descriptor tables, TLB and caches, MSRs, CPUID, time,
//! XCR0, HLT, interrupt flag, FS/GS bases, hypercalls, random numbers. SDM vol. 2.

pub use super::control::bind_mov_special;
pub use super::segments::{bind_pop_sreg, bind_push_sreg};

use super::segments::need_no_umip;
use crate::cpu::access::Int;
use crate::cpu::bind::{Binder, UNDEFINED};
use crate::cpu::debug::shadow;
use crate::cpu::mmu::canonical;
use crate::cpu::op::{Handler, Op, OP16};
use crate::cpu::state::{cr4, rflags, seg, CodeSize, DescriptorTable};
use crate::cpu::table::Row;
use crate::cpu::{Cpu, Gp, Stop, R};
use crate::rows;
use iced_x86::Code;

// ---- descriptor tables ------------------------------------------------------------------

/// LGDT, LIDT: `BASE` bytes of base address.
unsafe fn load_table<const IDT: bool, const BASE: u64>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.need_cpl0()?;
    let (linear, segment) = (cpu.lin(op, 2 + BASE, false)?, op.seg());
    let limit: u16 = cpu.rd(linear, segment)?;
    let at = linear.wrapping_add(2);
    let base = if BASE == 8 { cpu.rd::<u64>(at, segment)? } else { cpu.rd::<u32>(at, segment)? as u64 };
    let base = if op.has(OP16) { base & 0xff_ffff } else { base };
    if BASE == 8 && !canonical(base) {
        return Err(cpu.gp(0));
    }
    *(if IDT { &mut cpu.idtr } else { &mut cpu.gdtr }) = DescriptorTable { base, limit };
    Ok(())
}

unsafe fn store_table<const IDT: bool, const BASE: u64>(cpu: &mut Cpu, op: &Op) -> R {
    need_no_umip(cpu)?;
    let table = if IDT { cpu.idtr } else { cpu.gdtr };
    let mut image = [0; 10];
    image[..2].copy_from_slice(&table.limit.to_le_bytes());
    image[2..].copy_from_slice(&table.base.to_le_bytes());
    let linear = cpu.lin(op, 2 + BASE, true)?;
    cpu.wr_bytes(linear, &image[..2 + BASE as usize], op.seg())
}

fn bind_load_table<const IDT: bool>(b: &mut Binder) -> Option<Handler> {
    match b.ins.code() {
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => b.op.flags |= OP16,
        Code::Lgdt_m1664 | Code::Lidt_m1664 => return Some(load_table::<IDT, 8>),
        _ => {}
    }
    Some(load_table::<IDT, 4>)
}

fn bind_store_table<const IDT: bool>(b: &mut Binder) -> Option<Handler> {
    match b.ins.code() {
        Code::Sgdt_m1664 | Code::Sidt_m1664 => Some(store_table::<IDT, 8>),
        _ => Some(store_table::<IDT, 4>),
    }
}

// ---- TLB and caches ---------------------------------------------------------------------

unsafe fn invlpg(cpu: &mut Cpu, op: &Op) -> R {
    cpu.need_cpl0()?;
    cpu.serialise();
    let linear = cpu.effective_masked(op).wrapping_add(cpu.seg_base[op.seg()]);
    cpu.invlpg(if cpu.legacy { linear & 0xffff_ffff } else { linear });
    Err(Stop::Leave)
}

unsafe fn invpcid(cpu: &mut Cpu, op: &Op) -> R {
    if !cpu.cpuid.entries.is_empty() && !cpu.cpuid.has(7, 1, 10) {
        return Err(cpu.ud());
    }
    cpu.need_cpl0()?;
    let mut kind: u64 = cpu.reg(op.dst);
    if cpu.code_size != CodeSize::B64 {
        kind &= 0xffff_ffff;
    }
    let linear = cpu.lin(op, 16, false)?;
    let pcid: u64 = cpu.rd(linear, op.seg())?;
    let address: u64 = cpu.rd(linear.wrapping_add(8), op.seg())?;
    let single = kind < 2;
    let no_pcid = cpu.cr4 & cr4::PCIDE == 0 && pcid != 0;
    if kind > 3 || pcid >> 12 != 0 || single && no_pcid || kind == 0 && !canonical(address) {
        return Err(cpu.gp(0));
    }
    match kind {
        0 => cpu.invlpg(address),
        1 => cpu.flush_pcid(pcid as u16),
        _ => cpu.flush_all(),
    }
    Err(Stop::Leave)
}

/// WBINVD, INVD, WBNOINVD: caches are the host's business; the privilege is checked.
unsafe fn cache_all(cpu: &mut Cpu, _: &Op) -> R {
    cpu.need_cpl0()
}

/// CLFLUSH, CLFLUSHOPT, CLWB fault as a load of one byte does.
unsafe fn cache_line(cpu: &mut Cpu, op: &Op) -> R {
    cpu.rd_op::<u8>(op).map(|_| ())
}

unsafe fn nothing(_: &mut Cpu, _: &Op) -> R {
    Ok(())
}

// ---- MSRs, CPUID, time ------------------------------------------------------------------

fn edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.regs[0] = value & 0xffff_ffff;
    cpu.regs[2] = value >> 32;
}

fn from_edx_eax(cpu: &Cpu) -> u64 {
    cpu.regs[2] << 32 | cpu.regs[0] & 0xffff_ffff
}

unsafe fn rdmsr(cpu: &mut Cpu, _: &Op) -> R {
    cpu.need_cpl0()?;
    match cpu.read_msr(cpu.regs[1] as u32, false) {
        Ok(value) => edx_eax(cpu, value),
        Err(Gp) => return Err(cpu.gp(0)),
    }
    Ok(())
}

unsafe fn wrmsr(cpu: &mut Cpu, _: &Op) -> R {
    cpu.need_cpl0()?;
    cpu.serialise();
    match cpu.write_msr(cpu.regs[1] as u32, from_edx_eax(cpu), false) {
        Ok(()) => Err(Stop::Leave),
        Err(Gp) => Err(cpu.gp(0)),
    }
}

unsafe fn cpuid(cpu: &mut Cpu, _: &Op) -> R {
    cpu.serialise();
    let [eax, ebx, ecx, edx] = cpu.cpuid(cpu.regs[0] as u32, cpu.regs[1] as u32);
    for (register, value) in [(0, eax), (3, ebx), (1, ecx), (2, edx)] {
        cpu.regs[register] = value as u64;
    }
    Ok(())
}

/// CR4.TSD keeps user mode from the time-stamp counter.
fn need_tsc(cpu: &mut Cpu) -> R {
    if cpu.cr4 & cr4::TSD != 0 && cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    Ok(())
}

unsafe fn rdtsc(cpu: &mut Cpu, _: &Op) -> R {
    need_tsc(cpu)?;
    let tsc = cpu.board.tsc();
    edx_eax(cpu, tsc);
    Ok(())
}

unsafe fn rdtscp(cpu: &mut Cpu, _: &Op) -> R {
    need_tsc(cpu)?;
    let tsc = cpu.board.tsc();
    edx_eax(cpu, tsc);
    cpu.regs[1] = cpu.msr.tsc_aux & 0xffff_ffff;
    Ok(())
}

unsafe fn rdpid(cpu: &mut Cpu, op: &Op) -> R {
    cpu.set_reg(op.dst, cpu.msr.tsc_aux);
    Ok(())
}

/// There are no performance counters.
unsafe fn rdpmc(cpu: &mut Cpu, _: &Op) -> R {
    Err(cpu.gp(0))
}

// ---- protection keys --------------------------------------------------------------------

unsafe fn rdpkru(cpu: &mut Cpu, _: &Op) -> R {
    if cpu.cr4 & cr4::PKE == 0 {
        return Err(cpu.ud());
    }
    if cpu.regs[1] as u32 != 0 {
        return Err(cpu.gp(0));
    }
    edx_eax(cpu, cpu.pkru as u64);
    Ok(())
}

unsafe fn wrpkru(cpu: &mut Cpu, _: &Op) -> R {
    if cpu.cr4 & cr4::PKE == 0 {
        return Err(cpu.ud());
    }
    if cpu.regs[1] as u32 != 0 || cpu.regs[2] as u32 != 0 {
        return Err(cpu.gp(0));
    }
    cpu.pkru = cpu.regs[0] as u32;
    cpu.keys_changed();
    Err(Stop::Leave)
}

// ---- XCR0 -------------------------------------------------------------------------------

unsafe fn xgetbv(cpu: &mut Cpu, _: &Op) -> R {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    // Index 1 gives the components in use; all enabled ones is a permitted answer.
    if cpu.regs[1] as u32 > 1 {
        return Err(cpu.gp(0));
    }
    edx_eax(cpu, cpu.xcr0);
    Ok(())
}

unsafe fn xsetbv(cpu: &mut Cpu, _: &Op) -> R {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    cpu.need_cpl0()?;
    let value = from_edx_eax(cpu);
    if cpu.regs[1] as u32 != 0 || !cpu.xcr0_valid(value) {
        return Err(cpu.gp(0));
    }
    cpu.xcr0 = value;
    Err(Stop::Leave)
}

impl Cpu {
    /// Whether XCR0 may have this value: x87 always, AVX with SSE, nothing CPUID lacks.
    pub fn xcr0_valid(&self, value: u64) -> bool {
        let supported = self.cpuid.find(0xd, 0).map_or(3, |e| (e.edx as u64) << 32 | e.eax as u64);
        let avx512 = value >> 5 & 7;
        value & 1 != 0
            && value & !supported == 0
            && (value & 4 == 0 || value & 2 != 0)
            && (avx512 == 0 || avx512 == 7 && value & 6 == 6)
    }
}

// ---- HLT, IF, AC ------------------------------------------------------------------------

unsafe fn hlt(cpu: &mut Cpu, _: &Op) -> R {
    cpu.need_cpl0()?;
    cpu.halted = true;
    Err(Stop::Leave)
}

/// Which flag CLI and STI change: IF, or VIF where CR4.PVI or VME virtualises it.
fn interrupt_flag(cpu: &mut Cpu) -> R<u64> {
    if cpu.cpl <= cpu.iopl() {
        return Ok(rflags::IF);
    }
    let virtualised = if cpu.vm86() { cr4::VME } else { cr4::PVI };
    if cpu.cpl == 3 && cpu.cr4 & virtualised != 0 {
        return Ok(rflags::VIF);
    }
    Err(cpu.gp(0))
}

unsafe fn cli(cpu: &mut Cpu, _: &Op) -> R {
    let flag = interrupt_flag(cpu)?;
    cpu.sys_flags &= !flag as u32;
    Ok(())
}

unsafe fn sti(cpu: &mut Cpu, _: &Op) -> R {
    let flag = interrupt_flag(cpu)?;
    let before = cpu.sys_flags as u64;
    if flag == rflags::VIF && before & rflags::VIP != 0 {
        return Err(cpu.gp(0));
    }
    if before & flag != 0 {
        return Ok(());
    }
    cpu.sys_flags |= flag as u32;
    if flag == rflags::VIF {
        return Ok(());
    }
    cpu.flags_changed(before);
    cpu.shadow = shadow::STI;
    Err(Stop::Leave)
}

unsafe fn change_ac<const SET: bool>(cpu: &mut Cpu, _: &Op) -> R {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    let before = cpu.sys_flags as u64;
    cpu.sys_flags = if SET { before | rflags::AC } else { before & !rflags::AC } as u32;
    cpu.flags_changed(before);
    Ok(())
}

// ---- FS and GS --------------------------------------------------------------------------

unsafe fn swapgs(cpu: &mut Cpu, _: &Op) -> R {
    cpu.need_cpl0()?;
    let base = std::mem::replace(&mut cpu.msr.kernel_gs_base, cpu.segs[seg::GS].base);
    cpu.set_base(seg::GS, base);
    Ok(())
}

unsafe fn read_base<T: Int, const SEGMENT: usize>(cpu: &mut Cpu, op: &Op) -> R {
    if cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(cpu.ud());
    }
    cpu.set_reg(op.dst, T::from_u64(cpu.segs[SEGMENT].base));
    Ok(())
}

unsafe fn write_base<T: Int, const SEGMENT: usize>(cpu: &mut Cpu, op: &Op) -> R {
    if cpu.cr4 & cr4::FSGSBASE == 0 {
        return Err(cpu.ud());
    }
    let base = cpu.reg::<T>(op.dst).to_u64();
    if !canonical(base) {
        return Err(cpu.gp(0));
    }
    cpu.set_base(SEGMENT, base);
    Ok(())
}

fn by_width(b: &mut Binder, four: Handler, eight: Handler) -> Option<Handler> {
    Some(if b.width(0) == 4 { four } else { eight })
}

// ---- hypercalls, random numbers ---------------------------------------------------------

/// The hypercall that sends an IPI to a bitmap of processors.
pub(crate) const HC_SEND_IPI: u64 = 10;

/// KVM's ABI: number in RAX, arguments in RBX, RCX, RDX, RSI; user mode gets -EPERM. Outside of
/// 64-bit mode the two words of a bitmap of targets are halves of one.
unsafe fn hypercall(cpu: &mut Cpu, _: &Op) -> R {
    let mask = if cpu.code_size == CodeSize::B64 { u64::MAX } else { 0xffff_ffff };
    let [nr, mut a0, mut a1, a2, a3] = [0, 3, 1, 2, 6].map(|register: usize| cpu.regs[register] & mask);
    if nr == HC_SEND_IPI && cpu.code_size != CodeSize::B64 {
        (a0, a1) = (a1 << 32 | a0, 0);
    }
    let result = if cpu.cpl == 0 { cpu.board.hypercall(nr, [a0, a1, a2, a3]) } else { -1i64 as u64 };
    cpu.regs[0] = result & mask;
    Err(Stop::Leave)
}

/// RDRAND and RDSEED always succeed: CF set, the other arithmetic flags clear.
unsafe fn random<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let value = cpu.board.random();
    cpu.set_reg(op.dst, T::from_u64(value.unwrap_or(0)));
    cpu.flags = 0x0200 | (value.is_some() as u16) << 8;
    Ok(())
}

fn bind_random(b: &mut Binder) -> Option<Handler> {
    crate::sized!(b.width(0), random)
}

fn undefined(_: &mut Binder) -> Option<Handler> {
    Some(UNDEFINED)
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    System "SDM vol. 2, system instructions" {
        Lgdt => bind_load_table::<false>, Lidt => bind_load_table::<true>,
        Sgdt => bind_store_table::<false>, Sidt => bind_store_table::<true>,
        Invlpg => |_| Some(invlpg), Invpcid => |_| Some(invpcid),
        Wbinvd => |_| Some(cache_all), Wbnoinvd => |_| Some(cache_all), Invd => |_| Some(cache_all),
        Rdmsr => |_| Some(rdmsr), Wrmsr => |_| Some(wrmsr),
        Rdpkru => |_| Some(rdpkru), Wrpkru => |_| Some(wrpkru),
        Xsetbv => |_| Some(xsetbv), Hlt => |_| Some(hlt),
        Cli => |_| Some(cli), Sti => |_| Some(sti),
        Clac => |_| Some(change_ac::<false>), Stac => |_| Some(change_ac::<true>),
        Swapgs => |_| Some(swapgs),
        Vmcall => |_| Some(hypercall), Vmmcall => |_| Some(hypercall),
        Rsm => undefined, Monitor => undefined, Mwait => undefined, Getsec => undefined,
        Ud0 => undefined, Ud1 => undefined, Ud2 => undefined,
    }
    Volatile "SDM vol. 2, CPUID RDTSC RDTSCP RDPID RDPMC RDRAND RDSEED" {
        Cpuid => |_| Some(cpuid), Rdtsc => |_| Some(rdtsc), Rdtscp => |_| Some(rdtscp),
        Rdpid => |_| Some(rdpid), Rdpmc => |_| Some(rdpmc),
        Rdrand => bind_random, Rdseed => bind_random,
        Xgetbv => |_| Some(xgetbv),
        Rdfsbase => |b| by_width(b, read_base::<u32, { seg::FS }>, read_base::<u64, { seg::FS }>),
        Rdgsbase => |b| by_width(b, read_base::<u32, { seg::GS }>, read_base::<u64, { seg::GS }>),
        Wrfsbase => |b| by_width(b, write_base::<u32, { seg::FS }>, write_base::<u64, { seg::FS }>),
        Wrgsbase => |b| by_width(b, write_base::<u32, { seg::GS }>, write_base::<u64, { seg::GS }>),
    }
    User "SDM vol. 2A, CLFLUSH" {
        Clflush => |_| Some(cache_line), Clflushopt => |_| Some(cache_line), Clwb => |_| Some(cache_line),
        Cldemote => |_| Some(nothing),
    }
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::fixture::handler;
    use crate::cpu::state::CpuidEntry;
    use crate::cpu::testing::Bench;

    const CODE: u64 = 0x1_0000;

    fn long(code: &[u8]) -> Bench {
        Bench::new(1 << 20).long(CODE).code(code)
    }

    #[test]
    fn test_invpcid_of_a_model_without_it_is_ud() {
        // invpcid rcx, [rax]: all contexts
        for (ebx, ud) in [(0, true), (1 << 10, false)] {
            let mut bench = long(&[0x66, 0x0f, 0x38, 0x82, 0x08]);
            bench.cpu.cpuid.entries = vec![CpuidEntry { function: 7, ebx, ..CpuidEntry::default() }];
            (bench.cpu.regs[0], bench.cpu.regs[1]) = (0x2_0000, 2);
            assert_eq!(raises(bench, 6), ud);
        }
    }

    #[test]
    fn test_pkru_is_read_and_written_where_cr4_has_keys() {
        // wrpkru
        assert!(raises(long(&[0x0f, 0x01, 0xef]), 6));
        let mut bench = long(&[0x0f, 0x01, 0xef, 0x0f, 0x01, 0xee]);
        bench.cpu.cr4 |= cr4::PKE;
        // RESET leaves the processor's signature in EDX.
        (bench.cpu.regs[0], bench.cpu.regs[2]) = (0xffff_0000_1234, 0);
        bench.step();
        bench.cpu.regs[0] = 0;
        bench.step();
        assert_eq!((bench.cpu.regs[0], bench.cpu.rip), (0x1234, CODE + 6));
        let mut wrong = long(&[0x0f, 0x01, 0xee]);
        wrong.cpu.cr4 |= cr4::PKE;
        wrong.cpu.regs[1] = 1;
        assert!(raises(wrong, 13));
    }

    /// Whether the one instruction raises the exception.
    fn raises(mut bench: Bench, vector: u8) -> bool {
        bench.step();
        bench.cpu.rip == handler(vector)
    }

    #[test]
    fn test_privileged_instructions_in_user_mode_are_gp() {
        let codes: [&[u8]; 10] = [
            &[0xf4],
            &[0x0f, 0x01, 0x38],
            &[0x0f, 0x32],
            &[0x0f, 0x30],
            &[0x0f, 0x09],
            &[0x0f, 0x01, 0xf8],
            &[0xfa],
            &[0xfb],
            &[0x0f, 0x01, 0x10],
            &[0x0f, 0x33],
        ];
        for code in codes {
            assert!(raises(long(code).user(), 13), "{code:x?}");
        }
    }

    #[test]
    fn test_umip_hides_the_tables_from_user_mode() {
        // sgdt [0x2_0000]
        let code = [0x0f, 0x01, 0x04, 0x25, 0, 0, 2, 0];
        let mut open = long(&code).user();
        open.step();
        assert_eq!(open.word(0x2_0002), 0x4000);
        let mut closed = long(&code).user();
        closed.cpu.cr4 |= cr4::UMIP;
        assert!(raises(closed, 13));
    }

    #[test]
    fn test_lidt_with_non_canonical_base_is_gp() {
        // lidt [0x2_0000]
        let mut bench = long(&[0x0f, 0x01, 0x1c, 0x25, 0, 0, 2, 0]);
        bench.load(0x2_0002, &(1u64 << 47).to_le_bytes());
        assert!(raises(bench, 13));
    }

    #[test]
    fn test_sti_holds_interrupts_off_only_when_it_changes_if() {
        let mut bench = long(&[0xfb, 0xfb]);
        bench.step();
        assert_eq!((bench.cpu.shadow, bench.cpu.rip), (shadow::STI, CODE + 1));
        bench.step();
        assert_eq!(bench.cpu.shadow, 0);
    }

    #[test]
    fn test_cli_with_pvi_clears_vif() {
        let mut bench = long(&[0xfa]).user();
        bench.cpu.cr4 |= cr4::PVI;
        bench.cpu.set_rflags(rflags::IF | rflags::VIF);
        bench.step();
        assert_eq!(bench.cpu.rflags(), rflags::IF | 2);
    }

    #[test]
    fn test_invpcid_checks_its_descriptor() {
        // invpcid rax, [0x2_0000]
        let code = [0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0, 0, 2, 0];
        for (kind, pcid, address, bad) in
            [(4, 0, 0, true), (2, 1 << 12, 0, true), (0, 1, 0, true), (0, 0, 1 << 47, true), (2, 5, 1 << 47, false)]
        {
            let mut bench = long(&code);
            bench.cpu.regs[0] = kind;
            bench.load(0x2_0000, &u64::to_le_bytes(pcid));
            bench.load(0x2_0008, &u64::to_le_bytes(address));
            assert_eq!(raises(bench, 13), bad, "type {kind} pcid {pcid:#x}");
        }
    }

    #[test]
    fn test_xsetbv_wants_x87_and_what_cpuid_has() {
        for (value, good) in [(1u64, true), (3, true), (7, true), (2, false), (5, false), (0x11, false)] {
            let mut bench = long(&[0x0f, 0x01, 0xd1]);
            bench.cpu.cr4 |= cr4::OSXSAVE;
            bench.cpu.cpuid.entries = vec![CpuidEntry { function: 0xd, eax: 7, ..CpuidEntry::default() }];
            (bench.cpu.regs[0], bench.cpu.regs[2]) = (value, 0);
            assert_eq!(raises(bench, 13), !good, "{value:#x}");
        }
        assert!(raises(long(&[0x0f, 0x01, 0xd1]), 6));
    }

    #[test]
    fn test_rdtsc_follows_tsd() {
        let mut closed = long(&[0x0f, 0x31]).user();
        closed.cpu.cr4 |= cr4::TSD;
        assert!(raises(closed, 13));
        assert!(!raises(long(&[0x0f, 0x31]).user(), 13));
    }

    #[test]
    fn test_swapgs_exchanges_the_base_with_its_shadow() {
        // swapgs; mov rax, gs:[0]
        let mut bench = long(&[0x0f, 0x01, 0xf8, 0x65, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0]);
        bench.cpu.msr.kernel_gs_base = 0x2_0000;
        bench.cpu.set_base(seg::GS, 0x3_0000);
        bench.load(0x2_0000, &[0x77]);
        bench.step();
        bench.step();
        assert_eq!((bench.cpu.regs[0], bench.cpu.msr.kernel_gs_base), (0x77, 0x3_0000));
    }

    #[test]
    fn test_wrmsr_checks_values() {
        let cpu = &mut long(&[]).cpu;
        let bad =
            [(0x277, 2), (0xc000_0080, 1 << 12), (0xc000_0101, 1 << 47), (0xc000_0103, 1 << 32), (0x1234_5678, 0)];
        for (msr, value) in bad {
            assert_eq!(cpu.write_msr(msr, value, false), Err(Gp), "{msr:#x}");
        }
        assert_eq!(cpu.write_msr(0x277, 0x0006_0504_0100_0706, false), Ok(()));
        assert_eq!(cpu.read_msr(0x277, false), Ok(0x0006_0504_0100_0706));
    }
}

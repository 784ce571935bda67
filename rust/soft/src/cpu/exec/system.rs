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
    let linear = cpu.effective_masked(op).wrapping_add(cpu.seg_base[op.seg()]);
    cpu.invlpg(if cpu.legacy { linear & 0xffff_ffff } else { linear });
    Err(Stop::Leave)
}

unsafe fn invpcid(cpu: &mut Cpu, op: &Op) -> R {
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
    match cpu.write_msr(cpu.regs[1] as u32, from_edx_eax(cpu), false) {
        Ok(()) => Err(Stop::Leave),
        Err(Gp) => Err(cpu.gp(0)),
    }
}

unsafe fn cpuid(cpu: &mut Cpu, _: &Op) -> R {
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

/// KVM's ABI: number in RAX, arguments in RBX, RCX, RDX, RSI; user mode gets -EPERM.
unsafe fn hypercall(cpu: &mut Cpu, _: &Op) -> R {
    let mask = if cpu.code_size == CodeSize::B64 { u64::MAX } else { 0xffff_ffff };
    let [nr, a0, a1, a2, a3] = [0, 3, 1, 2, 6].map(|register: usize| cpu.regs[register] & mask);
    let result = if cpu.cpl == 0 { cpu.board.hypercall(nr, [a0, a1, a2, a3]) } else { -1i64 as u64 };
    cpu.regs[0] = result & mask;
    Err(Stop::Leave)
}

/// RDRAND and RDSEED always succeed: CF set, the other arithmetic flags clear.
unsafe fn random<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is valid for its length; up to 256 bytes are never cut short.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    let ok = got == bytes.len() as isize;
    cpu.set_reg(op.dst, T::from_u64(if ok { u64::from_le_bytes(bytes) } else { 0 }));
    cpu.flags = 0x0200 | (ok as u16) << 8;
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

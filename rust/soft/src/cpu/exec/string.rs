//! String instructions. SDM vol. 2: MOVS STOS LODS CMPS SCAS, and REP.
//!
//! REP MOVS and REP STOS go a page at a time through host memory; registers are up to date after
//! every chunk, so a fault or an interrupt between chunks finds an instruction that can be resumed
//! (pitfall 24).

use super::fp;
use crate::cpu::access::{load, store, Int};
use crate::cpu::alu::{Alu2, AluInt, Cmp};
use crate::cpu::bind::Kind;
use crate::cpu::op::{Op, ADDR16, ADDR32, REP, REPNE};
use crate::cpu::state::{rflags, seg};
use crate::cpu::table::Row;
use crate::cpu::{Cpu, Stop, R};
use crate::mem::PAGE_SIZE;
use crate::{rows, sized};
use std::sync::atomic::Ordering::*;

const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;
/// Iterations after which a repeated instruction looks whether attention is wanted.
const BURST: u64 = 1024;

impl Cpu {
    /// The mask of the address size.
    #[inline(always)]
    fn address_mask(op: &Op) -> u64 {
        if op.has(ADDR16) {
            0xffff
        } else if op.has(ADDR32) {
            0xffff_ffff
        } else {
            u64::MAX
        }
    }

    /// Sets an address-size register: 16 bits keep the rest, 32 clear it.
    #[inline(always)]
    fn set_address_reg(&mut self, register: usize, value: u64, op: &Op) {
        self.regs[register] = if op.has(ADDR16) {
            self.regs[register] & !0xffff | value & 0xffff
        } else if op.has(ADDR32) {
            value & 0xffff_ffff
        } else {
            value
        };
    }

    #[inline(always)]
    fn string_step(&self, size: u64) -> u64 {
        if self.sys_flags as u64 & rflags::DF != 0 {
            size.wrapping_neg()
        } else {
            size
        }
    }

    /// Moves an address-size register by `by`.
    #[inline(always)]
    fn advance(&mut self, register: usize, by: u64, op: &Op) {
        self.set_address_reg(register, self.regs[register].wrapping_add(by), op);
    }

    /// The linear address of the string element at a register.
    #[inline(always)]
    fn string_linear(&mut self, segment: usize, register: usize, op: &Op, size: u64, write: bool) -> R<u64> {
        let offset = self.regs[register] & Self::address_mask(op);
        self.linear(segment, offset, size, write)
    }

    /// Elements that can go at once: within the page of `linear`, and 1 where chunks are not possible.
    fn chunk(&self, linear: u64, size: u64, register: usize, segment: usize, op: &Op) -> u64 {
        if self.sys_flags as u64 & rflags::DF != 0 {
            return 1;
        }
        if self.legacy && (self.segs[segment].limit != u32::MAX || op.has(ADDR16)) {
            return 1;
        }
        let to_wrap = (Self::address_mask(op) - (self.regs[register] & Self::address_mask(op))) / size;
        ((PAGE_SIZE - (linear & 0xfff)) / size).min(to_wrap).max(1)
    }

    /// Whether a repeated instruction must let the loop look around.
    #[inline(always)]
    fn wants_attention(&self) -> bool {
        self.shared.attention.load(Relaxed) != 0
    }
}

// ---- MOVS ----------------------------------------------------------------------------------

#[inline(always)]
fn movs_once<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let size = T::SIZE as u64;
    let from = cpu.string_linear(op.seg(), RSI, op, size, false)?;
    let to = cpu.string_linear(seg::ES, RDI, op, size, true)?;
    let value: T = cpu.rd(from, op.seg())?;
    cpu.wr(to, value, seg::ES)?;
    let step = cpu.string_step(size);
    cpu.advance(RSI, step, op);
    cpu.advance(RDI, step, op);
    Ok(())
}

/// Copies forward as the CPU does: element by element where the destination overlaps ahead.
unsafe fn copy_forward<T: Int>(from: *const u8, to: *mut u8, count: u64) {
    let bytes = count as usize * T::SIZE;
    let distance = (to as usize).wrapping_sub(from as usize);
    // SAFETY: the caller vouches for `count` elements on both sides.
    unsafe {
        if distance >= bytes {
            std::ptr::copy(from, to, bytes);
        } else {
            for index in 0..count as usize {
                store(to.add(index * T::SIZE), load::<T>(from.add(index * T::SIZE)));
            }
        }
    }
}

/// As many elements as the pages of source and destination allow; gives their number.
fn movs_chunk<T: Int>(cpu: &mut Cpu, op: &Op, count: u64) -> R<u64> {
    let size = T::SIZE as u64;
    let from = cpu.string_linear(op.seg(), RSI, op, size, false)?;
    let to = cpu.string_linear(seg::ES, RDI, op, size, true)?;
    let n = count.min(cpu.chunk(from, size, RSI, op.seg(), op)).min(cpu.chunk(to, size, RDI, seg::ES, op));
    if n > 1 && (from & 0xfff) + size <= PAGE_SIZE && (to & 0xfff) + size <= PAGE_SIZE {
        if let Some(source) = cpu.bulk_read_ptr(from, op.seg())? {
            if let Some(destination) = cpu.bulk_write_ptr(to, n * size, seg::ES)? {
                // SAFETY: n elements lie within the page of each pointer.
                unsafe { copy_forward::<T>(source, destination, n) };
                cpu.settle_store();
                cpu.advance(RSI, n * size, op);
                cpu.advance(RDI, n * size, op);
                return Ok(n);
            }
        }
    }
    movs_once::<T>(cpu, op)?;
    Ok(1)
}

#[inline(always)]
fn repeat(cpu: &mut Cpu, op: &Op, mut chunk: impl FnMut(&mut Cpu, u64) -> R<u64>) -> R {
    let mask = Cpu::address_mask(op);
    let mut count = cpu.regs[RCX] & mask;
    while count != 0 {
        count -= chunk(cpu, count)?;
        cpu.set_address_reg(RCX, count, op);
        cpu.io.retire_iteration();
        if count != 0 && cpu.wants_attention() {
            return Err(Stop::Again);
        }
    }
    Ok(())
}

unsafe fn movs<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    movs_once::<T>(cpu, op)
}

unsafe fn rep_movs<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    repeat(cpu, op, |cpu, count| movs_chunk::<T>(cpu, op, count))
}

// ---- STOS ----------------------------------------------------------------------------------

fn stos_once<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let to = cpu.string_linear(seg::ES, RDI, op, T::SIZE as u64, true)?;
    let value: T = cpu.reg(0);
    cpu.wr(to, value, seg::ES)?;
    let step = cpu.string_step(T::SIZE as u64);
    cpu.advance(RDI, step, op);
    Ok(())
}

fn stos_chunk<T: Int>(cpu: &mut Cpu, op: &Op, count: u64) -> R<u64> {
    let size = T::SIZE as u64;
    let to = cpu.string_linear(seg::ES, RDI, op, size, true)?;
    let n = count.min(cpu.chunk(to, size, RDI, seg::ES, op));
    if n > 1 && (to & 0xfff) + size <= PAGE_SIZE {
        if let Some(host) = cpu.bulk_write_ptr(to, n * size, seg::ES)? {
            let value: T = cpu.reg(0);
            // SAFETY: n elements lie within the page of `host`.
            unsafe {
                if value.to_u64() == 0 || T::SIZE == 1 {
                    std::ptr::write_bytes(host, value.to_u64() as u8, (n * size) as usize);
                } else {
                    (0..n as usize).for_each(|index| store(host.add(index * T::SIZE), value));
                }
            }
            cpu.settle_store();
            cpu.advance(RDI, n * size, op);
            return Ok(n);
        }
    }
    stos_once::<T>(cpu, op)?;
    Ok(1)
}

unsafe fn stos<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    stos_once::<T>(cpu, op)
}

unsafe fn rep_stos<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    repeat(cpu, op, |cpu, count| stos_chunk::<T>(cpu, op, count))
}

// ---- LODS, CMPS, SCAS ----------------------------------------------------------------------

unsafe fn lods<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let from = cpu.string_linear(op.seg(), RSI, op, T::SIZE as u64, false)?;
    let value: T = cpu.rd(from, op.seg())?;
    cpu.set_reg(0, value);
    let step = cpu.string_step(T::SIZE as u64);
    cpu.advance(RSI, step, op);
    Ok(())
}

unsafe fn rep_lods<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    // SAFETY: the same operation.
    repeat(cpu, op, |cpu, _| unsafe { lods::<T>(cpu, op) }.map(|()| 1))
}

unsafe fn cmps<T: AluInt>(cpu: &mut Cpu, op: &Op) -> R {
    let size = T::SIZE as u64;
    let first = cpu.string_linear(op.seg(), RSI, op, size, false)?;
    let second = cpu.string_linear(seg::ES, RDI, op, size, false)?;
    let a: T = cpu.rd(first, op.seg())?;
    let b: T = cpu.rd(second, seg::ES)?;
    Cmp::run(a, b, &mut cpu.flags);
    let step = cpu.string_step(size);
    cpu.advance(RSI, step, op);
    cpu.advance(RDI, step, op);
    Ok(())
}

unsafe fn scas<T: AluInt>(cpu: &mut Cpu, op: &Op) -> R {
    let at = cpu.string_linear(seg::ES, RDI, op, T::SIZE as u64, false)?;
    let b: T = cpu.rd(at, seg::ES)?;
    Cmp::run(cpu.reg::<T>(0), b, &mut cpu.flags);
    let step = cpu.string_step(T::SIZE as u64);
    cpu.advance(RDI, step, op);
    Ok(())
}

/// REPE and REPNE: until the count is zero or ZF says so. After a fault the flags are those from
/// before the instruction. SDM vol. 2B, REP.
fn repeat_while(cpu: &mut Cpu, op: &Op, mut once: impl FnMut(&mut Cpu) -> R) -> R {
    let mask = Cpu::address_mask(op);
    let mut count = cpu.regs[RCX] & mask;
    let mut burst = BURST;
    let flags = cpu.flags;
    while count != 0 {
        if let Err(stop) = once(cpu) {
            cpu.flags = if stop == Stop::Fault { flags } else { cpu.flags };
            return Err(stop);
        }
        count -= 1;
        cpu.set_address_reg(RCX, count, op);
        cpu.io.retire_iteration();
        let equal = cpu.flags & 0x4000 != 0;
        if equal == op.has(REPNE) {
            break;
        }
        burst -= 1;
        if burst == 0 {
            if count != 0 && cpu.wants_attention() {
                return Err(Stop::Again);
            }
            burst = BURST;
        }
    }
    Ok(())
}

unsafe fn rep_cmps<T: AluInt>(cpu: &mut Cpu, op: &Op) -> R {
    // SAFETY: the same operation.
    repeat_while(cpu, op, |cpu| unsafe { cmps::<T>(cpu, op) })
}

unsafe fn rep_scas<T: AluInt>(cpu: &mut Cpu, op: &Op) -> R {
    // SAFETY: the same operation.
    repeat_while(cpu, op, |cpu| unsafe { scas::<T>(cpu, op) })
}

macro_rules! bind_string {
    ($width:literal, $once:ident, $repeated:ident) => {
        |b| {
            if b.kind(0) != Kind::Str && b.kind(1) != Kind::Str {
                // MOVSD and CMPSD are also SSE2 instructions.
                return fp::bind(b);
            }
            let repeated = b.op.has(REP) || b.op.has(REPNE);
            match repeated {
                true => sized!($width, $repeated),
                false => sized!($width, $once),
            }
        }
    };
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    User "SDM vol. 2, string instructions" {
        Movsb => bind_string!(1, movs, rep_movs), Movsw => bind_string!(2, movs, rep_movs),
        Movsd => bind_string!(4, movs, rep_movs), Movsq => bind_string!(8, movs, rep_movs),
        Stosb => bind_string!(1, stos, rep_stos), Stosw => bind_string!(2, stos, rep_stos),
        Stosd => bind_string!(4, stos, rep_stos), Stosq => bind_string!(8, stos, rep_stos),
        Lodsb => bind_string!(1, lods, rep_lods), Lodsw => bind_string!(2, lods, rep_lods),
        Lodsd => bind_string!(4, lods, rep_lods), Lodsq => bind_string!(8, lods, rep_lods),
        Cmpsb => bind_string!(1, cmps, rep_cmps), Cmpsw => bind_string!(2, cmps, rep_cmps),
        Cmpsd => bind_string!(4, cmps, rep_cmps), Cmpsq => bind_string!(8, cmps, rep_cmps),
        Scasb => bind_string!(1, scas, rep_scas), Scasw => bind_string!(2, scas, rep_scas),
        Scasd => bind_string!(4, scas, rep_scas), Scasq => bind_string!(8, scas, rep_scas),
    }
};

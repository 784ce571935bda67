//! x87, MMX and SSE: the checks and memory accesses around the host's thunks (`host`), and
//! FXSAVE/FXRSTOR, whose images are larger than a thunk's operand.
//!
//! SDM vol. 3, 2.5 and 13.1 (CR0.EM, TS, MP, CR4.OSFXSR, OSXMMEXCPT); vol. 1, 10.5.

use crate::cpu::bind::{Binder, Kind};
use crate::cpu::op::{Handler, Op, OP64};
use crate::cpu::state::{cr0, cr4, CodeSize};
use crate::cpu::table::Row;
use crate::cpu::{vector, Cpu, Stop, R};
use crate::host::classify::Class;
use crate::host::fpstate::x87_pending;
use crate::host::fxsave::{fxrstor, fxsave, Format, FXSAVE_BYTES};
use crate::host::thunk::{exec, ExecContext, MemAccess, Outcome, Scratch, Thunk};
use crate::host::vex::is_vex;
use crate::host::xsave::{AVX, SSE};
use crate::rows;

impl Cpu {
    /// #UD or #NM when CR0 and CR4 say so.
    #[inline]
    pub fn fp_available(&mut self, class: Class) -> R {
        let (em, ts, mp) = (self.cr0 & cr0::EM != 0, self.cr0 & cr0::TS != 0, self.cr0 & cr0::MP != 0);
        let sse = matches!(class, Class::SseInt | Class::SseFp | Class::SseMmx);
        let undefined = match class {
            Class::X87 | Class::Wait => false,
            Class::Mmx => em,
            Class::Avx => return self.avx_available(),
            _ => em || sse && self.cr4 & cr4::OSFXSR == 0,
        };
        if undefined {
            return Err(self.ud());
        }
        let unavailable = match class {
            Class::Wait => mp && ts,
            Class::X87 => em || ts,
            _ => ts,
        };
        if unavailable {
            return Err(self.raise(vector::NM, None));
        }
        Ok(())
    }
}

impl Cpu {
    /// #UD or #NM where VEX encodings of vector instructions cannot be executed. SDM vol. 2A, 2.4.
    #[inline]
    pub fn avx_available(&mut self) -> R {
        const YMM: u64 = SSE | AVX;
        if self.cr4 & cr4::OSXSAVE == 0 || self.xcr0 & YMM != YMM || !self.protected() || self.vm86() {
            return Err(self.ud());
        }
        if self.cr0 & cr0::TS != 0 {
            return Err(self.raise(vector::NM, None));
        }
        Ok(())
    }
}

unsafe fn run_vex(cpu: &mut Cpu, op: &Op) -> R {
    cpu.avx_available()?;
    // SAFETY: as in run().
    unsafe { run_available(cpu, op) }
}

unsafe fn run(cpu: &mut Cpu, op: &Op) -> R {
    // SAFETY: bind() put the address of a thunk there that the block's cache keeps alive.
    let thunk = unsafe { &*(op.imm as *const Thunk) };
    if cpu.cr0 & (cr0::EM | cr0::TS) != 0 || cpu.cr4 & cr4::OSFXSR == 0 {
        cpu.fp_available(thunk.class)?;
    }
    // SAFETY: as above.
    unsafe { run_available(cpu, op) }
}

#[inline(always)]
unsafe fn run_available(cpu: &mut Cpu, op: &Op) -> R {
    // SAFETY: as in run().
    let thunk = unsafe { &*(op.imm as *const Thunk) };
    // #MF comes before anything about the operand.
    if thunk.waits && x87_pending(&cpu.fp) {
        return Err(cpu.math_fault());
    }
    // Left as it is: a thunk reads only what was put there for it.
    let mut scratch = cpu.scratch.take().unwrap_or_default();
    let result = with_operand(cpu, op, thunk, &mut scratch);
    cpu.scratch = Some(scratch);
    result
}

fn with_operand(cpu: &mut Cpu, op: &Op, thunk: &Thunk, scratch: &mut Scratch) -> R {
    let (reads, writes) = match thunk.mem {
        MemAccess::None => return execute(cpu, op, thunk, scratch).map(|_| ()),
        MemAccess::Read(n) => (n as usize, 0),
        MemAccess::Write(n) | MemAccess::MaskedWrite(n) => (0, n as usize),
        MemAccess::ReadWrite(n) => (n as usize, n as usize),
    };
    // Alignment of 16 bytes is judged by the linear address.
    let linear = match cpu.lin(op, reads.max(writes) as u64, writes != 0) {
        Err(stop) if reads == 0 => return store_refused(cpu, op, thunk, scratch, stop),
        linear => linear?,
    };
    if thunk.mem_align > 1 && linear & (thunk.mem_align as u64 - 1) != 0 {
        return Err(cpu.gp(0));
    }
    if reads != 0 {
        cpu.rd_operand(linear, &mut scratch.0[..reads], op.seg())?;
    }
    let masked = matches!(thunk.mem, MemAccess::MaskedWrite(_));
    if writes != 0 && !masked {
        if let Err(stop) = cpu.probe_write_fast(linear, writes as u64, op.seg()) {
            return store_refused(cpu, op, thunk, scratch, stop);
        }
    }
    if !execute(cpu, op, thunk, scratch)? {
        return Ok(());
    }
    if masked {
        return masked_store(cpu, linear, scratch, writes, op.seg());
    }
    if writes != 0 {
        cpu.wr_operand(linear, &scratch.0[..writes], op.seg())?;
    }
    Ok(())
}

/// The operand cannot be written. An x87 store that meets an unmasked exception does not get as far
/// as memory: it completes, and its exception is pending.
#[cold]
fn store_refused(cpu: &mut Cpu, op: &Op, thunk: &Thunk, scratch: &mut Scratch, stop: Stop) -> R {
    if thunk.class != Class::X87 || stop != Stop::Fault {
        return Err(stop);
    }
    let (before, fault) = (cpu.fp.clone(), cpu.fault);
    if execute(cpu, op, thunk, scratch)? {
        (cpu.fp, cpu.fault) = (before, fault);
        return Err(stop);
    }
    Ok(())
}

/// Runs the thunk; `Ok(false)` when memory must stay as it is.
#[inline]
fn execute(cpu: &mut Cpu, op: &Op, thunk: &Thunk, scratch: &mut Scratch) -> R<bool> {
    let start = cpu.regs[17].wrapping_add((op.end - op.len) as u64);
    let needs_flags = thunk.writes_flags || thunk.class == Class::X87;
    let mut context = ExecContext {
        rip: start,
        mem_offset: if thunk.class == Class::X87 { cpu.effective_masked(op) } else { 0 },
        rflags: if needs_flags { cpu.rflags() } else { 2 },
        real_mode: !cpu.protected(),
        long_mode: cpu.code_size == CodeSize::B64,
    };
    let Some(regs) = cpu.regs.first_chunk_mut::<16>() else { unreachable!("the file has 18 slots") };
    let outcome = exec(thunk, regs, &mut cpu.fp, scratch, &mut context);
    match outcome {
        Outcome::Done | Outcome::DoneWithoutStore => {}
        Outcome::Xm if cpu.cr4 & cr4::OSXMMEXCPT != 0 => return Err(cpu.raise(vector::XM, None)),
        Outcome::Xm => return Err(cpu.ud()),
        Outcome::Mf => return Err(cpu.math_fault()),
        Outcome::Gp => return Err(cpu.gp(0)),
    }
    if thunk.writes_flags {
        let flags = context.rflags;
        cpu.flags = ((flags & 0xd5) as u16 | 2) << 8 | (flags >> 11) as u16 & 1;
    }
    Ok(outcome == Outcome::Done)
}

impl Cpu {
    /// #MF. With CR0.NE clear a PC would signal IRQ 13; no guest in scope relies on that.
    #[cold]
    fn math_fault(&mut self) -> Stop {
        self.raise(vector::MF, None)
    }

    /// Loads an operand of any size, by the fast path within a page.
    #[inline]
    fn rd_operand(&mut self, linear: u64, into: &mut [u8], segment: usize) -> R {
        let tag = self.tag(linear, into.len() as u64);
        let entry = self.entry(linear);
        if entry.r == tag {
            let host = (linear as usize).wrapping_add(entry.addend) as *const u8;
            // SAFETY: the tag matched: the bytes lie in one page of a live slot.
            unsafe { std::ptr::copy_nonoverlapping(host, into.as_mut_ptr(), into.len()) };
            return Ok(());
        }
        self.rd_bytes(linear, into, segment)
    }

    #[inline]
    fn wr_operand(&mut self, linear: u64, from: &[u8], segment: usize) -> R {
        let tag = self.tag(linear, from.len() as u64);
        let entry = self.entry(linear);
        if entry.w == tag {
            let host = (linear as usize).wrapping_add(entry.addend) as *mut u8;
            // SAFETY: as rd_operand().
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), host, from.len()) };
            return Ok(());
        }
        self.wr_bytes(linear, from, segment)
    }

    #[inline]
    fn probe_write_fast(&mut self, linear: u64, size: u64, segment: usize) -> R {
        let tag = self.tag(linear, size);
        if self.entry(linear).w == tag {
            return Ok(());
        }
        self.probe_write(linear, size, segment)
    }
}

/// MASKMOVQ and MASKMOVDQU: only the bytes chosen are written, or checked.
fn masked_store(cpu: &mut Cpu, linear: u64, scratch: &Scratch, size: usize, segment: usize) -> R {
    let mask = u16::from_le_bytes([scratch.0[Scratch::MASK], scratch.0[Scratch::MASK + 1]]);
    let chosen = |index: &usize| mask >> index & 1 != 0;
    for index in (0..size).filter(chosen) {
        cpu.probe_write_fast(linear.wrapping_add(index as u64), 1, segment)?;
    }
    for index in (0..size).filter(chosen) {
        cpu.wr(linear.wrapping_add(index as u64), scratch.0[index], segment)?;
    }
    Ok(())
}

/// Binds whatever the thunks cover.
pub fn bind(b: &mut Binder) -> Option<Handler> {
    if b.op.has(crate::cpu::op::LOCK) {
        return None;
    }
    if (0..b.ins.op_count()).any(|index| b.kind(index) == Kind::Str) {
        b.masked_move_operand();
    }
    b.op.imm = b.thunk()? as usize as u64;
    Some(if is_vex(b.ins.code()) { run_vex } else { run })
}

// ---- FXSAVE, FXRSTOR -----------------------------------------------------------------------

fn format(cpu: &Cpu, op: &Op) -> Format {
    Format { wide_pointers: op.has(OP64), sixteen_registers: cpu.code_size == CodeSize::B64 }
}

/// EM or TS: #NM. SDM vol. 2A, FXSAVE.
fn image_checks(cpu: &mut Cpu, op: &Op, write: bool) -> R<u64> {
    if cpu.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(cpu.raise(vector::NM, None));
    }
    let linear = cpu.lin(op, FXSAVE_BYTES as u64, write)?;
    if linear & 15 != 0 {
        return Err(cpu.gp(0));
    }
    Ok(linear)
}

unsafe fn save(cpu: &mut Cpu, op: &Op) -> R {
    let linear = image_checks(cpu, op, true)?;
    let mut image = [0u8; FXSAVE_BYTES];
    let segment = op.seg();
    cpu.probe_write(linear, FXSAVE_BYTES as u64, segment)?;
    cpu.rd_bytes(linear, &mut image, segment)?;
    let format = format(cpu, op);
    fxsave(&cpu.fp, &mut image, format);
    cpu.wr_bytes(linear, &image, segment)
}

unsafe fn restore(cpu: &mut Cpu, op: &Op) -> R {
    let linear = image_checks(cpu, op, false)?;
    let mut image = [0u8; FXSAVE_BYTES];
    cpu.rd_bytes(linear, &mut image, op.seg())?;
    let format = format(cpu, op);
    match fxrstor(&mut cpu.fp, &image, format) {
        Ok(()) => Ok(()),
        Err(_) => Err(cpu.gp(0)),
    }
}

fn bind_image(b: &mut Binder, handler: Handler, wide: bool) -> Option<Handler> {
    if b.kind(0) != Kind::Mem || b.op.has(crate::cpu::op::LOCK) {
        return None;
    }
    b.op.flags |= if wide { OP64 } else { 0 };
    Some(handler)
}

/// Rows of the opcode table; those of the thunks are added by `table.rs`.
pub const ROWS: &[Row] = rows! {
    User "SDM vol. 2A, FXSAVE, FXRSTOR" {
        Fxsave => |b| bind_image(b, save, false), Fxsave64 => |b| bind_image(b, save, true),
        Fxrstor => |b| bind_image(b, restore, false), Fxrstor64 => |b| bind_image(b, restore, true),
    }
};

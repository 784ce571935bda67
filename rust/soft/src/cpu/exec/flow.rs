//! Near control transfers and the stack. SDM vol. 2: JMP Jcc CALL RET LOOP JCXZ, PUSH POP PUSHA POPA
//! PUSHF POPF ENTER LEAVE.

use super::system;
use crate::cpu::access::Int;
use crate::cpu::alu::condition;
use crate::cpu::bind::{segment_number, Binder, Kind};
use crate::cpu::mmu::canonical;
use crate::cpu::op::{Handler, Op, ADDR16, ADDR32, OP16};
use crate::cpu::state::{cr4, rflags, seg, CodeSize};
use crate::cpu::table::Row;
use crate::cpu::{Cpu, Stop, R};
use crate::{rows, sized};

impl Cpu {
    /// Linear-in-segment address of the next instruction.
    #[inline(always)]
    pub(super) fn next_rip(&self, op: &Op) -> u64 {
        let next = self.regs[17].wrapping_add(op.end as u64);
        if self.legacy {
            next & 0xffff_ffff
        } else {
            next
        }
    }

    /// Where a relative branch goes.
    #[inline(always)]
    fn relative(&self, op: &Op) -> u64 {
        self.regs[17].wrapping_add(op.imm)
    }

    /// Checks a near branch target: canonical, or within the CS limit after truncation.
    #[inline(always)]
    fn near_target(&mut self, target: u64, op: &Op) -> R<u64> {
        if !self.legacy {
            if !canonical(target) {
                return Err(self.gp(0));
            }
            return Ok(target);
        }
        let target = target & if op.has(OP16) { 0xffff } else { 0xffff_ffff };
        if target > self.segs[seg::CS].limit as u64 {
            return Err(self.gp(0));
        }
        Ok(target)
    }

    #[inline(always)]
    fn goto<X>(&mut self, target: u64) -> R<X> {
        self.rip = target;
        Err(Stop::Branch)
    }
}

// ---- branches ------------------------------------------------------------------------------

unsafe fn jmp(cpu: &mut Cpu, op: &Op) -> R {
    let target = cpu.near_target(cpu.relative(op), op)?;
    cpu.goto(target)
}

unsafe fn jcc<const CC: u8>(cpu: &mut Cpu, op: &Op) -> R {
    if condition::<CC>(cpu.flags) {
        let target = cpu.near_target(cpu.relative(op), op)?;
        return cpu.goto(target);
    }
    Ok(())
}

unsafe fn jmp_r<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let target = cpu.near_target(cpu.reg::<T>(op.dst).to_u64(), op)?;
    cpu.goto(target)
}

unsafe fn jmp_m<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let target = cpu.rd_op::<T>(op)?.to_u64();
    let target = cpu.near_target(target, op)?;
    cpu.goto(target)
}

unsafe fn call<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let target = cpu.near_target(cpu.relative(op), op)?;
    cpu.push(T::from_u64(cpu.next_rip(op)))?;
    cpu.goto(target)
}

unsafe fn call_r<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let target = cpu.near_target(cpu.reg::<T>(op.dst).to_u64(), op)?;
    cpu.push(T::from_u64(cpu.next_rip(op)))?;
    cpu.goto(target)
}

unsafe fn call_m<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let target = cpu.rd_op::<T>(op)?.to_u64();
    let target = cpu.near_target(target, op)?;
    cpu.push(T::from_u64(cpu.next_rip(op)))?;
    cpu.goto(target)
}

/// RET and RET imm16.
unsafe fn ret<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let sp = cpu.sp();
    let target = cpu.rd_stack::<T>(sp)?.to_u64();
    let target = cpu.near_target(target, op)?;
    cpu.set_sp(sp.wrapping_add(T::SIZE as u64).wrapping_add(op.imm));
    cpu.goto(target)
}

/// Near branches have 64-bit operands in 64-bit mode whatever the prefix (as Intel does it).
fn branch_width(b: &mut Binder) -> usize {
    let width = match (b.size, b.operand_override()) {
        (CodeSize::B64, _) => 8,
        (CodeSize::B32, false) | (CodeSize::B16, true) => 4,
        _ => 2,
    };
    if width == 2 {
        b.op.flags |= OP16;
    }
    width
}

fn bind_jmp(b: &mut Binder) -> Option<Handler> {
    if b.ins.is_jmp_far() || b.ins.is_jmp_far_indirect() {
        return super::far::bind_jmp_far(b);
    }
    let width = branch_width(b);
    match b.kind(0) {
        Kind::Branch => Some(jmp),
        Kind::Reg => sized!(width, jmp_r),
        _ => sized!(width, jmp_m),
    }
}

fn bind_call(b: &mut Binder) -> Option<Handler> {
    if b.ins.is_call_far() || b.ins.is_call_far_indirect() {
        return super::far::bind_call_far(b);
    }
    let width = branch_width(b);
    match b.kind(0) {
        Kind::Branch => sized!(width, call),
        Kind::Reg => sized!(width, call_r),
        _ => sized!(width, call_m),
    }
}

fn bind_ret(b: &mut Binder) -> Option<Handler> {
    let width = branch_width(b);
    sized!(width, ret)
}

fn bind_jcc<const CC: u8>(b: &mut Binder) -> Option<Handler> {
    branch_width(b);
    Some(jcc::<CC>)
}

#[inline(always)]
fn count_mask(op: &Op, cpu: &Cpu) -> u64 {
    if op.has(ADDR16) {
        0xffff
    } else if op.has(ADDR32) || cpu.legacy {
        0xffff_ffff
    } else {
        u64::MAX
    }
}

/// LOOP (0), LOOPE (1), LOOPNE (2), JrCXZ (3).
unsafe fn loops<const KIND: u8>(cpu: &mut Cpu, op: &Op) -> R {
    let mask = count_mask(op, cpu);
    let mut count = cpu.regs[1] & mask;
    let zf = cpu.flags & 0x4000 != 0;
    if KIND != 3 {
        count = count.wrapping_sub(1) & mask;
    }
    let taken = match KIND {
        0 => count != 0,
        1 => count != 0 && zf,
        2 => count != 0 && !zf,
        _ => count == 0,
    };
    let target = if taken { cpu.near_target(cpu.relative(op), op)? } else { 0 };
    if KIND != 3 {
        match mask {
            0xffff => cpu.set_reg(8, count as u16),
            _ => cpu.regs[1] = count,
        }
    }
    if taken {
        return cpu.goto(target);
    }
    Ok(())
}

fn bind_loop<const KIND: u8>(b: &mut Binder) -> Option<Handler> {
    use iced_x86::Code::*;
    branch_width(b);
    b.op.flags &= !(ADDR16 | ADDR32);
    b.op.flags |= match b.ins.code() {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
        | Loopne_rel8_32_CX | Jcxz_rel8_16 | Jcxz_rel8_32 => ADDR16,
        Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX | Loopne_rel8_16_RCX
        | Loopne_rel8_64_RCX | Jrcxz_rel8_16 | Jrcxz_rel8_64 => 0,
        _ => ADDR32,
    };
    Some(loops::<KIND>)
}

// ---- stack ---------------------------------------------------------------------------------

unsafe fn push_r<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.push::<T>(cpu.reg(op.dst))
}

unsafe fn push_m<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let value: T = cpu.rd_op(op)?;
    cpu.push(value)
}

unsafe fn push_i<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.push(T::from_u64(op.imm))
}

fn bind_push(b: &mut Binder) -> Option<Handler> {
    match b.kind(0) {
        Kind::Reg if segment_number(b.ins.op_register(0)).is_some() => system::bind_push_sreg(b),
        Kind::Reg => sized!(b.width(0), push_r),
        Kind::Mem => sized!(b.width(0), push_m),
        _ => sized!(b.ins.stack_pointer_increment().unsigned_abs() as usize, push_i),
    }
}

unsafe fn pop_r<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let value: T = cpu.pop()?;
    cpu.set_reg(op.dst, value);
    Ok(())
}

/// POP to memory: the address is computed with RSP already raised; a fault takes that back.
unsafe fn pop_m<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let rsp = cpu.regs[4];
    let value: T = cpu.pop()?;
    let result = cpu.wr_op(op, value);
    if result.is_err() {
        cpu.regs[4] = rsp;
    }
    result
}

fn bind_pop(b: &mut Binder) -> Option<Handler> {
    match b.kind(0) {
        Kind::Reg if segment_number(b.ins.op_register(0)).is_some() => system::bind_pop_sreg(b),
        Kind::Reg => sized!(b.width(0), pop_r),
        _ => sized!(b.width(0), pop_m),
    }
}

/// PUSHA: eight registers, SP as it was.
unsafe fn pusha<T: Int>(cpu: &mut Cpu, _: &Op) -> R {
    let (sp, size) = (cpu.sp(), T::SIZE as u64);
    for index in 0..8u64 {
        let at = sp.wrapping_sub(size * (index + 1)) & cpu.stack_mask();
        let linear = cpu.linear(seg::SS, at, size, true)?;
        cpu.probe_write(linear, size, seg::SS)?;
    }
    for index in 0..8u64 {
        cpu.wr_stack::<T>(sp.wrapping_sub(size * (index + 1)), cpu.reg(index as u8 * 8))?;
    }
    cpu.set_sp(sp.wrapping_sub(size * 8));
    Ok(())
}

unsafe fn popa<T: Int>(cpu: &mut Cpu, _: &Op) -> R {
    let (sp, size) = (cpu.sp(), T::SIZE as u64);
    let mut values = [T::from_u64(0); 8];
    for (index, value) in values.iter_mut().enumerate() {
        *value = cpu.rd_stack(sp.wrapping_add(size * index as u64))?;
    }
    for (index, value) in values.into_iter().rev().enumerate().filter(|(index, _)| *index != 4) {
        cpu.set_reg(index as u8 * 8, value);
    }
    cpu.set_sp(sp.wrapping_add(size * 8));
    Ok(())
}

unsafe fn pushf<T: Int>(cpu: &mut Cpu, _: &Op) -> R {
    let mut image = cpu.rflags() & !(rflags::VM | rflags::RF);
    if vm86_flags::<T>(cpu)? {
        let vif = image & rflags::VIF != 0;
        image = image & !rflags::IF | rflags::IOPL | if vif { rflags::IF } else { 0 };
    }
    cpu.push(T::from_u64(image))
}

/// POPF: which bits may change depends on CPL and IOPL. SDM vol. 2B, POPF, table 4-15.
/// POPF in virtual-8086 mode whose IF is VIF. SDM vol. 2, POPF; vol. 3, 22.2.
fn popf_vme(cpu: &mut Cpu) -> R {
    let (rsp, mut image) = (cpu.regs[4], cpu.pop::<u16>()? as u64);
    let busy = image & rflags::IF != 0 && cpu.sys_flags as u64 & rflags::VIP != 0;
    if busy || image & rflags::TF != 0 {
        cpu.regs[4] = rsp;
        return Err(cpu.gp(0));
    }
    image |= if image & rflags::IF != 0 { rflags::VIF } else { 0 };
    let keep = rflags::IF | rflags::IOPL | (!0xffff & !rflags::VIF);
    cpu.set_rflags(cpu.rflags() & keep | image & !keep);
    Ok(())
}

/// PUSHF and POPF in virtual-8086 mode below IOPL 3: `true` when CR4.VME lets the 16-bit forms
/// work on VIF instead of IF, else #GP(0).
fn vm86_flags<T: Int>(cpu: &mut Cpu) -> R<bool> {
    if !cpu.vm86() || cpu.iopl() == 3 {
        return Ok(false);
    }
    if cpu.cr4 & cr4::VME == 0 || T::SIZE != 2 {
        return Err(cpu.gp(0));
    }
    Ok(true)
}

unsafe fn popf<T: Int>(cpu: &mut Cpu, _: &Op) -> R {
    let vm = cpu.vm86();
    if vm86_flags::<T>(cpu)? {
        return popf_vme(cpu);
    }
    let value = cpu.pop::<T>()?.to_u64();
    let arithmetic = rflags::CF | rflags::PF | rflags::AF | rflags::ZF | rflags::SF | rflags::OF;
    let mut may = arithmetic | rflags::TF | rflags::DF | rflags::NT;
    if T::SIZE > 2 {
        may |= rflags::AC | rflags::ID;
    }
    let protected = cpu.protected();
    if !vm && (!protected || cpu.cpl == 0) {
        may |= rflags::IOPL | rflags::IF;
    } else if cpu.cpl <= cpu.iopl() {
        may |= rflags::IF;
    }
    let keep = cpu.rflags() & !may & if T::SIZE > 2 { !rflags::RF } else { u64::MAX };
    cpu.set_rflags(value & may | keep);
    Ok(())
}

fn bind_by_stack(b: &mut Binder, handlers: [Handler; 3], count: i32) -> Option<Handler> {
    match b.ins.stack_pointer_increment().abs() / count {
        2 => Some(handlers[0]),
        4 => Some(handlers[1]),
        8 => Some(handlers[2]),
        _ => None,
    }
}

/// LEAVE: SP = BP, then pop BP.
unsafe fn leave<T: Int>(cpu: &mut Cpu, _: &Op) -> R {
    let bp = cpu.regs[5] & cpu.stack_mask();
    let value: T = cpu.rd_stack(bp)?;
    cpu.set_sp(bp.wrapping_add(T::SIZE as u64));
    cpu.set_reg(5 * 8, value);
    Ok(())
}

/// ENTER: frame bytes in bits 0-15 of `imm`, nesting level in 16-23.
unsafe fn enter<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let (frame, level) = (op.imm & 0xffff, op.imm >> 16 & 31);
    let (size, sp) = (T::SIZE as u64, cpu.sp());
    let mask = cpu.stack_mask();
    let frame_pointer = sp.wrapping_sub(size);
    let mut at = frame_pointer;
    cpu.wr_stack::<T>(at, cpu.reg(5 * 8))?;
    if level > 0 {
        let mut bp = cpu.regs[5] & mask;
        for _ in 1..level {
            bp = bp.wrapping_sub(size);
            let value: T = cpu.rd_stack(bp)?;
            at = at.wrapping_sub(size);
            cpu.wr_stack(at, value)?;
        }
        at = at.wrapping_sub(size);
        cpu.wr_stack(at, T::from_u64(frame_pointer))?;
    }
    at = at.wrapping_sub(frame);
    // The final stack pointer must be usable: SDM's check is a write probe.
    let linear = cpu.linear(seg::SS, at & mask, size, true)?;
    cpu.probe_write(linear, size, seg::SS)?;
    cpu.set_reg(5 * 8, T::from_u64(frame_pointer));
    cpu.set_sp(at);
    Ok(())
}

fn bind_enter(b: &mut Binder) -> Option<Handler> {
    use iced_x86::Code::*;
    b.op.imm = b.ins.immediate16() as u64 | (b.ins.immediate8_2nd() as u64) << 16;
    match b.ins.code() {
        Enterw_imm16_imm8 => Some(enter::<u16>),
        Enterd_imm16_imm8 => Some(enter::<u32>),
        _ => Some(enter::<u64>),
    }
}

fn bind_leave(b: &mut Binder) -> Option<Handler> {
    use iced_x86::Code::*;
    match b.ins.code() {
        Leavew => Some(leave::<u16>),
        Leaved => Some(leave::<u32>),
        _ => Some(leave::<u64>),
    }
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    Branch "SDM vol. 2A, Jcc" {
        Jo => bind_jcc::<0>, Jno => bind_jcc::<1>, Jb => bind_jcc::<2>, Jae => bind_jcc::<3>,
        Je => bind_jcc::<4>, Jne => bind_jcc::<5>, Jbe => bind_jcc::<6>, Ja => bind_jcc::<7>,
        Js => bind_jcc::<8>, Jns => bind_jcc::<9>, Jp => bind_jcc::<10>, Jnp => bind_jcc::<11>,
        Jl => bind_jcc::<12>, Jge => bind_jcc::<13>, Jle => bind_jcc::<14>, Jg => bind_jcc::<15>,
    }
    Branch "SDM vol. 2, JMP, CALL, RET, LOOP, JCXZ" {
        Jmp => bind_jmp, Call => bind_call, Ret => bind_ret,
        Loop => bind_loop::<0>, Loope => bind_loop::<1>, Loopne => bind_loop::<2>,
        Jcxz => bind_loop::<3>, Jecxz => bind_loop::<3>, Jrcxz => bind_loop::<3>,
    }
    User "SDM vol. 2, stack" {
        Push => bind_push, Pop => bind_pop,
        Pusha => |_| Some(pusha::<u16>), Pushad => |_| Some(pusha::<u32>),
        Popa => |_| Some(popa::<u16>), Popad => |_| Some(popa::<u32>),
        Pushf => |b| bind_by_stack(b, [pushf::<u16>, pushf::<u32>, pushf::<u64>], 1),
        Pushfd => |b| bind_by_stack(b, [pushf::<u16>, pushf::<u32>, pushf::<u64>], 1),
        Pushfq => |b| bind_by_stack(b, [pushf::<u16>, pushf::<u32>, pushf::<u64>], 1),
        Popf => |b| bind_by_stack(b, [popf::<u16>, popf::<u32>, popf::<u64>], 1),
        Popfd => |b| bind_by_stack(b, [popf::<u16>, popf::<u32>, popf::<u64>], 1),
        Popfq => |b| bind_by_stack(b, [popf::<u16>, popf::<u32>, popf::<u64>], 1),
        Enter => bind_enter, Leave => bind_leave,
    }
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::segment::vm86_segment;
    use crate::cpu::testing::Bench;

    /// PUSHF, POPF in virtual-8086 mode with IOPL 0.
    fn vm86(flags: u64, vme: bool, code: &[u8]) -> Bench {
        let mut bench = Bench::new(1 << 20).protected(0).user();
        bench.cpu.set_rflags(flags | rflags::VM);
        bench.cpu.segs = [vm86_segment(0x1000); 6];
        bench.cpu.cr4 |= if vme { cr4::VME } else { 0 };
        (bench.cpu.rip, bench.cpu.regs[4]) = (0, 0x8000);
        bench.cpu.update_modes();
        bench.load(0x1_0000, code);
        bench
    }

    #[test]
    fn test_pushf_in_virtual_8086_mode_shows_vif_as_if() {
        let mut bench = vm86(rflags::VIF, true, &[0x9c]);
        bench.step();
        assert_eq!(bench.word(0x1_7ffe) & 0xffff, rflags::IF | rflags::IOPL | 2);
        let mut off = vm86(rflags::VIF, false, &[0x9c]);
        assert_eq!(off.cpu.step_raw(), Err(Stop::Fault));
        assert_eq!(off.cpu.regs[4], 0x8000);
    }

    #[test]
    fn test_popf_in_virtual_8086_mode_changes_vif_and_neither_if_nor_iopl() {
        let mut bench = vm86(rflags::IF, true, &[0x9d]);
        bench.load(0x1_8000, &0x3203u16.to_le_bytes());
        bench.step();
        assert_eq!(bench.cpu.rflags(), rflags::VM | rflags::VIF | rflags::IF | 3);
    }

    #[test]
    fn test_popf_that_would_open_a_pending_virtual_interrupt_is_gp() {
        let mut bench = vm86(rflags::VIP, true, &[0x9d]);
        bench.load(0x1_8000, &0x202u16.to_le_bytes());
        assert_eq!(bench.cpu.step_raw(), Err(Stop::Fault));
        assert_eq!((bench.cpu.regs[4], bench.cpu.rip), (0x8000, 0));
    }
}

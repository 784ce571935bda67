//! Far JMP, CALL and RET, and what they share with IRET: loading CS.
//!
//! SDM vol. 2, JMP, CALL, RET; vol. 3, 5.8. All checks come before any register changes; pushes go
//! to memory first and RSP is committed last.

use crate::cpu::bind::{Binder, Kind};
use crate::cpu::interrupt::Stack;
use crate::cpu::mmu::canonical;
use crate::cpu::op::{Handler, Op};
use crate::cpu::segment::{null_segment, selector_error, system, vm86_segment, Descriptor};
use crate::cpu::state::{seg, Segment};
use crate::cpu::table::Row;
use crate::cpu::{vector, Cpu, Stop, R};
use crate::rows;
use iced_x86::{Code, MemorySize};

/// A checked code segment and where to enter it.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub selector: u16,
    pub descriptor: Descriptor,
    pub offset: u64,
    pub cpl: u8,
}

impl Cpu {
    /// The code segment of a direct far JMP or CALL.
    fn direct_target(&mut self, selector: u16, d: Descriptor, offset: u64) -> R<Target> {
        let rpl = selector as u8 & 3;
        let bad = if d.conforming() { d.dpl() > self.cpl } else { rpl > self.cpl || d.dpl() != self.cpl };
        self.code_checks(selector, d, bad)?;
        Ok(Target { selector, descriptor: d, offset, cpl: self.cpl })
    }

    /// What every code segment must be: code, not L with D in long mode, present.
    pub(super) fn code_checks(&mut self, selector: u16, d: Descriptor, bad: bool) -> R {
        let error = selector_error(selector);
        if bad || !d.code() || self.lma() && d.l() && d.db() {
            return Err(self.gp(error));
        }
        if !d.present() {
            return Err(self.raise(vector::NP, Some(error)));
        }
        Ok(())
    }

    /// The offset lies within the target: canonical in 64-bit mode, within the limit else.
    pub(super) fn check_offset(&mut self, target: &Target) -> R {
        let fits = if self.lma() && target.descriptor.l() {
            canonical(target.offset)
        } else {
            target.offset <= target.descriptor.limit() as u64
        };
        if fits {
            Ok(())
        } else {
            Err(self.gp(0))
        }
    }

    /// Loads CS and RIP; the caller calls `update_modes` when all is in place.
    pub(super) fn load_cs(&mut self, target: &Target) -> R {
        self.mark_accessed(target.selector, target.descriptor)?;
        self.segs[seg::CS] = target.descriptor.segment(target.selector & !3 | target.cpl as u16);
        self.cpl = target.cpl;
        self.rip = target.offset;
        Ok(())
    }

    /// CS:IP in real and virtual-8086 mode.
    pub(super) fn load_real_cs(&mut self, selector: u16, offset: u64) -> R {
        if offset > self.segs[seg::CS].limit as u64 {
            return Err(self.gp(0));
        }
        self.segs[seg::CS] = if self.vm86() { vm86_segment(selector) } else { self.real_segment(seg::CS, selector) };
        self.rip = offset;
        Ok(())
    }

    /// After a return to an outer level: data segments it may not use become null. Their bases stay,
    /// which 64-bit code sees in FS and GS.
    pub(super) fn drop_inner_segments(&mut self) {
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let s = self.segs[index];
            let conforming = s.kind & 0xc == 0xc;
            if !s.unusable && s.dpl < self.cpl && !conforming {
                self.segs[index] = Segment { base: s.base, ..null_segment(0, 0) };
            }
        }
    }

    /// SS of a return to level `rpl`; null is allowed where 64-bit code returns to inner levels.
    pub(super) fn return_stack(&mut self, selector: u16, rpl: u8, to_long: bool) -> R<Segment> {
        if selector & 0xfffc == 0 {
            if to_long && rpl != 3 && selector as u8 & 3 == rpl {
                return Ok(null_segment(selector, rpl));
            }
            return Err(self.gp(0));
        }
        self.stack_descriptor(selector, rpl, vector::GP, 0)
    }

    /// The code segment of a far RET or IRET.
    pub(super) fn return_target(&mut self, selector: u16, offset: u64) -> R<Target> {
        if selector & 0xfffc == 0 {
            return Err(self.gp(0));
        }
        let rpl = selector as u8 & 3;
        let d = self.descriptor(selector, vector::GP, 0)?;
        let bad = rpl < self.cpl || if d.conforming() { d.dpl() > rpl } else { d.dpl() != rpl };
        self.code_checks(selector, d, bad)?;
        Ok(Target { selector, descriptor: d, offset, cpl: rpl })
    }

    /// Reads `width` bytes of the stack, `above` its pointer.
    pub(super) fn peek(&mut self, stack: &Stack, above: u64, width: u64) -> R<u64> {
        let linear = self.stack_linear(stack, above, width)?;
        Ok(match width {
            2 => self.rd::<u16>(linear, seg::SS)? as u64,
            4 => self.rd::<u32>(linear, seg::SS)? as u64,
            _ => self.rd(linear, seg::SS)?,
        })
    }

    /// Far JMP.
    fn far_jump(&mut self, selector: u16, offset: u64) -> R {
        if !self.protected() {
            self.load_real_cs(selector, offset)?;
            self.update_modes();
            return Err(Stop::Branch);
        }
        if selector & 0xfffc == 0 {
            return Err(self.gp(0));
        }
        let d = self.descriptor(selector, vector::GP, 0)?;
        let target = if d.s() {
            self.direct_target(selector, d, offset)?
        } else {
            match self.gate_kind(selector, d)? {
                Gate::Call => self.call_gate(selector, d, true)?,
                Gate::Task(tss) => return self.task_jump(tss, self.rip, false),
            }
        };
        self.check_offset(&target)?;
        self.load_cs(&target)?;
        self.update_modes();
        Err(Stop::Branch)
    }

    /// Far CALL; `next` is the return address.
    fn far_call(&mut self, selector: u16, offset: u64, next: u64, width: u64) -> R {
        if !self.protected() {
            let mut stack = self.stack_now(false, 0);
            self.push_on(&mut stack, width, self.segs[seg::CS].selector as u64)?;
            self.push_on(&mut stack, width, next)?;
            self.load_real_cs(selector, offset)?;
            self.regs[4] = stack.sp;
            self.update_modes();
            return Err(Stop::Branch);
        }
        if selector & 0xfffc == 0 {
            return Err(self.gp(0));
        }
        let d = self.descriptor(selector, vector::GP, 0)?;
        if d.s() {
            let target = self.direct_target(selector, d, offset)?;
            let stack = self.stack_now(!self.legacy, 0);
            return self.finish_call(target, stack, width, next);
        }
        match self.gate_kind(selector, d)? {
            Gate::Task(tss) => self.task_jump(tss, next, true),
            Gate::Call => self.call_through_gate(selector, d, next),
        }
    }

    fn finish_call(&mut self, target: Target, mut stack: Stack, width: u64, next: u64) -> R {
        let selector = self.segs[seg::CS].selector as u64;
        self.check_offset(&target)?;
        self.push_on(&mut stack, width, selector)?;
        self.push_on(&mut stack, width, next)?;
        self.load_cs(&target)?;
        self.regs[4] = stack.sp;
        self.update_modes();
        Err(Stop::Branch)
    }

    /// What a system descriptor met by a far JMP or CALL is, its privilege and presence checked.
    fn gate_kind(&mut self, selector: u16, d: Descriptor) -> R<Gate> {
        let error = selector_error(selector);
        let long = self.lma();
        let known = match d.kind() {
            system::CALL32 => true,
            system::CALL16 | system::TASK | system::TSS16 | system::TSS32 => !long,
            _ => false,
        };
        if !known || d.dpl() < self.cpl || d.dpl() < selector as u8 & 3 {
            return Err(self.gp(error));
        }
        if !d.present() {
            return Err(self.raise(vector::NP, Some(error)));
        }
        Ok(match d.kind() {
            system::CALL16 | system::CALL32 => Gate::Call,
            system::TASK => Gate::Task(d.gate_selector()),
            _ => Gate::Task(selector),
        })
    }

    /// The target of a call gate; `jump` may not change the privilege.
    fn call_gate(&mut self, selector: u16, gate: Descriptor, jump: bool) -> R<Target> {
        let high = if self.lma() { self.descriptor_high(selector)? } else { 0 };
        let inner = gate.gate_selector();
        if inner & 0xfffc == 0 {
            return Err(self.gp(0));
        }
        let d = self.descriptor(inner, vector::GP, 0)?;
        let bad = d.dpl() > self.cpl || jump && !d.conforming() && d.dpl() != self.cpl;
        let not_long = self.lma() && !d.l();
        self.code_checks(inner, d, bad || not_long)?;
        let cpl = if d.conforming() { self.cpl } else { d.dpl() };
        Ok(Target { selector: inner, descriptor: d, offset: gate.gate_offset(high & 0xffff_ffff), cpl })
    }

    fn call_through_gate(&mut self, selector: u16, gate: Descriptor, next: u64) -> R {
        let target = self.call_gate(selector, gate, false)?;
        let long = self.lma();
        let width = match (long, gate.kind()) {
            (true, _) => 8,
            (_, system::CALL32) => 4,
            _ => 2,
        };
        if target.cpl == self.cpl {
            let stack = self.stack_now(long, 0);
            return self.finish_call(target, stack, width, next);
        }
        let mut stack = if long {
            let sp = self.tss64(4 + 8 * target.cpl as u64, 0)?;
            Stack { segment: null_segment(target.cpl as u16, target.cpl), sp, long, error: 0 }
        } else {
            self.tss_stack(target.cpl, 0)?
        };
        let count = if long { 0 } else { (gate.0 >> 32) & 0x1f };
        let old = self.stack_now(!self.legacy, 0);
        let mut parameters = [0; 31];
        for index in 0..count {
            parameters[index as usize] = self.peek(&old, index * width, width)?;
        }
        self.check_offset(&target)?;
        let frame = [old.segment.selector as u64, old.sp];
        let back = [self.segs[seg::CS].selector as u64, next];
        self.at_cpl(target.cpl, |cpu| {
            let values = frame.into_iter().chain(parameters[..count as usize].iter().rev().copied()).chain(back);
            values.into_iter().try_for_each(|value| cpu.push_on(&mut stack, width, value))
        })?;
        self.load_cs(&target)?;
        self.segs[seg::SS] = stack.segment;
        self.regs[4] = stack.sp;
        self.update_modes();
        Err(Stop::Branch)
    }

    /// Far RET, releasing `extra` bytes of parameters.
    fn far_return(&mut self, width: u64, extra: u64) -> R {
        let mut stack = self.stack_now(!self.legacy, 0);
        let offset = self.peek(&stack, 0, width)?;
        let selector = self.peek(&stack, width, width)? as u16;
        if !self.protected() {
            self.load_real_cs(selector, offset)?;
            stack.advance(2 * width + extra);
            self.regs[4] = stack.sp;
            self.update_modes();
            return Err(Stop::Branch);
        }
        let target = self.return_target(selector, offset)?;
        if target.cpl == self.cpl {
            self.check_offset(&target)?;
            self.load_cs(&target)?;
            stack.advance(2 * width + extra);
            self.regs[4] = stack.sp;
            self.update_modes();
            return Err(Stop::Branch);
        }
        let sp = self.peek(&stack, 2 * width + extra, width)?;
        let ss = self.peek(&stack, 3 * width + extra, width)? as u16;
        let to_long = self.lma() && target.descriptor.l();
        let segment = self.return_stack(ss, target.cpl, to_long)?;
        self.check_offset(&target)?;
        self.load_cs(&target)?;
        self.segs[seg::SS] = segment;
        self.set_return_sp(sp, to_long);
        let mut outer = self.stack_now(to_long, 0);
        outer.advance(extra);
        self.regs[4] = outer.sp;
        self.drop_inner_segments();
        self.update_modes();
        Err(Stop::Branch)
    }

    /// RSP popped together with SS: a 16-bit stack takes only its low half.
    pub(super) fn set_return_sp(&mut self, sp: u64, to_long: bool) {
        self.regs[4] = match (to_long, self.segs[seg::SS].db) {
            (true, _) => sp,
            (_, true) => sp & 0xffff_ffff,
            _ => self.regs[4] & !0xffff | sp & 0xffff,
        };
    }
}

/// A system descriptor as the target of a far transfer.
enum Gate {
    Call,
    /// The TSS's selector.
    Task(u16),
}

// ---- handlers ---------------------------------------------------------------------------

/// Reads the far pointer of the memory operand: offset of `WIDTH` bytes, then the selector.
fn far_pointer<const WIDTH: u64>(cpu: &mut Cpu, op: &Op) -> R<(u16, u64)> {
    let (linear, segment) = (cpu.lin(op, WIDTH + 2, false)?, op.seg());
    let offset = match WIDTH {
        2 => cpu.rd::<u16>(linear, segment)? as u64,
        4 => cpu.rd::<u32>(linear, segment)? as u64,
        _ => cpu.rd(linear, segment)?,
    };
    Ok((cpu.rd(linear.wrapping_add(WIDTH), segment)?, offset))
}

unsafe fn jump_memory<const WIDTH: u64>(cpu: &mut Cpu, op: &Op) -> R {
    let (selector, offset) = far_pointer::<WIDTH>(cpu, op)?;
    cpu.rip = cpu.next_rip(op);
    cpu.far_jump(selector, offset)
}

unsafe fn call_memory<const WIDTH: u64>(cpu: &mut Cpu, op: &Op) -> R {
    let (selector, offset) = far_pointer::<WIDTH>(cpu, op)?;
    cpu.far_call(selector, offset, cpu.next_rip(op), WIDTH)
}

unsafe fn jump_immediate(cpu: &mut Cpu, op: &Op) -> R {
    cpu.rip = cpu.next_rip(op);
    cpu.far_jump((op.imm >> 32) as u16, op.imm & 0xffff_ffff)
}

unsafe fn call_immediate<const WIDTH: u64>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.far_call((op.imm >> 32) as u16, op.imm & 0xffff_ffff, cpu.next_rip(op), WIDTH)
}

unsafe fn return_far<const WIDTH: u64>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.far_return(WIDTH, op.imm & 0xffff)
}

/// JMP's far forms; `None` when this is a near one.
pub fn bind_jmp_far(b: &mut Binder) -> Option<Handler> {
    match (b.kind(0), b.ins.memory_size()) {
        (Kind::Far, _) => Some(jump_immediate),
        (Kind::Mem, MemorySize::SegPtr16) => Some(jump_memory::<2>),
        (Kind::Mem, MemorySize::SegPtr32) => Some(jump_memory::<4>),
        (Kind::Mem, MemorySize::SegPtr64) => Some(jump_memory::<8>),
        _ => None,
    }
}

/// CALL's far forms; `None` when this is a near one.
pub fn bind_call_far(b: &mut Binder) -> Option<Handler> {
    match (b.ins.code(), b.ins.memory_size()) {
        (Code::Call_ptr1616, _) => Some(call_immediate::<2>),
        (Code::Call_ptr1632, _) => Some(call_immediate::<4>),
        (_, MemorySize::SegPtr16) => Some(call_memory::<2>),
        (_, MemorySize::SegPtr32) => Some(call_memory::<4>),
        (_, MemorySize::SegPtr64) => Some(call_memory::<8>),
        _ => None,
    }
}

fn bind_retf(b: &mut Binder) -> Option<Handler> {
    match b.ins.code() {
        Code::Retfw | Code::Retfw_imm16 => Some(return_far::<2>),
        Code::Retfd | Code::Retfd_imm16 => Some(return_far::<4>),
        _ => Some(return_far::<8>),
    }
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    System "SDM vol. 2B, RET; vol. 3, 5.8" {
        Retf => bind_retf,
    }
};

#[cfg(test)]
mod tests {
    use crate::cpu::fixture::{handler, sel, GDT, RSP0};
    use crate::cpu::state::{seg, CodeSize};
    use crate::cpu::testing::Bench;

    const CODE: u64 = 0x1_0000;
    const POINTER: u64 = 0x2_0000;

    /// A far transfer through a pointer at 0x2_0000: FF /3 (CALL) or FF /5 (JMP).
    fn through_pointer(bench: Bench, jump: bool, offset: u32, selector: u16) -> Bench {
        let mut bench = bench.code(&[0xff, if jump { 0x2c } else { 0x1c }, 0x25, 0, 0, 2, 0]);
        bench.load(POINTER, &offset.to_le_bytes());
        bench.load(POINTER + 4, &selector.to_le_bytes());
        bench
    }

    fn call_gate(bench: &mut Bench, target: u16, offset: u64, dpl: u64, parameters: u64) {
        let low =
            offset & 0xffff | offset >> 16 << 48 | (target as u64) << 16 | parameters << 32 | (0x8c | dpl << 5) << 40;
        bench.load(GDT + 0x60, &low.to_le_bytes());
        bench.load(GDT + 0x68, &[0; 8]);
    }

    #[test]
    fn test_call_gate_in_long_mode_changes_stacks_and_retf_comes_back() {
        let mut bench = through_pointer(Bench::new(1 << 20).long(CODE).user(), false, 0, sel::GATE);
        call_gate(&mut bench, sel::CODE64, 0x3_0000, 3, 0);
        // The gate's handler: retfq.
        bench.load(0x3_0000, &[0x48, 0xcb]);
        bench.cpu.regs[4] = 0x7ff8;
        bench.step();
        assert_eq!((bench.cpu.cpl, bench.cpu.rip, bench.cpu.regs[4]), (0, 0x3_0000, RSP0 - 32));
        assert!(bench.cpu.segs[seg::SS].unusable);
        let frame = bench.quads(RSP0 - 32, 4);
        assert_eq!(frame, [CODE + 7, sel::USER64 as u64, 0x7ff8, sel::USER_DATA as u64]);
        bench.step();
        assert_eq!((bench.cpu.cpl, bench.cpu.rip, bench.cpu.regs[4]), (3, CODE + 7, 0x7ff8));
        assert_eq!(bench.cpu.segs[seg::SS].selector, sel::USER_DATA);
    }

    #[test]
    fn test_call_gate_in_protected_mode_copies_parameters() {
        let code = [0x9a, 0, 0, 0, 0, sel::GATE as u8, 0];
        let mut bench = Bench::new(1 << 20).protected(CODE).user().code(&code);
        call_gate(&mut bench, sel::CODE32, 0x3_0000, 3, 2);
        // retf 8
        bench.load(0x3_0000, &[0xca, 8, 0]);
        bench.cpu.regs[4] = 0x7000;
        bench.load(0x7000, &[0x11, 0, 0, 0, 0x22, 0, 0, 0]);
        bench.step();
        let frame = bench.words(RSP0 - 24, 6);
        assert_eq!(frame, [CODE + 7, sel::USER32 as u64, 0x11, 0x22, 0x7000, sel::USER_DATA as u64]);
        assert_eq!((bench.cpu.cpl, bench.cpu.rip, bench.cpu.regs[4]), (0, 0x3_0000, RSP0 - 24));
        bench.step();
        assert_eq!((bench.cpu.cpl, bench.cpu.rip, bench.cpu.regs[4]), (3, CODE + 7, 0x7008));
    }

    #[test]
    fn test_call_gate_of_another_privilege_is_gp() {
        let mut bench = through_pointer(Bench::new(1 << 20).long(CODE).user(), false, 0, sel::GATE);
        call_gate(&mut bench, sel::CODE64, 0x3_0000, 0, 0);
        bench.step();
        assert_eq!(bench.cpu.rip, handler(13));
        assert_eq!(bench.word(bench.cpu.regs[4]), 0x60);
    }

    #[test]
    fn test_far_jump_checks_name_the_selector() {
        let cases = [(sel::BEYOND, 0x100), (sel::DATA, 0x10), (0, 0), (sel::USER64, 0x28), (sel::LDT, 0x70)];
        for (selector, error) in cases {
            let mut bench = through_pointer(Bench::new(1 << 20).long(CODE), true, 0x3_0000, selector);
            bench.step();
            assert_eq!(bench.cpu.rip, handler(13), "{selector:#x}");
            assert_eq!(bench.word(bench.cpu.regs[4]), error, "{selector:#x}");
        }
    }

    #[test]
    fn test_far_jump_to_compatibility_mode_and_call_to_conforming_code() {
        let mut bench = through_pointer(Bench::new(1 << 20).long(CODE).user(), true, 0x3_0000, sel::CONFORMING);
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.cpl, bench.cpu.code_size), (0x3_0000, 3, CodeSize::B32));
        assert_eq!(bench.cpu.segs[seg::CS].selector, sel::CONFORMING | 3);
    }

    #[test]
    fn test_far_call_whose_push_faults_changes_nothing() {
        let mut bench = through_pointer(Bench::new(1 << 20).protected(CODE), false, 0x3_0000, sel::CODE32)
            .code(&[0xff, 0x1d, 0, 0, 2, 0]);
        bench.cpu.segs[seg::SS].limit = 0x7fff;
        bench.cpu.regs[4] = 0x9000;
        assert!(bench.cpu.step_raw().is_err());
        let fault = bench.cpu.fault;
        assert_eq!((fault.vector, fault.error), (12, Some(0)));
        assert_eq!((bench.cpu.rip, bench.cpu.regs[4]), (CODE, 0x9000));
    }

    #[test]
    fn test_real_mode_far_jump_and_return() {
        let mut bench = Bench::new(1 << 20);
        bench.cpu.load_segment(seg::SS, 0).unwrap();
        bench.cpu.segs[seg::CS].base = 0;
        (bench.cpu.rip, bench.cpu.regs[4]) = (0x100, 0x7000);
        bench.load(0x100, &[0x9a, 0x34, 0x12, 0x00, 0x20]);
        bench.load(0x2_1234, &[0xcb]);
        bench.cpu.segs[seg::CS].selector = 0;
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.segs[seg::CS].base), (0x1234, 0x2_0000));
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.segs[seg::CS].base, bench.cpu.regs[4]), (0x105, 0, 0x7000));
    }
}

//! Entering the handler of an event: IVT, IDT gates, stacks, the saved frame.
//!
//! SDM vol. 3, 6.12 (protected mode), 6.14 (64-bit mode), 22.3 (virtual-8086 mode); vol. 2, INT n
//! for the order of checks. Frames are written to memory as the checks go, but no register changes
//! before the last of them passed, so a fault leaves the state of before.

use super::event::{Event, Source};
use super::mmu::canonical;
use super::segment::{null_segment, selector_error, system, Descriptor};
use super::state::{cr4, rflags, seg, Segment};
use super::{vector, Cpu, R};

/// A stack that is being written: SS and RSP take effect when the caller commits them.
#[derive(Clone, Copy)]
pub struct Stack {
    /// The stack segment.
    pub segment: Segment,
    /// The stack pointer, all 64 bits.
    pub sp: u64,
    /// 64-bit mode: no segmentation.
    pub long: bool,
    /// Error code of #SS when it has no room.
    pub error: u32,
}

impl Stack {
    /// The stack pointer's mask.
    pub fn mask(&self) -> u64 {
        match (self.long, self.segment.db) {
            (true, _) => u64::MAX,
            (_, true) => 0xffff_ffff,
            _ => 0xffff,
        }
    }

    /// Moves the stack pointer within its width.
    pub fn advance(&mut self, bytes: u64) {
        let mask = self.mask();
        let moved = self.sp.wrapping_add(bytes) & mask;
        self.sp = if mask == 0xffff { self.sp & !mask | moved } else { moved };
    }

    /// Whether `size` bytes at `offset` lie within the segment's limit.
    fn in_limit(&self, offset: u64, size: u64) -> bool {
        let last = offset + (size - 1);
        if self.segment.kind & 4 != 0 {
            let top = if self.segment.db { 0xffff_ffff } else { 0xffff };
            return offset > self.segment.limit as u64 && last <= top;
        }
        last <= self.segment.limit as u64
    }
}

/// A code segment to enter.
#[derive(Clone, Copy)]
struct Target {
    selector: u16,
    descriptor: Descriptor,
    offset: u64,
    /// CPL in the handler.
    cpl: u8,
}

impl Cpu {
    /// The present stack.
    pub fn stack_now(&self, long: bool, error: u32) -> Stack {
        Stack { segment: self.segs[seg::SS], sp: self.regs[4], long, error }
    }

    /// The linear address of `size` bytes at the stack pointer plus `above`, checked.
    pub fn stack_linear(&mut self, stack: &Stack, above: u64, size: u64) -> R<u64> {
        let offset = stack.sp.wrapping_add(above) & stack.mask();
        if stack.long {
            if !canonical(offset) || !canonical(offset.wrapping_add(size - 1)) {
                return Err(self.raise(vector::SS, Some(stack.error)));
            }
            return Ok(offset);
        }
        if stack.segment.unusable || !stack.in_limit(offset, size) {
            return Err(self.raise(vector::SS, Some(stack.error)));
        }
        Ok((stack.segment.base + offset) & 0xffff_ffff)
    }

    /// Pushes 2, 4 or 8 bytes; the caller has taken on the privilege of the stack.
    pub fn push_on(&mut self, stack: &mut Stack, width: u64, value: u64) -> R {
        stack.advance(width.wrapping_neg());
        let linear = self.stack_linear(stack, 0, width)?;
        match width {
            2 => self.wr(linear, value as u16, seg::SS),
            4 => self.wr(linear, value as u32, seg::SS),
            _ => self.wr(linear, value, seg::SS),
        }
    }

    /// Runs `body` with the memory rights of privilege `cpl`.
    pub fn at_cpl<T>(&mut self, cpl: u8, body: impl FnOnce(&mut Self) -> T) -> T {
        let before = self.cpl;
        self.cpl = cpl;
        self.update_mmu_mode();
        let result = body(self);
        self.cpl = before;
        self.update_mmu_mode();
        result
    }

    /// Enters the handler of an event.
    pub(super) fn enter_handler(&mut self, event: Event) -> R {
        if self.lma() {
            return self.enter_long(event);
        }
        if self.cr0 & super::state::cr0::PE != 0 {
            return self.enter_protected(event);
        }
        self.enter_real(event, self.idtr.base, self.rflags() as u16)?;
        self.sys_flags &= !((rflags::IF | rflags::TF | rflags::AC | rflags::RF) as u32);
        self.update_modes();
        Ok(())
    }

    /// Through the interrupt vector table at `table`, with `image` as the saved flags.
    pub(super) fn enter_real(&mut self, event: Event, table: u64, image: u16) -> R {
        let at = event.vector as u64 * 4;
        if !self.vm86() && at + 3 > self.idtr.limit as u64 {
            return Err(self.gp(0));
        }
        let entry: u32 = self.rd_system(self.table_linear(table, at))?;
        let mut stack = self.stack_now(false, 0);
        for value in [image as u64, self.segs[seg::CS].selector as u64, self.rip & 0xffff] {
            self.push_on(&mut stack, 2, value)?;
        }
        self.regs[4] = stack.sp;
        let selector = (entry >> 16) as u16;
        self.segs[seg::CS].selector = selector;
        self.segs[seg::CS].base = (selector as u64) << 4;
        self.rip = entry as u64 & 0xffff;
        self.update_modes();
        Ok(())
    }

    /// #GP with the error code of an IDT entry.
    fn gate_fault(&mut self, vector: u8, event: &Event) -> super::Stop {
        self.raise(vector, Some(event.vector as u32 * 8 + 2 + event.ext()))
    }

    /// Reads and checks a gate of `size` bytes.
    fn gate(&mut self, event: &Event, size: u64) -> R<(Descriptor, u64)> {
        let at = event.vector as u64 * size;
        if at + size - 1 > self.idtr.limit as u64 {
            return Err(self.gate_fault(vector::GP, event));
        }
        let linear = self.table_linear(self.idtr.base, at);
        let gate = Descriptor(self.rd_system(linear)?);
        let high = if size == 16 { self.rd_system(linear.wrapping_add(8))? } else { 0 };
        let known = match gate.kind() {
            system::INT32 | system::TRAP32 => true,
            system::INT16 | system::TRAP16 | system::TASK => size == 8,
            _ => false,
        };
        let private = event.software() && gate.dpl() < self.cpl;
        if gate.s() || !known || private {
            return Err(self.gate_fault(vector::GP, event));
        }
        if !gate.present() {
            return Err(self.gate_fault(vector::NP, event));
        }
        Ok((gate, high))
    }

    /// The checked code segment of a gate.
    fn gate_target(&mut self, gate: Descriptor, high: u64, ext: u32) -> R<Target> {
        let selector = gate.gate_selector();
        if selector & 0xfffc == 0 {
            return Err(self.gp(ext));
        }
        let error = selector_error(selector) | ext;
        let d = self.descriptor(selector, vector::GP, ext)?;
        let not_long = self.lma() && (!d.l() || d.db());
        if !d.code() || d.dpl() > self.cpl || not_long {
            return Err(self.gp(error));
        }
        if !d.present() {
            return Err(self.raise(vector::NP, Some(error)));
        }
        let cpl = if d.conforming() { self.cpl } else { d.dpl() };
        if self.vm86() && cpl != 0 {
            return Err(self.gp(error));
        }
        Ok(Target { selector, descriptor: d, offset: gate.gate_offset(high), cpl })
    }

    /// RFLAGS as the frame saves it.
    fn saved_flags(&self, event: &Event) -> u64 {
        self.rflags() | if event.sets_rf() { rflags::RF } else { 0 }
    }

    /// Takes over the handler's code segment, privilege and flags.
    fn commit(&mut self, target: Target, interrupt_gate: bool) -> R {
        self.mark_accessed(target.selector, target.descriptor)?;
        self.segs[seg::CS] = target.descriptor.segment(target.selector & !3 | target.cpl as u16);
        self.cpl = target.cpl;
        self.rip = target.offset;
        let clear = rflags::TF | rflags::NT | rflags::RF | rflags::VM | if interrupt_gate { rflags::IF } else { 0 };
        self.sys_flags &= !(clear as u32);
        Ok(())
    }

    fn enter_long(&mut self, event: Event) -> R {
        let ext = event.ext();
        let (gate, high) = self.gate(&event, 16)?;
        let target = self.gate_target(gate, high & 0xffff_ffff, ext)?;
        let ist = (gate.0 >> 32) & 7;
        let inner = target.cpl != self.cpl;
        let sp = match (ist, inner) {
            (0, false) => self.regs[4],
            (0, true) => self.tss64(4 + 8 * target.cpl as u64, ext)?,
            _ => self.tss64(0x1c + 8 * ist, ext)?,
        };
        let segment = if inner { null_segment(target.cpl as u16, target.cpl) } else { self.segs[seg::SS] };
        let mut stack = Stack { segment, sp: sp & !15, long: true, error: ext };
        if !canonical(target.offset) {
            return Err(self.gp(ext));
        }
        let frame = [
            self.segs[seg::SS].selector as u64,
            self.regs[4],
            self.saved_flags(&event),
            self.segs[seg::CS].selector as u64,
            self.rip,
        ];
        self.at_cpl(target.cpl, |cpu| {
            frame.into_iter().try_for_each(|value| cpu.push_on(&mut stack, 8, value))?;
            event.error.map_or(Ok(()), |error| cpu.push_on(&mut stack, 8, error as u64))
        })?;
        self.commit(target, gate.kind() == system::INT32)?;
        self.segs[seg::SS] = stack.segment;
        self.regs[4] = stack.sp;
        self.update_modes();
        Ok(())
    }

    /// A stack pointer of the 64-bit TSS.
    pub fn tss64(&mut self, offset: u64, ext: u32) -> R<u64> {
        if offset + 7 > self.tr.limit as u64 {
            return Err(self.raise(vector::TS, Some(selector_error(self.tr.selector) | ext)));
        }
        self.rd_system(self.table_linear(self.tr.base, offset))
    }

    /// SS and ESP for privilege `cpl` from a 16- or 32-bit TSS, checked. SDM vol. 2, CALL, INT n.
    pub fn tss_stack(&mut self, cpl: u8, ext: u32) -> R<Stack> {
        let wide = self.tr.kind & 8 != 0;
        let (at, size) = if wide { (4 + 8 * cpl as u64, 6) } else { (2 + 4 * cpl as u64, 4) };
        if at + size - 1 > self.tr.limit as u64 {
            return Err(self.raise(vector::TS, Some(selector_error(self.tr.selector) | ext)));
        }
        let linear = self.table_linear(self.tr.base, at);
        let (sp, selector) = if wide {
            (self.rd_system::<u32>(linear)? as u64, self.rd_system::<u16>(self.table_linear(linear, 4))?)
        } else {
            (self.rd_system::<u16>(linear)? as u64, self.rd_system::<u16>(self.table_linear(linear, 2))?)
        };
        if selector & 0xfffc == 0 {
            return Err(self.raise(vector::TS, Some(ext)));
        }
        let segment = self.stack_descriptor(selector, cpl, vector::TS, ext)?;
        Ok(Stack { segment, sp, long: false, error: selector_error(selector) | ext })
    }

    fn enter_protected(&mut self, event: Event) -> R {
        if self.vm86() && event.source == Source::IntN && self.vm86_interrupt(event)? {
            return Ok(());
        }
        let ext = event.ext();
        let (gate, _) = self.gate(&event, 8)?;
        if gate.kind() == system::TASK {
            return self.task_gate(gate.gate_selector(), event);
        }
        let target = self.gate_target(gate, 0, ext)?;
        let width = if gate.kind() & 8 != 0 { 4 } else { 2 };
        let inner = target.cpl != self.cpl;
        let mut stack = if inner { self.tss_stack(target.cpl, ext)? } else { self.stack_now(false, ext) };
        if target.offset > target.descriptor.limit() as u64 {
            return Err(self.gp(ext));
        }
        let vm86 = self.vm86();
        let flags = self.saved_flags(&event);
        self.at_cpl(target.cpl, |cpu| {
            cpu.push_frame(&mut stack, width, flags, inner, vm86)?;
            event.error.map_or(Ok(()), |error| cpu.push_on(&mut stack, width, error as u64))
        })?;
        self.commit(target, gate.kind() & 1 == 0)?;
        if vm86 {
            for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
                self.segs[index] = null_segment(0, 0);
            }
        }
        if inner {
            self.segs[seg::SS] = stack.segment;
        }
        self.regs[4] = stack.sp;
        self.update_modes();
        Ok(())
    }

    fn push_frame(&mut self, stack: &mut Stack, width: u64, flags: u64, inner: bool, vm86: bool) -> R {
        let selector = |cpu: &Self, index: usize| cpu.segs[index].selector as u64;
        if vm86 {
            for index in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.push_on(stack, width, selector(self, index))?;
            }
        }
        if inner {
            self.push_on(stack, width, selector(self, seg::SS))?;
            self.push_on(stack, width, self.regs[4])?;
        }
        for value in [flags, selector(self, seg::CS), self.rip] {
            self.push_on(stack, width, value)?;
        }
        Ok(())
    }

    /// INT n in virtual-8086 mode: `true` when it went to the 8086 program's own handler, which
    /// CR4.VME's redirection bitmap asks for. SDM vol. 3, 22.3.3.
    fn vm86_interrupt(&mut self, event: Event) -> R<bool> {
        let redirected = self.cr4 & cr4::VME != 0 && !self.intercepted(event.vector)?;
        if !redirected {
            return if self.iopl() < 3 { Err(self.gp(0)) } else { Ok(false) };
        }
        let mut image = self.rflags();
        let mut clear = rflags::TF | rflags::RF | rflags::IF;
        if self.iopl() < 3 {
            let vif = image & rflags::VIF != 0;
            image = image & !rflags::IF | rflags::IOPL | if vif { rflags::IF } else { 0 };
            clear = rflags::TF | rflags::RF | rflags::VIF;
        }
        self.enter_real(event, 0, image as u16)?;
        self.sys_flags &= !(clear as u32);
        Ok(true)
    }

    /// The vector's bit in the TSS's interrupt redirection bitmap.
    fn intercepted(&mut self, vector: u8) -> R<bool> {
        if self.tr.limit < 0x67 {
            return Err(self.gp(0));
        }
        let map: u16 = self.rd_system(self.table_linear(self.tr.base, 0x66))?;
        let at = (map as u64).wrapping_sub(32) + vector as u64 / 8;
        if at > self.tr.limit as u64 {
            return Err(self.gp(0));
        }
        let byte: u8 = self.rd_system(self.table_linear(self.tr.base, at))?;
        Ok(byte >> (vector & 7) & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use crate::cpu::fixture::{handler, sel, IST1, RSP0};
    use crate::cpu::run::RunEnd;
    use crate::cpu::segment::system;
    use crate::cpu::state::{rflags, seg, DescriptorTable};
    use crate::cpu::testing::Bench;
    use crate::cpu::Exit;

    const CODE: u64 = 0x1_0000;

    fn long() -> Bench {
        Bench::new(1 << 20).long(CODE)
    }

    #[test]
    fn test_int3_from_user_enters_on_the_tss_stack_with_the_next_rip() {
        let mut bench = long().user().code(&[0xcc]);
        bench.cpu.regs[4] = 0x7ff3;
        bench.cpu.set_rflags(rflags::IF | 0x893);
        bench.step();
        let frame = bench.quads(RSP0 - 40, 5);
        let flags = rflags::IF | 0x893;
        assert_eq!(frame, [CODE + 1, sel::USER64 as u64, flags, 0x7ff3, sel::USER_DATA as u64]);
        assert_eq!((bench.cpu.rip, bench.cpu.cpl), (handler(3), 0));
        assert_eq!(bench.cpu.regs[4], RSP0 - 40);
        assert_eq!(bench.cpu.sys_flags as u64 & rflags::IF, 0);
        let ss = bench.cpu.segs[seg::SS];
        assert!(ss.unusable && ss.selector == 0 && ss.dpl == 0);
    }

    #[test]
    fn test_exception_in_the_kernel_aligns_the_stack_and_keeps_ss() {
        let mut bench = long().code(&[0x0f, 0x0b]);
        bench.cpu.regs[4] = 0x7ff9;
        bench.step();
        assert_eq!(bench.cpu.rip, handler(6));
        assert_eq!(bench.cpu.regs[4], 0x7ff0 - 40);
        assert_eq!(bench.word(0x7ff0 - 40), CODE);
        assert_eq!(bench.word(0x7ff0 - 24) & rflags::RF, rflags::RF);
        assert_eq!(bench.cpu.segs[seg::SS].selector, sel::DATA);
    }

    #[test]
    fn test_page_fault_through_ist_sets_cr2_and_error_code() {
        // mov [0x4000_0000], al: beyond the mapped gigabyte
        let mut bench = long().user().code(&[0x88, 0x04, 0x25, 0, 0, 0, 0x40]);
        bench.gate(14, system::INT32, 0, 1);
        bench.step();
        assert_eq!(bench.cpu.cr2, 0x4000_0000);
        assert_eq!(bench.cpu.rip, handler(14));
        assert_eq!(bench.quads(IST1 - 48, 2), [6, CODE]);
    }

    #[test]
    fn test_int_n_through_a_private_gate_is_gp_with_the_idt_bit() {
        let mut bench = long().user().code(&[0xcd, 0x21]);
        bench.step();
        assert_eq!(bench.cpu.rip, handler(13));
        assert_eq!(bench.quads(RSP0 - 48, 2), [0x21 * 8 + 2, CODE]);
    }

    #[test]
    fn test_contributory_fault_in_delivery_is_a_double_fault() {
        let mut bench = long().user().code(&[0xcd, 0x21]);
        bench.no_gate(13);
        bench.step();
        assert_eq!(bench.cpu.rip, handler(8));
        assert_eq!(bench.quads(RSP0 - 48, 2), [0, CODE]);
    }

    #[test]
    fn test_fault_in_double_fault_delivery_shuts_down() {
        let mut bench = long().user().code(&[0xcd, 0x21]);
        bench.cpu.idtr = DescriptorTable { base: 0x5000, limit: 0 };
        assert_eq!(bench.cpu.step(), Some(RunEnd::Exit(Exit::Shutdown)));
    }

    #[test]
    fn test_external_interrupt_with_absent_gate_sets_ext() {
        let mut bench = long();
        bench.no_gate(0x22);
        assert_eq!(bench.cpu.deliver_interrupt(0x22), Ok(()));
        assert_eq!(bench.cpu.rip, handler(13));
        assert_eq!(bench.word(bench.cpu.regs[4]), 0x22 * 8 + 3);
    }

    #[test]
    fn test_legacy_inner_interrupt_pushes_the_outer_stack() {
        let mut bench = Bench::new(1 << 20).protected(CODE).user().code(&[0xcd, 0x20]);
        bench.cpu.regs[4] = 0x7000;
        bench.step();
        let frame = bench.words(RSP0 - 20, 5);
        assert_eq!(frame, [CODE + 2, sel::USER32 as u64, 2, 0x7000, sel::USER_DATA as u64]);
        assert_eq!((bench.cpu.rip, bench.cpu.cpl), (handler(0x20), 0));
        assert_eq!(bench.cpu.segs[seg::SS].selector, sel::DATA);
    }

    #[test]
    fn test_legacy_inner_interrupt_with_bad_stack_selector_is_ts() {
        let mut bench = Bench::new(1 << 20).protected(CODE).user().code(&[0xcd, 0x20]);
        bench.load(0x6008, &sel::USER_DATA.to_le_bytes());
        // The #TS needs that stack too: #DF, and that again: shutdown.
        assert_eq!(bench.cpu.step(), Some(RunEnd::Exit(Exit::Shutdown)));
    }

    #[test]
    fn test_real_mode_interrupt_pushes_three_words() {
        let mut bench = Bench::new(1 << 20);
        bench.cpu.load_segment(seg::SS, 0).unwrap();
        bench.cpu.segs[seg::CS].base = 0x1_0000;
        bench.cpu.segs[seg::CS].selector = 0x1000;
        (bench.cpu.rip, bench.cpu.regs[4]) = (0x10, 0x7000);
        bench.cpu.sys_flags = rflags::IF as u32;
        bench.load(0x1_0010, &[0xcd, 0x40]);
        bench.load(0x40 * 4, &[0x34, 0x12, 0x00, 0x20]);
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.segs[seg::CS].base), (0x1234, 0x2_0000));
        assert_eq!(bench.word(0x6ffa) & 0xffff_ffff_ffff, 0x0202_1000_0012);
        assert_eq!(bench.cpu.sys_flags as u64 & rflags::IF, 0);
    }
}

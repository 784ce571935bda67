//! Hardware task switches: far JMP and CALL to a TSS or task gate, events through task gates,
//! IRET with NT. SDM vol. 3, 7; not in long mode.
//!
//! Up to the point of no return a fault belongs to the old task. Afterwards the new task's
//! registers are in place, and what is wrong with its segments is delivered there as #TS, #NP or
//! #SS before its first instruction.

use super::debug::dr6;
use super::event::Event;
use super::segment::{null_segment, selector_error, system, vm86_segment, Descriptor};
use super::state::{cr0, rflags, seg, Segment};
use super::{vector, Cpu, Stop, R};

/// Why tasks are switched.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reason {
    Jump,
    /// CALL, or an event: the new task links back to the old one.
    Nested,
    Return,
}

/// What a TSS holds of a task, in the order of the 32-bit format's fields.
struct Image {
    cr3: u32,
    eip: u32,
    eflags: u32,
    regs: [u32; 8],
    /// ES CS SS DS FS GS.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Cpu {
    /// An event through a task gate; `selector` is the TSS's.
    pub(super) fn task_gate(&mut self, selector: u16, event: Event) -> R {
        let (d, wide) = self.new_task(selector, Reason::Nested, event.ext())?;
        if !self.switch_task(selector, d, self.rip, Reason::Nested)? {
            return Ok(());
        }
        let Some(error) = event.error else { return Ok(()) };
        let mut stack = self.stack_now(false, event.ext());
        match self.push_on(&mut stack, if wide { 4 } else { 2 }, error as u64) {
            Ok(()) => {
                self.regs[4] = stack.sp;
                Ok(())
            }
            Err(_) => self.deliver_fault(),
        }
    }

    /// A far JMP or CALL to a TSS; `next` is the old task's RIP.
    pub(super) fn task_jump(&mut self, selector: u16, next: u64, call: bool) -> R {
        let reason = if call { Reason::Nested } else { Reason::Jump };
        let (d, _) = self.new_task(selector, reason, 0)?;
        self.switch_task(selector, d, next, reason)?;
        Err(Stop::Branch)
    }

    /// IRET with NT set: back to the task the TSS links to; `next` is this task's RIP.
    pub(super) fn task_return(&mut self, next: u64) -> R {
        let link: u16 = self.rd_system(self.table_linear(self.tr.base, 0))?;
        let (d, _) = self.new_task(link, Reason::Return, 0)?;
        self.switch_task(link, d, next, Reason::Return)?;
        Err(Stop::Branch)
    }

    /// Checks the descriptor of the TSS to switch to; tells whether it is a 32-bit one.
    fn new_task(&mut self, selector: u16, reason: Reason, ext: u32) -> R<(Descriptor, bool)> {
        let error = Some(selector_error(selector) | ext);
        let wrong = if reason == Reason::Return { vector::TS } else { vector::GP };
        if selector & 4 != 0 || selector & 0xfffc == 0 {
            return Err(self.raise(wrong, error));
        }
        let d = self.descriptor(selector, wrong, ext)?;
        let busy = reason == Reason::Return;
        let kind = d.kind() & !system::BUSY;
        let fits = !d.s() && matches!(kind, system::TSS16 | system::TSS32) && (d.kind() & system::BUSY != 0) == busy;
        if !fits {
            return Err(self.raise(wrong, error));
        }
        if !d.present() {
            return Err(self.raise(vector::NP, error));
        }
        let wide = kind == system::TSS32;
        if d.limit() < if wide { 0x67 } else { 0x2b } {
            return Err(self.raise(vector::TS, error));
        }
        Ok((d, wide))
    }

    /// Switches; `false` when a fault in the new task was delivered there.
    fn switch_task(&mut self, selector: u16, d: Descriptor, next: u64, reason: Reason) -> R<bool> {
        let wide = d.kind() & 8 != 0;
        let image = self.read_task(d.base(), wide)?;
        self.save_task(next, reason)?;
        let old = self.tr.selector;
        if reason == Reason::Nested {
            self.as_supervisor(|cpu| cpu.wr(cpu.table_linear(d.base(), 0), old, seg::DS))?;
        } else {
            self.change_descriptor_type(old, 0, system::BUSY)?;
        }
        if reason != Reason::Return {
            self.change_descriptor_type(selector, system::BUSY, 0)?;
        }
        // The point of no return.
        self.tr = d.segment(selector);
        self.tr.kind = d.kind() | system::BUSY;
        self.cr0 |= cr0::TS;
        match self.load_task(&image, wide, reason) {
            Ok(()) if image.trap => {
                let _ = self.debug_exception(dr6::BT);
                self.deliver_fault()?;
                Ok(false)
            }
            Ok(()) => Ok(true),
            Err(Stop::Fault) => {
                self.update_modes();
                self.deliver_fault()?;
                Ok(false)
            }
            Err(stop) => Err(stop),
        }
    }

    fn rd_task(&mut self, base: u64, offset: u64, wide: bool) -> R<u32> {
        let linear = self.table_linear(base, offset);
        if wide {
            self.rd_system(linear)
        } else {
            self.rd_system::<u16>(linear).map(|value| value as u32)
        }
    }

    fn read_task(&mut self, base: u64, wide: bool) -> R<Image> {
        let (size, first) = if wide { (4, 0x20) } else { (2, 0x0e) };
        let mut fields = [0; 17];
        // A 16-bit TSS has no FS and GS; its LDT selector follows DS.
        let count = if wide { 17 } else { 15 };
        for (index, field) in fields[..count].iter_mut().enumerate() {
            *field = self.rd_task(base, first + size * index as u64, wide)?;
        }
        let cr3 = if wide { self.rd_task(base, 0x1c, true)? } else { 0 };
        let trap = wide && self.rd_task(base, 0x64, true)? & 1 != 0;
        let word = |index: usize| fields[index] as u16;
        let (fs, gs, ldt) = if wide { (word(14), word(15), word(16)) } else { (0, 0, word(14)) };
        let mut regs = [0; 8];
        regs.copy_from_slice(&fields[2..10]);
        let selectors = [word(10), word(11), word(12), word(13), fs, gs];
        Ok(Image { cr3, eip: fields[0], eflags: fields[1], regs, selectors, ldt, trap })
    }

    /// Writes the old task's registers into its TSS; all of it must be writable first.
    fn save_task(&mut self, next: u64, reason: Reason) -> R {
        let wide = self.tr.kind & 8 != 0;
        let base = self.tr.base;
        let (size, first, count) = if wide { (4, 0x20, 16) } else { (2, 0x0e, 14) };
        let mut flags = self.rflags();
        if reason == Reason::Return {
            flags &= !rflags::NT;
        }
        let mut fields = [0; 16];
        (fields[0], fields[1]) = (next, flags);
        fields[2..10].copy_from_slice(&self.regs[..8]);
        for index in 0..6 {
            fields[10 + index] = self.segs[index].selector as u64;
        }
        let linear = self.table_linear(base, first);
        self.as_supervisor(|cpu| {
            cpu.probe_write(linear, size * count as u64, seg::DS)?;
            for (index, &value) in fields[..count].iter().enumerate() {
                let at = cpu.table_linear(linear, size * index as u64);
                if wide {
                    cpu.wr(at, value as u32, seg::DS)?;
                } else {
                    cpu.wr(at, value as u16, seg::DS)?;
                }
            }
            Ok(())
        })
    }

    /// Takes on the new task's state. An `Err(Fault)` is the new task's.
    fn load_task(&mut self, image: &Image, wide: bool, reason: Reason) -> R {
        if wide && self.paging() && image.cr3 as u64 != self.cr3 {
            self.cr3 = image.cr3 as u64;
            let _ = self.load_pdptrs();
            self.cr3_loaded(false);
        }
        for (register, value) in self.regs[..8].iter_mut().zip(image.regs) {
            *register = if wide { value as u64 } else { *register & 0xffff_0000 | value as u64 };
        }
        self.rip = image.eip as u64;
        let nested = if reason == Reason::Nested { rflags::NT } else { 0 };
        let keep = if wide { 0 } else { self.rflags() & 0xffff_0000 & !rflags::VM };
        self.set_rflags(image.eflags as u64 | nested | keep);
        for (segment, &selector) in self.segs.iter_mut().zip(&image.selectors) {
            *segment = null_segment(selector, 0);
        }
        self.cpl = image.selectors[seg::CS] as u8 & 3;
        self.ldtr = null_segment(image.ldt, 0);
        self.update_modes();
        self.load_task_ldt(image.ldt)?;
        if self.vm86() {
            self.cpl = 3;
            for (index, &selector) in image.selectors.iter().enumerate() {
                self.segs[index] = vm86_segment(selector);
            }
            self.update_modes();
            return Ok(());
        }
        self.load_task_segments(&image.selectors)?;
        self.update_modes();
        if self.rip > self.segs[seg::CS].limit as u64 {
            return Err(self.gp(0));
        }
        Ok(())
    }

    fn load_task_ldt(&mut self, selector: u16) -> R {
        if selector & 0xfffc == 0 {
            return Ok(());
        }
        let error = Some(selector_error(selector));
        if selector & 4 != 0 {
            return Err(self.raise(vector::TS, error));
        }
        let d = self.descriptor(selector, vector::TS, 0)?;
        if d.s() || d.kind() != system::LDT || !d.present() {
            return Err(self.raise(vector::TS, error));
        }
        self.ldtr = d.segment(selector);
        Ok(())
    }

    /// CS, SS and the data segments. SDM vol. 3, table 7-1.
    fn load_task_segments(&mut self, selectors: &[u16; 6]) -> R {
        let cs = selectors[seg::CS];
        self.segs[seg::CS] = self.task_segment(cs, seg::CS)?;
        let ss = selectors[seg::SS];
        self.segs[seg::SS] = match ss & 0xfffc {
            0 => return Err(self.raise(vector::TS, Some(0))),
            _ => self.stack_descriptor(ss, self.cpl, vector::TS, 0)?,
        };
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            if selectors[index] & 0xfffc != 0 {
                self.segs[index] = self.task_segment(selectors[index], index)?;
            }
        }
        Ok(())
    }

    fn task_segment(&mut self, selector: u16, index: usize) -> R<Segment> {
        let error = Some(selector_error(selector));
        if selector & 0xfffc == 0 {
            return Err(self.raise(vector::TS, error));
        }
        let d = self.descriptor(selector, vector::TS, 0)?;
        let rpl = selector as u8 & 3;
        let fits = match (index, d.conforming()) {
            (seg::CS, true) => d.dpl() <= rpl,
            (seg::CS, false) => d.code() && d.dpl() == rpl,
            (_, true) => d.readable(),
            _ => d.readable() && d.dpl() >= self.cpl.max(rpl),
        };
        if !fits {
            return Err(self.raise(vector::TS, error));
        }
        if !d.present() {
            return Err(self.raise(vector::NP, error));
        }
        self.mark_accessed(selector, d)?;
        Ok(d.segment(selector))
    }
}

#[cfg(test)]
mod tests {
    use crate::cpu::fixture::{sel, GDT, TSS2};
    use crate::cpu::state::{cr0, rflags, seg};
    use crate::cpu::testing::Bench;

    const CODE: u64 = 0x1_0000;

    /// A second task that executes IRET at 0x3_0000.
    fn bench(code: &[u8], ss: u16) -> Bench {
        let mut bench = Bench::new(1 << 20).protected(CODE).code(code);
        let mut fields = [0u32; 26];
        (fields[8], fields[9], fields[14], fields[10]) = (0x3_0000, 2, 0x7800, 0xabc);
        for (index, selector) in [sel::DATA, sel::CODE32, ss, sel::DATA, 0, 0].into_iter().enumerate() {
            fields[18 + index] = selector as u32;
        }
        for (index, field) in fields.into_iter().enumerate() {
            bench.load(TSS2 + 4 * index as u64, &field.to_le_bytes());
        }
        bench.load(0x3_0000, &[0xcf]);
        bench
    }

    #[test]
    fn test_call_to_a_tss_and_iret_back() {
        // lcall TSS2:0
        let mut bench = bench(&[0x9a, 0, 0, 0, 0, sel::TSS2 as u8, 0], sel::DATA);
        bench.cpu.regs[0] = 0x1234;
        bench.step();
        let cpu = &bench.cpu;
        assert_eq!((cpu.rip, cpu.regs[0], cpu.regs[4], cpu.tr.selector), (0x3_0000, 0xabc, 0x7800, sel::TSS2));
        assert!(cpu.cr0 & cr0::TS != 0 && cpu.sys_flags as u64 & rflags::NT != 0);
        assert!(cpu.segs[seg::FS].unusable && !cpu.segs[seg::DS].unusable);
        assert_eq!(bench.words(TSS2, 1), [sel::TSS as u64]);
        bench.step();
        let cpu = &bench.cpu;
        assert_eq!((cpu.rip, cpu.regs[0], cpu.tr.selector), (CODE + 7, 0x1234, sel::TSS));
        assert_eq!(cpu.sys_flags as u64 & rflags::NT, 0);
        assert_eq!(bench.word(GDT + sel::TSS2 as u64 + 5) & 0xff, 0x89);
    }

    #[test]
    fn test_jump_to_a_task_with_a_bad_stack_faults_in_the_new_task() {
        let mut bench = bench(&[0xea, 0, 0, 0, 0, sel::TSS2 as u8, 0], sel::READ_ONLY);
        // A stack for the handler: the null SS of the failed load cannot take the frame.
        let end = bench.cpu.step();
        assert_eq!(bench.cpu.tr.selector, sel::TSS2);
        assert!(end.is_some());
    }

    #[test]
    fn test_task_gate_pushes_the_error_code_on_the_new_stack() {
        // mov ds, [BEYOND]: #GP through a task gate
        let mut bench = bench(&[0xb8, 0, 1, 0, 0, 0x8e, 0xd8], sel::DATA);
        bench.gate(13, 5, 0, 0);
        bench.load(0x5000 + 13 * 8 + 2, &sel::TSS2.to_le_bytes());
        bench.step();
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.regs[4]), (0x3_0000, 0x77fc));
        assert_eq!(bench.words(0x77fc, 1), [0x100]);
    }
}

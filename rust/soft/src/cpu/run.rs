//! The main loop: blocks one after the other, and between them whatever wants attention.

use super::block::{Block, Link};
use super::op::Op;
use super::state::{rflags, CodeSize};
use super::{attention, Cpu, Exit, Stop, R};
use std::sync::atomic::Ordering::*;

/// Why [`Cpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// User space must see this.
    Exit(Exit),
    /// HLT: nothing to do until an event.
    Halted,
    /// An application processor before its SIPI.
    WaitSipi,
    /// [`attention::KICK`] was raised.
    Kicked,
}

impl Cpu {
    /// Runs until something is for user space. The caller has completed the previous exit.
    pub fn run(&mut self) -> RunEnd {
        let mut single = self.io.in_progress();
        loop {
            let bits = self.shared.attention.load(Relaxed);
            if bits != 0 || self.halted || self.wait_sipi || self.pending_any() {
                match self.attend(bits, &mut single) {
                    Ok(()) => {}
                    Err(end) => return end,
                }
            }
            let result = if single { self.step_raw() } else { self.run_code() };
            if let Err(stop) = result {
                if let Some(end) = self.settle(stop) {
                    return end;
                }
            }
            if single {
                self.io.retire();
                single = false;
            }
        }
    }

    /// Shows others what this vCPU did.
    pub(crate) fn publish_counters(&mut self) {
        let done = &mut self.counters;
        (done.instructions, done.blocks) = (self.retired, self.blocks.decoded);
        if let Some(translator) = &mut self.translator {
            translator.stats.count(done);
            translator.seen = *done;
        }
        self.shared.counters.set(done);
    }

    pub(super) fn pending_any(&self) -> bool {
        self.pending.exception.is_some() || self.pending.interrupt.is_some() || self.pending.nmi
    }

    /// Acts on a stop that is not a mere change of RIP. RIP is settled already.
    pub(super) fn settle(&mut self, stop: Stop) -> Option<RunEnd> {
        match stop {
            Stop::Fault => {
                self.io.retire();
                match self.deliver_fault() {
                    Ok(()) => None,
                    Err(_) => Some(self.take_delivery_exit()),
                }
            }
            Stop::Exit | Stop::ExitAfter => Some(self.take_exit()),
            Stop::Branch | Stop::Again | Stop::Leave => None,
        }
    }

    /// An exit from the delivery of an event. One that waits for user space to answer a read cannot be resumed: what
    /// would be executed again is the instruction, not the delivery. KVM gives up there, too.
    fn take_delivery_exit(&mut self) -> RunEnd {
        if let Some(Exit::Io { write: None, .. } | Exit::Mmio { write: None, .. }) = self.exit {
            self.exit = Some(Exit::Internal("the delivery of an event read an address that is not RAM"));
        }
        self.take_exit()
    }

    fn take_exit(&mut self) -> RunEnd {
        // Writes that were posted before this exit must be seen first: the instruction is executed
        // again after them.
        if let Some(write) = self.io.queue.pop_front() {
            self.exit = None;
            return RunEnd::Exit(write);
        }
        RunEnd::Exit(self.exit.take().unwrap_or(Exit::Internal("exit without a reason")))
    }

    /// Handles what is pending between instructions. `single` is set when just one instruction
    /// may run before looking again.
    #[inline(never)]
    pub(super) fn attend(&mut self, bits: u32, single: &mut bool) -> Result<(), RunEnd> {
        self.publish_counters();
        if bits & attention::SLOTS != 0 {
            self.take_slots();
        }
        if bits & attention::WRITES != 0 {
            self.forget_code_pages();
            self.flush_writes();
            // Cleared last: whoever raised it takes that for "done".
            self.shared.attention.fetch_and(!attention::WRITES, SeqCst);
        }
        if bits & attention::CODE != 0 {
            self.shared.attention.fetch_and(!attention::CODE, SeqCst);
            self.forget_returns();
        }
        if bits & attention::QUEUED != 0 {
            if let Some(write) = self.io.queue.pop_front() {
                return Err(RunEnd::Exit(write));
            }
            self.shared.attention.fetch_and(!attention::QUEUED, SeqCst);
        }
        if bits & attention::KICK != 0 {
            return Err(RunEnd::Kicked);
        }
        if *single {
            return Ok(());
        }
        if self.shadow != 0 {
            *single = true;
            return Ok(());
        }
        self.events(bits)?;
        if self.wait_sipi {
            return Err(RunEnd::WaitSipi);
        }
        if self.halted {
            return Err(if self.board.has_irqchip() { RunEnd::Halted } else { RunEnd::Exit(Exit::Hlt) });
        }
        if bits & attention::SINGLE != 0 {
            if self.single_step_wanted() {
                *single = true;
            } else {
                self.shared.attention.fetch_and(!attention::SINGLE, SeqCst);
            }
        }
        Ok(())
    }

    /// Takes the slot map that `vm.rs` published.
    pub fn take_slots(&mut self) {
        // The bit is cleared under the lock the map is published under: the publisher takes a clear
        // bit for "taken", and a map published from here on raises it again.
        if let Ok(mut published) = self.shared.clone().new_slots.lock() {
            let new = published.take();
            if let Some(slots) = new {
                self.set_slots(slots);
            }
            self.shared.attention.fetch_and(!attention::SLOTS, SeqCst);
        }
    }

    /// Delivers the most urgent event. SDM vol. 3, table 6-2.
    pub(super) fn events(&mut self, bits: u32) -> Result<(), RunEnd> {
        self.board.attending(bits, self.retired);
        if bits & attention::EVENT != 0 {
            self.shared.attention.fetch_and(!attention::EVENT, SeqCst);
            if self.board.take_init() {
                self.init();
                self.wait_sipi = !self.board.is_bsp();
            }
            if self.wait_sipi {
                if let Some(page) = self.board.take_sipi() {
                    self.start_at(page);
                }
            }
            self.take_nmis();
        }
        if self.wait_sipi {
            return Ok(());
        }
        let delivered = self.pending_events(bits);
        delivered.map_err(|_| self.take_delivery_exit())
    }

    /// One NMI is delivered at once; one more is kept while its handler runs, the others are lost.
    fn take_nmis(&mut self) {
        if self.nmi_blocked || self.pending.nmi {
            while self.board.take_nmi() {
                self.pending.nmi = true;
            }
        } else if self.board.take_nmi() {
            self.pending.nmi = true;
            self.shared.raise(attention::EVENT);
        }
    }

    fn pending_events(&mut self, bits: u32) -> R {
        if let Some(fault) = self.pending.exception.take() {
            self.halted = false;
            self.fault = fault;
            return self.deliver_fault();
        }
        if let Some((vector, software)) = self.pending.interrupt.take() {
            if software || self.sys_flags as u64 & rflags::IF != 0 {
                self.halted = false;
                return self.deliver_injected(vector, software);
            }
            self.pending.interrupt = Some((vector, software));
            self.native_out.held = 1;
        }
        if self.pending.nmi && !self.nmi_blocked {
            self.pending.nmi = false;
            self.halted = false;
            return self.deliver_nmi();
        }
        if bits & attention::IRQ != 0 {
            // Cleared first: what arrives from here on raises it again. While IF is clear it stays
            // down; setting IF looks at the local APIC anew (`flags_changed`).
            self.shared.attention.fetch_and(!attention::IRQ, SeqCst);
            if self.sys_flags as u64 & rflags::IF != 0 {
                if let Some(vector) = self.board.ack_interrupt() {
                    self.halted = false;
                    if self.board.has_interrupt() {
                        self.shared.raise(attention::IRQ);
                    }
                    return self.deliver_interrupt(vector);
                }
            } else {
                self.native_out.held = 1;
            }
        }
        Ok(())
    }

    /// SIPI: real mode at the page it names. SDM vol. 3, 8.4.
    fn start_at(&mut self, page: u8) {
        self.wait_sipi = false;
        let cs = &mut self.segs[super::state::seg::CS];
        cs.selector = (page as u16) << 8;
        cs.base = (page as u64) << 12;
        self.rip = 0;
        self.update_modes();
    }

    /// Runs code as it is run fastest.
    fn run_code(&mut self) -> R {
        if self.translator.is_some() && self.code_size == CodeSize::B64 {
            return self.run_translated();
        }
        self.run_blocks()
    }

    /// Runs blocks until attention is wanted or an instruction stops. RIP is exact on return.
    fn run_blocks(&mut self) -> R {
        self.shadow = 0;
        let mut block = self.find_block()?;
        let size = self.code_size;
        loop {
            let base = self.rip;
            self.run_block(block)?;
            // Code of another size may be the translator's.
            if size != self.code_size || self.shared.attention.load(Relaxed) != 0 || self.shadow != 0 {
                return Ok(());
            }
            block = self.next_block(block, base)?;
        }
    }

    /// Runs one block by its handlers.
    #[inline(always)]
    pub(crate) fn run_block(&mut self, block: *mut Block) -> R {
        self.regs[17] = self.rip;
        self.blocks.current = block;
        // SAFETY: the block belongs to the cache, which only find_block() and attend() change; its
        // last operation always stops.
        let (op, stop, count) = unsafe {
            let mut op = (*block).ops as *const Op;
            let stop = loop {
                match ((*op).f)(self, &*op) {
                    Ok(()) => op = op.add(1),
                    Err(stop) => break stop,
                }
            };
            (op, stop, (*block).count)
        };
        if stop != Stop::Branch {
            return self.stopped(block, op, stop);
        }
        self.retired += count as u64;
        Ok(())
    }

    /// The block at RIP after `from` (which began at `base`) ran.
    #[inline(always)]
    fn next_block(&mut self, from: *mut Block, base: u64) -> R<*mut Block> {
        // SAFETY: `from` and what it links to live until the cache is cleared, which happens in
        // find_block() only.
        unsafe {
            if !(*from).linkable {
                return self.find_block();
            }
            let delta = self.rip.wrapping_sub(base);
            for link in (*from).links {
                // An unused link's delta may be a real one.
                if link.delta == delta && !link.block.is_null() && (*link.block).valid() {
                    return Ok(link.block);
                }
            }
            self.link(from, base, delta)
        }
    }

    /// Finds the successor by address and links it when it lies in the same page.
    #[inline(never)]
    unsafe fn link(&mut self, from: *mut Block, base: u64, delta: u64) -> R<*mut Block> {
        let generation = self.blocks.clears;
        let next = self.find_block()?;
        // SAFETY: the caller's block is alive unless the cache was cleared meanwhile; a straddling
        // block is never linked to, as its second page must be looked at each time.
        unsafe {
            let same_page = base >> 12 == self.rip >> 12;
            if same_page && generation == self.blocks.clears && !self.legacy && !(*next).straddles() {
                (*from).links.swap(0, 1);
                (*from).links[0] = Link { delta, block: next };
            }
        }
        Ok(next)
    }

    /// An operation of a block stopped otherwise than by a branch: settles RIP and the count.
    #[cold]
    #[inline(never)]
    fn stopped(&mut self, block: *mut Block, op: *const Op, stop: Stop) -> R {
        // SAFETY: both belong to the block that just ran.
        let (index, op) = unsafe { (op.offset_from((*block).ops) as u64, &*op) };
        self.retired += index;
        self.blocks.current = std::ptr::null_mut();
        self.place_rip(op, stop);
        Err(stop)
    }

    pub(crate) fn place_rip(&mut self, op: &Op, stop: Stop) {
        let after = matches!(stop, Stop::ExitAfter | Stop::Leave);
        let offset = op.end - if after { 0 } else { op.len };
        self.retired += after as u64;
        self.rip = self.regs[17].wrapping_add(offset as u64);
        if self.legacy {
            self.rip &= 0xffff_ffff;
        }
    }

    /// Executes exactly one instruction (or one step of a repeated one), with debug events.
    /// `Err` holds what stopped it, not yet acted upon; RIP is exact.
    pub fn step_raw(&mut self) -> R {
        let traced = self.single_step_wanted();
        if traced {
            self.debug_before()?;
        }
        self.shadow = 0;
        let kept = self.blocks.thunks.len();
        let op = match self.decode_one() {
            Ok(op) => op,
            Err(stop) => {
                self.blocks.thunks.truncate(kept);
                return Err(stop);
            }
        };
        self.regs[17] = self.rip;
        self.blocks.current = std::ptr::null_mut();
        // SAFETY: bind() made the operation.
        let result = unsafe { (op.f)(self, &op) };
        self.blocks.thunks.truncate(kept);
        let stop = match result {
            Ok(()) => Stop::Leave,
            Err(stop) => stop,
        };
        if stop == Stop::Branch {
            self.retired += 1;
        } else {
            self.place_rip(&op, stop);
        }
        match stop {
            Stop::Fault | Stop::Exit => Err(stop),
            _ if traced => self.debug_after(stop).and(if stop == Stop::ExitAfter { Err(stop) } else { Ok(()) }),
            Stop::ExitAfter => Err(stop),
            _ => Ok(()),
        }
    }

    /// One instruction with its exception delivered: for tests and debuggers.
    pub fn step(&mut self) -> Option<RunEnd> {
        match self.step_raw() {
            Ok(()) => None,
            Err(stop) => self.settle(stop),
        }
    }

    /// Runs at most about `limit` instructions without delivering anything: gives the first fault
    /// or exit. For the fuzzers.
    pub fn run_raw(&mut self, limit: u64) -> R {
        let until = self.retired + limit;
        while self.retired < until {
            match self.run_code() {
                Ok(()) | Err(Stop::Again | Stop::Leave | Stop::Branch) => {}
                Err(stop) => return Err(stop),
            }
            if self.shared.attention.load(Relaxed) != 0 {
                return Ok(());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::Bench;

    /// mov ecx, n; l: add rax, rcx; xor rdx, rax; dec ecx; jnz l; hlt
    const LOOP: &[u8] = &[0xb9, 0x40, 0x42, 0x0f, 0, 0x48, 1, 0xc8, 0x48, 0x31, 0xc2, 0xff, 0xc9, 0x75, 0xf6, 0xf4];

    #[test]
    fn test_run_register_loop_gives_the_sum() {
        let mut bench = Bench::new(1 << 20).long_mode(0x10_000, false);
        bench.load(0x10_000, LOOP);
        let _ = bench.cpu.run_raw(4_000_001);
        assert_eq!(bench.cpu.regs[0], 1_000_000 * 1_000_001 / 2);
    }

    #[test]
    fn test_run_branch_to_the_byte_before_its_block_finds_it() {
        // nop; start: dec ecx; jnz nop; ud2
        let mut bench = Bench::new(1 << 20).long_mode(0x10_001, false);
        bench.load(0x10_000, &[0x90, 0xff, 0xc9, 0x75, 0xfb, 0x0f, 0x0b]);
        bench.cpu.regs[1] = 3;
        assert_eq!(bench.cpu.run_raw(100), Err(Stop::Fault));
        assert_eq!((bench.cpu.regs[1], bench.cpu.rip), (0, 0x10_005));
    }

    #[test]
    fn test_run_store_into_running_block_executes_the_new_code() {
        // mov byte [rip+1], 0x7f (patches the next instruction's immediate); mov al, 1; out 0x10, al
        let code = [0xc6, 0x05, 1, 0, 0, 0, 0x7f, 0xb0, 1, 0x0f, 0x0b];
        let mut bench = Bench::new(1 << 20).long_mode(0x10_000, false);
        bench.load(0x10_000, &code);
        let result = bench.cpu.run_raw(100);
        assert_eq!(result, Err(Stop::Fault));
        assert_eq!(bench.cpu.regs[0] & 0xff, 0x7f);
        assert_eq!(bench.cpu.rip, 0x10_009);
    }

    #[test]
    fn test_run_branch_to_the_byte_before_its_block() {
        // hlt (privileged); then, where the block begins, jmp to it
        let mut bench = Bench::new(1 << 20).long_mode(0x10_000, false);
        bench.load(0xffff, &[0xf4, 0xeb, 0xfd]);
        bench.cpu.cpl = 3;
        assert_eq!(bench.cpu.run_raw(10), Err(Stop::Fault));
        assert_eq!(bench.cpu.rip, 0xffff);
    }

    #[test]
    fn test_run_instruction_across_pages_is_executed() {
        let mut bench = Bench::new(1 << 20).long_mode(0x10_ffd, false);
        bench.load(0x10_ffd, &[0xb8, 0x78, 0x56, 0x34, 0x12, 0x0f, 0x0b]);
        assert_eq!(bench.cpu.run_raw(10), Err(Stop::Fault));
        assert_eq!((bench.cpu.regs[0], bench.cpu.rip), (0x1234_5678, 0x11_002));
    }

    #[test]
    fn test_run_rep_movs_overlapping_replicates() {
        // mov edi, 0x20001; mov esi, 0x20000; mov ecx, 0x3000; rep movsb; ud2
        let code = [0xbf, 1, 0, 2, 0, 0xbe, 0, 0, 2, 0, 0xb9, 0, 0x30, 0, 0, 0xf3, 0xa4, 0x0f, 0x0b];
        let mut bench = Bench::new(1 << 20).long_mode(0x10_000, false);
        bench.load(0x10_000, &code);
        bench.load(0x20_000, &[0x5a, 1, 2, 3]);
        assert_eq!(bench.cpu.run_raw(10), Err(Stop::Fault));
        assert_eq!(bench.word(0x22_ff9), 0x5a5a_5a5a_5a5a_5a5a);
        assert_eq!(bench.cpu.regs[1], 0);
    }

    #[test]
    fn test_run_sse_addition_by_thunk() {
        // movd xmm0, eax; paddd xmm0, xmm0; movd ecx, xmm0; ud2
        let code = [0x66, 0x0f, 0x6e, 0xc0, 0x66, 0x0f, 0xfe, 0xc0, 0x66, 0x0f, 0x7e, 0xc1, 0x0f, 0x0b];
        let mut bench = Bench::new(1 << 20).long_mode(0x10_000, false);
        bench.load(0x10_000, &code);
        bench.cpu.regs[0] = 21;
        assert_eq!(bench.cpu.run_raw(10), Err(Stop::Fault));
        assert_eq!(bench.cpu.regs[1], 42);
    }
}

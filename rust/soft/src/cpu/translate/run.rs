//! Link: the loop around translated code. It finds or makes the code of the block at RIP, joins it to
//! the exit control came from, and settles what comes back.

use super::layout::BIAS;
use super::link::{self, Exit, Jump};
use super::stubs::reason;
use super::trace::is_tame;
use super::{Budget, Translation, Translator};
use crate::cpu::block::{copy, near_the_hole, Block, MAX_BYTES};
use crate::cpu::mmu::{canonical, Mode};
use crate::cpu::op::Op;
use crate::cpu::state::CodeSize;
use crate::cpu::{Cpu, Stop, R};
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::Ordering::Relaxed;

/// `Stop` values by number; see [`call_out`].
const STOPS: [Stop; 6] = [Stop::Branch, Stop::Fault, Stop::Exit, Stop::ExitAfter, Stop::Again, Stop::Leave];

/// Executes an operation for translated code: zero to go on, else the stop's number plus one.
///
/// # Safety
/// `cpu` and `op` are the ones translated code was made for, its registers are in `cpu`.
pub(super) unsafe extern "sysv64" fn call_out(cpu: *mut Cpu, op: *const Op) -> u32 {
    // SAFETY: the caller's promise.
    if let Some(translator) = unsafe { &mut (*cpu).translator } {
        if translator.dumps.is_some() {
            // SAFETY: as above.
            *translator.handlers.entry(unsafe { (*op).f } as usize).or_default() += 1;
        }
    }
    // A panic must not unwind through translated code, which has no tables for it.
    // SAFETY: the caller's promise.
    match catch_unwind(AssertUnwindSafe(|| unsafe { ((*op).f)(&mut *cpu, &*op) })) {
        Ok(Ok(())) => 0,
        Ok(Err(stop)) => stop as u32 + 1,
        Err(panic) => {
            // SAFETY: as above.
            if let Some(translator) = unsafe { &mut (*cpu).translator } {
                translator.panic = Some(panic);
            }
            PANICKED
        }
    }
}

/// What `call_out` gives after a panic, which goes on behind translated code.
const PANICKED: u32 = STOPS.len() as u32 + 1;

/// Blocks that a vCPU at rest keeps: more than a Linux guest that idles runs in a second, in some 2 MiB.
const BLOCKS_AT_REST: usize = 4096;

/// How far from it tame code leads at most, and a little more.
const TAME: u64 = 2 << 20;

/// Near the addresses that are not canonical, whether a block at `linear` may be translated.
fn safe_near_the_hole(block: &Block, linear: u64) -> bool {
    canonical(linear.wrapping_add(TAME)) && canonical(linear.wrapping_sub(TAME)) && is_tame(block)
}

impl Cpu {
    /// Switches translated code on for blocks that ran `hot` times; `false` where the host has no
    /// memory for it.
    pub fn use_translator(&mut self, hot: u32, budget: Budget) -> bool {
        self.blocks.max_chunks = budget.chunks;
        self.translator = Translator::new(hot, budget.region);
        self.native_out.jumps = self.translator.as_mut().map_or(std::ptr::null_mut(), |t| t.jumps.as_mut_ptr());
        self.refresh_context();
        self.translator.is_some()
    }

    /// After whatever [`Cpu::context`] is made of has changed.
    #[inline]
    pub(crate) fn refresh_context(&mut self) {
        self.native.context = self.context() as u32;
    }

    /// A linear address may translate otherwise from now on.
    pub(crate) fn new_exec_epoch(&mut self) {
        self.exec_epoch += 1;
        self.counters.epochs += 1;
        self.tlb.code.clear();
        // Only 16 bits of it are in the jump table's context.
        if self.exec_epoch & 0xffff == 0 {
            if let Some(translator) = &mut self.translator {
                translator.forget_jumps();
            }
            self.forget_returns();
        }
        self.refresh_context();
    }

    /// Gives back what is kept to be fast, and keeps little until [`Self::stir`]. For when the vCPU is not in the guest.
    pub(crate) fn rest(&mut self) {
        self.flush_all();
        self.blocks.release();
        let clears = self.blocks.clears;
        if let Some(translator) = &mut self.translator {
            translator.rest(clears);
        }
        self.forget_returns();
        crate::host::table::give_back();
    }

    /// Keeps to that.
    pub(crate) fn rest_on(&mut self) {
        if self.translator.as_ref().is_some_and(|t| t.at_rest) && self.blocks.len() > BLOCKS_AT_REST {
            self.rest();
        }
    }

    /// The vCPU has something to do again.
    pub(crate) fn stir(&mut self) {
        if let Some(translator) = &mut self.translator {
            translator.stir();
        }
    }

    /// Code changed, or all of it goes: RETs look for theirs anew. Whoever writes code for a vCPU without a board
    /// calls it; in a machine `attention::CODE` does.
    pub fn forget_returns(&mut self) {
        self.native_out.returns = [link::Return::NONE; link::RETURNS];
    }

    /// As `run_blocks`, with translated code where there is some.
    pub(crate) fn run_translated(&mut self) -> R {
        self.shadow = 0;
        self.native.left = 0;
        let mut from = None;
        loop {
            if self.translator.as_mut().is_some_and(|t| std::mem::take(&mut t.full)) {
                self.blocks.clear();
            }
            // What comes after, the fault of a fetch as well, is beyond the limit.
            if self.retired >= self.native_out.limit {
                return Ok(());
            }
            let clears = self.blocks.clears;
            let block = self.find_block()?;
            // SAFETY: as below.
            if self.retired + unsafe { (*block).count } as u64 > self.native_out.limit {
                return Ok(());
            }
            if clears != self.blocks.clears {
                from = None;
            }
            // SAFETY: the block belongs to the cache, which changes in find_block() only.
            let reached = match unsafe { self.native_code(&mut *block) } {
                // In lockstep a trace may not fit where its first block does.
                Some(code) if self.retired + code.count as u64 <= self.native_out.limit => {
                    self.arrive(from, &code, block);
                    self.enter(&code)?
                }
                _ => {
                    self.run_block(block)?;
                    None
                }
            };
            if self.shared.attention.load(Relaxed) != 0 || self.shadow != 0 {
                return Ok(());
            }
            from = reached;
        }
    }

    /// The block's code, made now if it is time.
    unsafe fn native_code(&mut self, block: &mut Block) -> Option<Translation> {
        if self.blocks.clears != self.translator.as_ref()?.clears {
            let clears = self.blocks.clears;
            self.translator.as_mut()?.flush(clears);
            self.forget_returns();
        }
        // The kernel's functions for processes, its vDSO, often are there.
        if near_the_hole(self.rip) && !safe_near_the_hole(block, self.rip) {
            return None;
        }
        if !block.code.entry.is_null() {
            if self.translator.as_mut()?.hot_at.take() == Some(self.rip) {
                // SAFETY: the caller's block is.
                unsafe { self.make_trace(block) };
            }
            return Some(block.code);
        }
        block.code.runs = block.code.runs.saturating_add(1);
        if block.code.runs < self.translator.as_ref()?.threshold() || self.code_size != CodeSize::B64 {
            return None;
        }
        let mut bytes = [0u8; MAX_BYTES];
        let bytes = &mut bytes[..block.bytes as usize];
        // They are those it was decoded from if the generations still stand afterwards.
        let (first, rest) = bytes.split_at_mut(bytes.len().min(0x1000 - (self.rip as usize & 0xfff)));
        copy(block.host, first);
        if let Some((host, ..)) = block.second {
            copy(host, rest);
        }
        if !block.valid() || !block.second_valid() {
            return None;
        }
        let array = self.only_array();
        if self.translator.as_mut()?.translate(block, bytes, array) {
            return Some(block.code);
        }
        block.code.runs = 0;
        if self.translator.as_ref().is_some_and(|t| t.writer.used() > t.region_bytes / 2) {
            // Full: everything goes, the block too, once this one has run.
            self.translator.as_mut()?.full = true;
        }
        None
    }

    /// The TLB array that code which is translated now may look at whatever `tlb_now` says: that of processes, for
    /// their code. Elsewhere it finds nothing there that it might not do, and the handlers do it.
    pub(super) fn only_array(&self) -> Option<i32> {
        self.tlb.low_user_array().filter(|_| self.tlb.mode == Mode::User)
    }

    /// Control came to `code` from an exit: next time it shall do so by itself.
    fn arrive(&mut self, from: Option<u32>, code: &Translation, block: *const Block) {
        let linear = self.rip;
        let context = self.native.context;
        self.note_code(linear);
        // It may go on in the next page.
        self.note_code(linear.wrapping_add(0xfff));
        let Some(translator) = &mut self.translator else { return };
        match from {
            // SAFETY: as in run_translated().
            Some(exit) => translator.link(exit, code, unsafe { &*block }),
            None => {
                // SAFETY: as in run_translated().
                let (word, generation) = unsafe { (*block).stamp() };
                translator.jumps[link::index(linear)] = Jump { linear, code: code.entry, word, context, generation };
            }
        }
    }

    /// Runs translated code until it comes back: RIP is exact then. Gives the exit to be linked.
    fn enter(&mut self, code: &Translation) -> R<Option<u32>> {
        self.native.page = self.rip & !0xfff;
        self.blocks.current = std::ptr::null_mut();
        let Some(translator) = &mut self.translator else { return Ok(None) };
        translator.stats.entries += 1;
        let start = translator.writer.start();
        // SAFETY: the stub at this offset is a function of this type.
        let enter: unsafe extern "sysv64" fn(*mut u8, *const u8) -> u32 =
            unsafe { std::mem::transmute(start.as_ptr().add(translator.stubs.enter)) };
        let cpu: *mut Cpu = self;
        // SAFETY: the code was made for this vCPU from a block that is valid now; nothing else uses
        // the Cpu meanwhile, and what the code calls gets it by pointer.
        let reason = unsafe { enter((cpu as *mut u8).add(BIAS), code.entry) };
        self.settle_native(reason)
    }

    fn settle_native(&mut self, reason: u32) -> R<Option<u32>> {
        let Some(translator) = &mut self.translator else { return Ok(None) };
        let exit = self.native_out.exit;
        match reason {
            reason::LINK => {
                translator.stats.exits_direct += 1;
                if let Some(Exit::Link { target, .. }) = translator.exits.get(exit as usize) {
                    self.rip = self.native.page + *target as u64;
                }
                Ok(Some(exit))
            }
            reason::STOP => {
                translator.stats.exits_stop += 1;
                self.settle_stop().map(|()| None)
            }
            reason::HOT => {
                translator.hot_at = Some(self.rip);
                Ok(None)
            }
            reason => {
                translator.stats.exits_unknown += 1;
                if reason == reason::INDIRECT && !canonical(self.rip) {
                    return Err(self.take_back(exit));
                }
                Ok(None)
            }
        }
    }

    /// A handler stopped in translated code.
    fn settle_stop(&mut self) -> R {
        if let Some(panic) = self.translator.as_mut().and_then(|t| t.panic.take()) {
            resume_unwind(panic);
        }
        // The block was counted whole when it was entered.
        let (index, count) = (self.native_out.at >> 16 & 0xff, self.native_out.at >> 24);
        self.retired -= (count - index) as u64;
        let stop = STOPS[(self.native_out.stop as usize - 1) % STOPS.len()];
        // SAFETY: the operation belongs to a block of the cache.
        let op = unsafe { &*(self.native_out.op as *const Op) };
        match stop {
            Stop::Branch => {
                self.retired += 1;
                Ok(())
            }
            stop => {
                self.place_rip(op, stop);
                Err(stop)
            }
        }
    }

    /// An indirect branch led to an address that is not canonical: #GP(0) at the branch.
    #[cold]
    fn take_back(&mut self, exit: u32) -> Stop {
        let exits = self.translator.as_ref().and_then(|t| t.exits.get(exit as usize));
        if let Some(Exit::Indirect { from, popped }) = exits {
            self.rip = self.native.page + *from as u64;
            self.regs[4] = self.regs[4].wrapping_sub(*popped as u64);
            self.retired -= 1;
        }
        self.gp(0)
    }
}

//! Analyse and emit: traces. A block that ran very often is translated anew, as one piece with those that mostly
//! follow it.
//!
//! Within a trace no jumps, no counts and no looks at the attention word come between the blocks, groups (`group.rs`)
//! go on from one to the next, and a short loop is there several times over. Where control leaves a trace early, the
//! instructions that were counted at its start are taken back. All blocks of a trace are in one page, as pieces are
//! that links join, so they are stale together.
//!
//! The code of a block alone counts its executions down (`Block::heat`). Once it has a trace, its entries are jumps
//! to that.

use super::asm::{cell, group, Label, Rm};
use super::classes::Class;
use super::emit::{ends, Emitter, Flags, Lead, Part, Step};
use super::layout::{field, host::*};
use super::Translator;
use crate::cpu::block::{copy, near_the_hole, Block, MAX_BYTES};
use crate::cpu::Cpu;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};

/// Most instructions of a trace.
const MOST: usize = 64;
/// Sign.
const S: u8 = 8;

/// A way out of a trace before its end.
pub(super) struct Aside {
    from: Label,
    flags: Flags,
    target: i64,
    /// Instructions counted that are not executed.
    rest: i32,
}

/// Lets control go on from the last step of a block to the block at page offset `next`; `None` where it does not.
pub(super) fn join(step: &mut Step, next: usize) -> Option<()> {
    let taken = || step.ins.near_branch_target() == next as u64;
    step.lead = match step.plan.class {
        Class::Jcc if step.next == next => Lead::Through,
        Class::Jcc | Class::Jmp if taken() => Lead::Taken,
        class if !ends(class) && step.ins.flow_control() == FlowControl::Next && step.next == next => Lead::Next,
        _ => return None,
    };
    Some(())
}

impl Emitter<'_> {
    /// A conditional branch within a trace: leaves it where it goes the rarer way.
    pub(super) fn jcc_aside(&mut self, step: &Step) {
        let condition = step.plan.shape.opcode().last().map_or(0, |byte| byte & 15);
        let condition = self.test_saved(condition).unwrap_or_else(|| {
            self.flags_to_host();
            condition
        });
        let (condition, target) = match step.lead {
            Lead::Taken => (condition ^ 1, step.next as i64),
            _ => (condition, Self::target(step)),
        };
        let from = self.asm.label();
        self.asm.jump_if(condition, from);
        let rest = (self.steps.len() - 1 - self.index) as i32;
        self.asides.push(Aside { from, flags: self.flags, target, rest });
    }

    /// What is out of line of them.
    pub(super) fn asides_out_of_line(&mut self) {
        let linkable = std::mem::replace(&mut self.source.linkable, true);
        for Aside { from, flags, target, rest } in std::mem::take(&mut self.asides) {
            self.asm.place(from);
            self.flags = flags;
            if flags == Flags::Memory {
                self.asm.alu_imm(true, group::SUB, cell(field::RETIRED), rest);
            } else {
                self.count_quietly(-rest);
            }
            self.go(target);
        }
        self.source.linkable = linkable;
    }

    /// Counts an execution of a block that has no trace yet. The flags are in the `Cpu`.
    pub(super) fn heat(&mut self) {
        let Some(heat) = self.source.heat else { return };
        let hot = self.asm.label();
        self.asm.load_imm64(RCX, heat as usize as u64);
        self.asm.alu_imm(false, group::SUB, Rm::Mem(RCX, 0), 1);
        self.asm.jump_if(S, hot);
        self.hot = Some(hot);
    }

    /// When it is time for one.
    pub(super) fn hot_out_of_line(&mut self) {
        let Some(hot) = self.hot.take() else { return };
        self.asm.place(hot);
        self.asm.alu_imm(true, group::SUB, cell(field::RETIRED), self.steps.len() as i32);
        self.address_in_code(R11, self.source.start() as i64);
        self.asm.jump_to(self.stubs.hot);
    }
}

/// The instruction that ends a block, decoded as if its page began at address 0.
fn last_of(block: &Block) -> Instruction {
    // SAFETY: a block has `count` operations, and its bytes lie in its page, as it does not straddle.
    let (op, bytes) = unsafe {
        let op = &*block.ops.add(block.count as usize - 1);
        let mut bytes = [0u8; 15];
        copy(block.host.add((op.end - op.len) as usize), &mut bytes[..op.len as usize]);
        (op, bytes)
    };
    let ip = (block.host as u64 & 0xfff) + (op.end - op.len) as u64;
    Decoder::with_ip(64, &bytes[..op.len as usize], ip, DecoderOptions::NONE).decode()
}

/// Whether a block's direct branch, if it ends in one, leads less than a MiB away. Of blocks that straddle two pages
/// nothing is said.
pub(super) fn is_tame(block: &Block) -> bool {
    if block.straddles() {
        return false;
    }
    let ins = last_of(block);
    let direct = ins.is_jcc_short_or_near() || ins.is_jmp_short_or_near() || ins.is_call_near();
    !direct || ins.near_branch_target().wrapping_sub(ins.ip()).wrapping_add(1 << 20) < 2 << 20
}

impl Translator {
    /// How often a block has run, as far as that was counted.
    fn runs(&self, block: &Block) -> i64 {
        match block.code.entry.is_null() {
            true => block.code.runs as i64,
            false => self.warm as i64 - block.heat as i64,
        }
    }
}

impl Cpu {
    /// The blocks of a trace from `head` on; only `head` may be in it several times.
    fn follow(&mut self, head: *mut Block) -> Vec<*mut Block> {
        let mut trace = vec![head];
        // SAFETY: blocks of the map live until it is cleared, which happens in find_block() only.
        let mut room = MOST.saturating_sub(unsafe { (*head).count } as usize);
        while let Some(next) = trace.last().and_then(|&last| self.likely_after(unsafe { &*last })) {
            let count = unsafe { (*next).count } as usize;
            if count > room || next != head && trace.contains(&next) {
                break;
            }
            room -= count;
            trace.push(next);
        }
        if let Some(again) = trace.iter().skip(1).rposition(|&block| block == head) {
            trace.truncate(again + 1);
        }
        trace
    }

    /// The block that most often follows another in its page, if that has run often.
    fn likely_after(&mut self, block: &Block) -> Option<*mut Block> {
        if !block.joins || block.straddles() {
            return None;
        }
        let ins = last_of(block);
        let (next, target) = (ins.next_ip(), ins.near_branch_target());
        let ways = match ins.flow_control() {
            FlowControl::Next => [Some(next), None],
            FlowControl::UnconditionalBranch => [Some(target), None],
            FlowControl::ConditionalBranch if ins.is_jcc_short_or_near() => [Some(next), Some(target)],
            _ => return None,
        };
        let page = block.host as u64 & !0xfff;
        let near = near_the_hole(self.rip);
        let found = ways.into_iter().flatten().filter(|&offset| offset < 0x1000);
        let found: Vec<_> = found.filter_map(|offset| self.blocks.at(self.key((page + offset) as *const u8))).collect();
        let translator = self.translator.as_ref()?;
        // SAFETY: as in follow().
        let runs = |&block: &*mut Block| unsafe { translator.runs(&*block) };
        let best = found
            .into_iter()
            .filter(|&b| unsafe { (*b).stamp() == block.stamp() && !(*b).straddles() && (!near || is_tame(&*b)) });
        best.max_by_key(runs).filter(|block| 4 * runs(block) >= translator.warm as i64)
    }

    /// Translates a block anew, with what follows it.
    ///
    /// # Safety
    /// The block is one of the cache, and valid.
    pub(super) unsafe fn make_trace(&mut self, head: *mut Block) {
        let trace = self.follow(head);
        let mut bytes = vec![[0u8; MAX_BYTES]; trace.len()];
        for (into, &block) in bytes.iter_mut().zip(&trace) {
            // SAFETY: the caller's promise; all of a trace is in one page.
            unsafe { copy((*block).host, &mut into[..(*block).bytes as usize]) };
        }
        // SAFETY: as above. They are the bytes that were decoded if the generation still stands.
        unsafe {
            (*head).heat = i32::MAX;
            if !(*head).valid() {
                return;
            }
            let parts: Vec<_> = trace.iter().zip(&bytes).map(|(&block, bytes)| Part::of(&*block, bytes)).collect();
            let array = self.only_array();
            let joins = trace.last().is_some_and(|&last| (*last).joins);
            if let Some(translator) = &mut self.translator {
                translator.translate_trace(&mut *head, &parts, joins, array);
            }
        }
    }
}

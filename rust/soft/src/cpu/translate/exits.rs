//! Emit: the ways out of a block: to handlers when a fast path does not apply, and on to other code.

use super::asm::{cc, cell, group, Asm, Label, Rm};
use super::emit::{Emitter, Flags, Step};
use super::layout::{field, host::*};
use super::link::Exit;
use super::stubs::Stubs;

/// An out-of-line execution by handler.
pub(super) struct Miss {
    pub from: Label,
    /// Control comes back behind the instruction; otherwise the block is left.
    pub back: bool,
    pub resume: Option<Label>,
    pub index: usize,
    /// The flags are in RFLAGS when control comes here.
    pub save: bool,
    /// They are to be had again from this step.
    pub again: Option<usize>,
    /// They must be there at `resume`.
    pub load: bool,
}

/// A linkable exit's cold part.
pub(super) struct Cold {
    from: Label,
    exit: usize,
    host: bool,
}

/// Goes to page offset `target` by the jump table.
pub fn bridge(stubs: &Stubs, origin: usize, target: u16, flags_in_host: bool) -> Vec<u8> {
    let mut asm = Asm::new(origin);
    asm.load(R11, cell(field::PAGE));
    asm.lea(true, R11, Some(R11), None, target as i32);
    asm.jump_to(if flags_in_host { stubs.direct_host } else { stubs.direct });
    asm.code
}

impl Emitter<'_> {
    /// Where the instruction goes when its fast path does not apply; flags are in the `Cpu` then.
    pub(super) fn miss_label(&mut self) -> Label {
        if let Some(label) = self.miss {
            return label;
        }
        let label = self.asm.label();
        self.miss = Some(label);
        self.misses.push(Miss {
            from: label,
            back: true,
            resume: None,
            index: self.index,
            save: false,
            again: self.again_only(),
            load: false,
        });
        label
    }

    /// The step from which the flags must be had again, if they are nowhere.
    pub(super) fn again_only(&self) -> Option<usize> {
        match self.flags {
            Flags::Again(of) => Some(of),
            _ => None,
        }
    }

    /// The instruction is complete: its misses, those from number `first` on, come back here.
    pub(super) fn settle_misses(&mut self, first: usize, here: Label) {
        let load = matches!(self.flags, Flags::Host | Flags::Both);
        for miss in &mut self.misses[first..] {
            if miss.back {
                (miss.resume, miss.load) = (Some(here), load);
            }
        }
    }

    fn call_out(&mut self, index: usize, stub: usize) {
        let Step { op, block, .. } = self.steps[index];
        self.asm.load_imm64(RCX, std::ptr::from_ref(op) as usize as u64);
        self.asm.load_imm(RAX, (block | index << 16 | self.steps.len() << 24) as u32);
        self.asm.call_to(stub);
    }

    /// The instruction is its handler's.
    pub(super) fn handler(&mut self) {
        self.flags_to_memory();
        self.call_out(self.index, self.stubs.call);
        self.opened = 0;
    }

    pub(super) fn out_of_line(&mut self) {
        self.groups_out_of_line();
        self.stack_out_of_line();
        self.seconds_out_of_line();
        self.near_out_of_line();
        self.asides_out_of_line();
        self.hot_out_of_line();
        for miss in std::mem::take(&mut self.misses) {
            self.asm.place(miss.from);
            if let Some(of) = miss.again {
                self.compute_again(of);
            }
            if miss.save || miss.again.is_some() {
                self.asm.save_flags(field::FLAGS);
            }
            let stub = match (miss.resume, miss.load) {
                (None, _) => self.stubs.call_and_leave,
                (_, true) => self.stubs.miss_with_flags,
                (_, false) => self.stubs.miss,
            };
            self.call_out(miss.index, stub);
            if let Some(resume) = miss.resume {
                self.asm.jump(resume);
            }
        }
        self.branches_out_of_line();
        for cold in std::mem::take(&mut self.colds) {
            self.asm.place(cold.from);
            self.asm.load_imm(RCX, (self.first_exit + cold.exit) as u32);
            self.asm.jump_to(if cold.host { self.stubs.link_host } else { self.stubs.link });
        }
    }

    /// Counts the block's instructions, when the flags do not matter: at its start. Whatever leaves
    /// it early takes the rest back.
    pub(super) fn retire(&mut self) {
        let count = self.steps.len() as i32;
        self.asm.alu_imm(true, group::ADD, cell(field::RETIRED), count);
        if self.source.counted {
            self.stay_within_limit(count);
        }
    }

    /// The same, where the flags do matter.
    pub(super) fn retire_quietly(&mut self) {
        self.count_quietly(self.steps.len() as i32);
    }

    pub(super) fn count_quietly(&mut self, instructions: i32) {
        self.asm.load(RAX, cell(field::RETIRED));
        self.asm.lea(true, RAX, Some(RAX), None, instructions);
        self.asm.store(cell(field::RETIRED), RAX);
    }

    /// For lockstep: goes back to the loop if the block would end beyond `Out::limit`. The flags are
    /// in the `Cpu`.
    fn stay_within_limit(&mut self, count: i32) {
        let fits = self.asm.label();
        self.asm.load(RAX, cell(field::RETIRED));
        self.asm.alu(true, group::CMP, RAX, cell(field::LIMIT));
        self.asm.jump_if(cc::BE, fits);
        self.asm.alu_imm(true, group::SUB, cell(field::RETIRED), count);
        self.address_in_code(R11, self.source.start() as i64);
        self.asm.jump_to(self.stubs.next);
        self.asm.place(fits);
    }

    pub(super) fn fall_through(&mut self, next: usize) {
        if self.source.linkable {
            return self.go(next as i64);
        }
        self.flags_to_memory();
        self.address_in_code(R11, next as i64);
        self.asm.jump_to(self.stubs.direct);
    }

    /// Loads the linear address of a page offset, which may lie beyond the page.
    pub(super) fn address_in_code(&mut self, reg: u8, offset: i64) {
        self.known = self.known.filter(|_| reg != R11);
        self.asm.load(reg, cell(field::PAGE));
        self.asm.lea(true, reg, Some(reg), None, offset as i32);
    }

    fn new_link(&mut self, target: i64) -> Option<(usize, Label)> {
        let here = (0..4096).contains(&target) && self.source.linkable;
        here.then(|| self.link_within_page(target as u16))
    }

    /// An exit to a target in this page: its number, and a label of its cold part.
    pub(super) fn link_within_page(&mut self, target: u16) -> (usize, Label) {
        let (exit, from, host) = (self.exits.len(), self.asm.label(), self.flags == Flags::Host);
        self.exits.push(Exit::Link { at: 0, target, page: self.source.page, flags_in_host: host });
        self.colds.push(Cold { from, exit, host });
        (exit, from)
    }

    /// The displacement just emitted is that of exit `exit`.
    pub(super) fn link_here(&mut self, exit: usize) {
        let here = self.asm.here() as u32 - 4;
        if let Exit::Link { at, .. } = &mut self.exits[exit] {
            *at = here;
        }
    }

    /// On to a page offset; the instructions are counted already.
    pub(super) fn go(&mut self, target: i64) {
        if self.again_only().is_some() {
            self.flags_to_host();
        }
        let Some((exit, cold)) = self.new_link(target) else {
            return self.go_far(target);
        };
        if target <= self.highest as i64 {
            self.asm.load(RCX, cell(field::ATTENTION));
            self.asm.load32(RCX, Rm::Mem(RCX, 0));
            self.asm.skip_if_ecx_zero(5);
            self.asm.jump(cold);
        }
        self.asm.jump(cold);
        self.link_here(exit);
    }

    /// To a page offset if `condition` holds.
    pub(super) fn go_if(&mut self, condition: u8, target: i64) -> Option<Label> {
        let forward = target > self.highest as i64;
        if let Some((exit, cold)) = forward.then(|| self.new_link(target)).flatten() {
            self.asm.jump_if(condition, cold);
            self.link_here(exit);
            return None;
        }
        let taken = self.asm.label();
        self.asm.jump_if(condition, taken);
        Some(taken)
    }

    pub(super) fn indirect_exit(&mut self, popped: u32) -> i32 {
        let Step { op, block, .. } = self.steps[self.index];
        let from = block + op.end as usize - op.len as usize;
        self.exits.push(Exit::Indirect { from: from as u16, popped });
        (self.first_exit + self.exits.len() - 1) as i32
    }
}

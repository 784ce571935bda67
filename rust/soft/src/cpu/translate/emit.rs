//! Emit: a block's host code.
//!
//! The guest's arithmetic flags are in RFLAGS as long as possible ([`Flags`]). What destroys RFLAGS,
//! above all the look-up before a memory access, saves them first, because the access may fault.
//! A piece has two entries: one that finds the flags in RFLAGS, one that finds them in the `Cpu`.
//!
//! An instruction whose fast path does not apply (`miss`) is executed whole by its handler, out of
//! line; control comes back behind it. So nothing may be changed before the last check.

use super::asm::{cc, cell, group, Asm, Label, Rm};
use super::classes::{plan, Class, Plan};
use super::layout::{field, host::*};
use super::link::{Exit, Site, Sites};
use super::stubs::Stubs;
use crate::cpu::op::Op;
use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory};
use std::sync::atomic::AtomicU64;

/// What is to be translated.
pub struct Source<'a> {
    /// The block's bytes.
    pub bytes: &'a [u8],
    /// Its operations, one an instruction.
    pub ops: &'a [Op],
    /// Where it begins in its page.
    pub offset: usize,
    /// Host address of that page.
    pub page: usize,
    /// Whether its direct successors may be linked.
    pub linkable: bool,
    /// Word and generation of its second page, when it straddles two.
    pub second: Option<(*const AtomicU64, u32)>,
    /// See `Translator::counted`.
    pub counted: bool,
}

/// A translated block, to be put where it was made for.
pub struct Piece {
    /// The bytes.
    pub code: Vec<u8>,
    /// Entry with the flags in RFLAGS, from the piece's start.
    pub host_entry: usize,
    /// Entry with the flags in the `Cpu`.
    pub entry: usize,
    /// Its exits, numbered from the number given.
    pub exits: Vec<Exit>,
}

/// Where the guest's arithmetic flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flags {
    /// In RFLAGS only.
    Host,
    /// In the `Cpu` only.
    Memory,
    /// In both.
    Both,
}

/// An out-of-line execution by handler.
pub(super) struct Miss {
    pub from: Label,
    /// Control comes back behind the instruction; otherwise the block is left.
    pub back: bool,
    pub resume: Option<Label>,
    pub index: usize,
    /// The flags are in RFLAGS when control comes here.
    pub save: bool,
    /// They must be there at `resume`.
    pub load: bool,
}

/// A linkable exit's cold part.
struct Cold {
    from: Label,
    exit: usize,
    host: bool,
}

/// One instruction of the block.
pub(super) struct Step {
    pub ins: Instruction,
    pub plan: Plan,
    /// Page offset of the next instruction.
    pub next: usize,
}

pub(super) struct Emitter<'a> {
    pub asm: Asm,
    pub source: Source<'a>,
    pub stubs: &'a Stubs,
    pub sites: &'a mut Sites,
    pub flags: Flags,
    /// Index of the instruction in work.
    pub index: usize,
    /// How far the vector registers are known to be open.
    pub opened: u8,
    /// The miss label of the instruction in work, once it has one.
    miss: Option<Label>,
    pub misses: Vec<Miss>,
    pub stack_misses: Vec<super::memory::StackMiss>,
    /// What R11 is, if that is good for more.
    pub known: Option<super::near::Known>,
    pub near_misses: Vec<super::near::NearMiss>,
    colds: Vec<Cold>,
    /// Branches to other pages: where they miss, their sites, where they lead.
    pub far: Vec<(Label, *mut Site, i64)>,
    /// Where RETs come back to, and the page offset that is.
    pub landings: Vec<(Label, usize)>,
    /// Indirect branches that found nothing by themselves, and their exits.
    pub slow_returns: Vec<(Label, i32)>,
    exits: Vec<Exit>,
    first_exit: usize,
}

fn analyse(source: &Source, factory: &mut InstructionInfoFactory) -> Vec<Step> {
    let mut decoder = Decoder::with_ip(64, source.bytes, source.offset as u64, DecoderOptions::NONE);
    let mut steps = Vec::with_capacity(source.ops.len());
    let mut start = 0;
    while steps.len() < source.ops.len() && decoder.can_decode() {
        let ins = decoder.decode();
        let offsets = decoder.get_constant_offsets(&ins);
        let bytes = &source.bytes[start..start + ins.len()];
        start += ins.len();
        let plan = plan(&ins, bytes, &offsets, factory);
        steps.push(Step { ins, plan, next: source.offset + start });
    }
    steps
}

/// Translates a block; its code is for offset `origin` of the region, its exits are numbered from
/// `first_exit`.
pub fn translate(
    source: Source,
    stubs: &Stubs,
    origin: usize,
    first_exit: usize,
    (factory, sites): (&mut InstructionInfoFactory, &mut Sites),
) -> Option<Piece> {
    let steps = analyse(&source, factory);
    if steps.len() != source.ops.len() {
        return None;
    }
    let mut e = Emitter {
        asm: Asm::new(origin),
        source,
        stubs,
        sites,
        flags: Flags::Memory,
        index: 0,
        opened: 0,
        miss: None,
        misses: Vec::new(),
        stack_misses: Vec::new(),
        known: None,
        near_misses: Vec::new(),
        colds: Vec::new(),
        far: Vec::new(),
        landings: Vec::new(),
        slow_returns: Vec::new(),
        exits: Vec::new(),
        first_exit,
    };
    // Where flags are set before anything could see the old ones, both entries are one.
    let straddles = e.source.second.is_some();
    let counted = e.source.counted;
    let first = steps.iter().find(|s| s.plan.clobbers_flags() || s.plan.needs_flags || s.plan.sets_flags);
    if !straddles && !counted && first.is_some_and(|s| !s.plan.clobbers_flags() && !s.plan.needs_flags) {
        e.flags = Flags::Host;
    } else {
        e.asm.save_flags(field::FLAGS);
    }
    let entry = e.asm.code.len();
    e.check_second_page();
    e.retire();
    for (index, step) in steps.iter().enumerate() {
        e.index = index;
        e.miss = None;
        let resume = e.asm.label();
        e.step(step);
        e.keep_known(step);
        e.asm.place(resume);
        e.settle_misses(index, resume);
    }
    let last = &steps[steps.len() - 1];
    if !ends(last.plan.class) {
        e.fall_through(last.next);
    }
    e.out_of_line();
    e.asm.finish();
    Some(Piece { code: e.asm.code, host_entry: 0, entry, exits: e.exits })
}

/// Goes to page offset `target` by the jump table.
pub fn bridge(stubs: &Stubs, origin: usize, target: u16, flags_in_host: bool) -> Vec<u8> {
    let mut asm = Asm::new(origin);
    asm.load(R11, cell(field::PAGE));
    asm.lea(true, R11, Some(R11), None, target as i32);
    asm.jump_to(if flags_in_host { stubs.direct_host } else { stubs.direct });
    asm.code
}

/// The classes that emit their own exits.
fn ends(class: Class) -> bool {
    use Class::*;
    matches!(class, Jcc | Jmp | JmpIndirect | Call | CallIndirect | Ret)
}

impl Emitter<'_> {
    fn step(&mut self, step: &Step) {
        match step.plan.class {
            Class::Handler => self.handler(),
            Class::Copy => self.copy_instruction(step),
            Class::Vector => self.vector(step),
            Class::Nothing => {}
            Class::MovImmediate => self.mov_immediate(step),
            Class::Lea => self.lea(step),
            Class::Push => self.push(step),
            Class::PushMemory => self.push_memory(step),
            Class::Cli => self.cli(),
            Class::Sti => self.sti(),
            Class::PushFlags => self.push_flags(),
            Class::PopFlags => self.pop_flags(),
            Class::SwapGs => self.swap_gs(),
            Class::PushImmediate => self.push_immediate(step),
            Class::Pop => self.pop(step),
            Class::Leave => self.leave_frame(),
            Class::Widen => self.widen(step),
            Class::Spread => self.spread(step),
            Class::Multiply => self.multiply(step),
            Class::Divide(signed) => self.divide(step, signed),
            Class::Cmpxchg => self.cmpxchg(step),
            Class::Carry => self.carry(step),
            Class::Jcc => self.jcc(step),
            Class::Jmp => self.jmp(step),
            Class::JmpIndirect => self.jmp_indirect(step),
            Class::Call => self.call(step),
            Class::CallIndirect => self.call_indirect(step),
            Class::Ret => self.ret(step),
        }
        if step.plan.sets_flags && !matches!(step.plan.class, Class::Handler | Class::Divide(_) | Class::PopFlags) {
            self.flags = Flags::Host;
        }
    }

    /// A straddling block looks at its second page's generation itself; flags are in the `Cpu`.
    fn check_second_page(&mut self) {
        let Some((word, generation)) = self.source.second else { return };
        let stands = self.asm.label();
        self.asm.load_imm64(RCX, word as usize as u64);
        self.asm.modrm(&[], false, false, &[0x81], group::CMP, Rm::Mem(RCX, 4));
        self.asm.bytes(&generation.to_le_bytes());
        self.asm.jump_if(cc::E, stands);
        self.address_in_code(R11, self.source.offset as i64);
        self.asm.jump_to(self.stubs.next);
        self.asm.place(stands);
    }

    // ---- flags ---------------------------------------------------------------------------

    /// RFLAGS is about to be destroyed.
    pub(super) fn flags_to_memory(&mut self) {
        if self.flags == Flags::Host {
            self.asm.save_flags(field::FLAGS);
        }
        self.flags = Flags::Memory;
    }

    pub(super) fn flags_to_host(&mut self) {
        if self.flags == Flags::Memory {
            self.asm.load_flags(field::FLAGS);
            self.flags = Flags::Both;
        }
    }

    // ---- ways out ------------------------------------------------------------------------

    /// Where the instruction goes when its fast path does not apply; flags are in the `Cpu` then.
    pub(super) fn miss_label(&mut self) -> Label {
        if let Some(label) = self.miss {
            return label;
        }
        let label = self.asm.label();
        self.miss = Some(label);
        self.misses.push(Miss { from: label, back: true, resume: None, index: self.index, save: false, load: false });
        label
    }

    /// The instruction is complete: its misses come back here.
    fn settle_misses(&mut self, index: usize, here: Label) {
        let load = self.flags != Flags::Memory;
        for miss in self.misses.iter_mut().rev().take_while(|miss| miss.index == index) {
            if miss.back {
                (miss.resume, miss.load) = (Some(here), load);
            }
        }
    }

    fn call_out(&mut self, index: usize, stub: usize) {
        let op: *const Op = &self.source.ops[index];
        self.asm.load_imm64(RCX, op as usize as u64);
        let count = self.source.ops.len();
        self.asm.load_imm(RAX, (self.source.offset | index << 16 | count << 24) as u32);
        self.asm.call_to(stub);
    }

    /// The instruction is its handler's.
    pub(super) fn handler(&mut self) {
        self.flags_to_memory();
        self.call_out(self.index, self.stubs.call);
        self.opened = 0;
    }

    fn out_of_line(&mut self) {
        self.stack_out_of_line();
        self.near_out_of_line();
        for miss in std::mem::take(&mut self.misses) {
            self.asm.place(miss.from);
            if miss.save {
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
    fn retire(&mut self) {
        let count = self.source.ops.len() as i32;
        self.asm.alu_imm(true, group::ADD, cell(field::RETIRED), count);
        if self.source.counted {
            self.stay_within_limit(count);
        }
    }

    /// For lockstep: goes back to the loop if the block would end beyond `Out::limit`. The flags are
    /// in the `Cpu`.
    fn stay_within_limit(&mut self, count: i32) {
        let fits = self.asm.label();
        self.asm.load(RAX, cell(field::RETIRED));
        self.asm.alu(true, group::CMP, RAX, cell(field::LIMIT));
        self.asm.jump_if(cc::BE, fits);
        self.asm.alu_imm(true, group::SUB, cell(field::RETIRED), count);
        self.address_in_code(R11, self.source.offset as i64);
        self.asm.jump_to(self.stubs.next);
        self.asm.place(fits);
    }

    fn fall_through(&mut self, next: usize) {
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
        let Some((exit, cold)) = self.new_link(target) else {
            return self.go_far(target);
        };
        if target <= self.source.offset as i64 {
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
        let forward = target > self.source.offset as i64;
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
        let from =
            self.source.offset + self.source.ops[self.index].end as usize - self.source.ops[self.index].len as usize;
        self.exits.push(Exit::Indirect { from: from as u16, popped });
        (self.first_exit + self.exits.len() - 1) as i32
    }
}

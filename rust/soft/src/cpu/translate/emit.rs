//! Emit: a block's host code.
//!
//! The guest's arithmetic flags are in RFLAGS as long as possible ([`Flags`]). What destroys RFLAGS,
//! above all the look-up before a memory access, saves them first, because the access may fault.
//! A piece has two entries: one that finds the flags in RFLAGS, one that finds them in the `Cpu`.
//!
//! An instruction whose fast path does not apply (`miss`) is executed whole by its handler, out of
//! line; control comes back behind it. So nothing may be changed before the last check.

use super::asm::{cc, group, Asm, Label, Rm};
use super::classes::{plan, Class, Plan};
use super::exits::{Cold, Miss};
use super::group::{After, Group};
use super::layout::{field, host::*};
use super::link::{Exit, Site, Sites};
use super::stubs::Stubs;
use crate::cpu::block::Block;
use crate::cpu::op::Op;
use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory};
use std::sync::atomic::AtomicU64;

/// A block of what is to be translated.
pub struct Part<'a> {
    /// Its bytes.
    pub bytes: &'a [u8],
    /// Its operations, one an instruction.
    pub ops: &'a [Op],
    /// Where it begins in its page.
    pub offset: usize,
}

impl<'a> Part<'a> {
    /// A block whose first bytes are `bytes`.
    pub(crate) fn of(block: &'a Block, bytes: &'a [u8]) -> Self {
        // SAFETY: a block has `count` operations.
        let ops = unsafe { std::slice::from_raw_parts(block.ops, block.count as usize) };
        Self { bytes: &bytes[..block.bytes as usize], ops, offset: block.host as usize & 0xfff }
    }
}

/// What is to be translated.
pub struct Source<'a> {
    /// Blocks that follow each other, see `trace.rs`.
    pub parts: &'a [Part<'a>],
    /// Host address of their page.
    pub page: usize,
    /// Whether the last one's direct successors may be linked.
    pub linkable: bool,
    /// Word and generation of its second page, when it straddles two.
    pub second: Option<(*const AtomicU64, u32)>,
    /// See `Translator::counted`.
    pub counted: bool,
    /// Address of the TLB's array that it looks at, if that is one only.
    pub array: Option<i32>,
    /// Counted down each time; below zero it is time to translate the block anew.
    pub heat: Option<*mut i32>,
}

impl Source<'_> {
    /// Where it begins in its page.
    pub fn start(&self) -> usize {
        self.parts[0].offset
    }
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
    /// In neither: they are computed anew from registers, as this step did. See `again.rs`.
    Again(usize),
}

/// How control goes on behind an instruction within a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lead {
    /// To the next instruction, or out of the piece.
    Next,
    /// A branch of which the piece has what follows when it is not taken, at the next step.
    Through,
    /// The same, when it is taken.
    Taken,
}

/// One instruction of the piece.
pub(super) struct Step<'a> {
    pub ins: Instruction,
    pub plan: Plan,
    pub op: &'a Op,
    /// Page offset of its block, which its operation counts from.
    pub block: usize,
    /// Page offset of the next instruction in memory.
    pub next: usize,
    pub lead: Lead,
}

pub(super) struct Emitter<'a> {
    pub asm: Asm,
    pub source: Source<'a>,
    pub stubs: &'a Stubs,
    pub sites: &'a mut Sites,
    pub flags: Flags,
    /// The step that set the flags, if they can be had again.
    pub again: Option<usize>,
    /// Index of the instruction in work.
    pub index: usize,
    /// How far the vector registers are known to be open.
    pub opened: u8,
    /// The block's instructions.
    pub steps: &'a [Step<'a>],
    /// The last of its blocks in the page: what does not lead beyond it may be a cycle.
    pub highest: usize,
    /// The cold copies of groups are in work.
    pub cold: bool,
    pub groups: Vec<Group>,
    /// The state behind each instruction.
    pub after: Vec<After>,
    /// The miss label of the instruction in work, once it has one.
    pub miss: Option<Label>,
    pub misses: Vec<Miss>,
    pub stack_misses: Vec<super::memory::StackMiss>,
    pub seconds: Vec<super::memory::Second>,
    /// What R11 is, if that is good for more.
    pub known: Option<super::near::Known>,
    pub near_misses: Vec<super::near::NearMiss>,
    pub colds: Vec<Cold>,
    pub asides: Vec<super::trace::Aside>,
    /// Where it turns out that the block is hot.
    pub hot: Option<Label>,
    /// Branches to other pages: where they miss, their sites, where they lead.
    pub far: Vec<(Label, *mut Site, i64)>,
    /// Where RETs come back to, and the page offset that is.
    pub landings: Vec<(Label, usize)>,
    /// Indirect branches that found nothing by themselves, and their exits.
    pub slow_returns: Vec<(Label, i32)>,
    pub exits: Vec<Exit>,
    pub first_exit: usize,
}

fn analyse<'a>(part: &Part<'a>, factory: &mut InstructionInfoFactory, steps: &mut Vec<Step<'a>>) {
    let mut decoder = Decoder::with_ip(64, part.bytes, part.offset as u64, DecoderOptions::NONE);
    let mut start = 0;
    for op in part.ops {
        let ins = decoder.decode();
        let offsets = decoder.get_constant_offsets(&ins);
        let bytes = &part.bytes[start..start + ins.len()];
        start += ins.len();
        let plan = plan(&ins, bytes, &offsets, factory);
        steps.push(Step { ins, plan, op, block: part.offset, next: part.offset + start, lead: Lead::Next });
    }
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
    let mut steps = Vec::with_capacity(64);
    for (index, part) in source.parts.iter().enumerate() {
        analyse(part, factory, &mut steps);
        if let Some(next) = source.parts.get(index + 1) {
            super::trace::join(steps.last_mut()?, next.offset)?;
        }
    }
    let highest = source.parts.iter().map(|part| part.offset).max()?;
    let mut e = Emitter {
        asm: Asm::new(origin),
        source,
        stubs,
        sites,
        flags: Flags::Memory,
        again: None,
        index: 0,
        opened: 0,
        steps: &steps,
        highest,
        cold: false,
        groups: Vec::new(),
        after: Vec::with_capacity(steps.len()),
        miss: None,
        misses: Vec::new(),
        stack_misses: Vec::new(),
        seconds: Vec::new(),
        known: None,
        near_misses: Vec::new(),
        colds: Vec::new(),
        asides: Vec::new(),
        hot: None,
        far: Vec::new(),
        landings: Vec::new(),
        slow_returns: Vec::new(),
        exits: Vec::new(),
        first_exit,
    };
    let (host_entry, entry) = e.entries();
    for index in 0..steps.len() {
        let after = e.one(index);
        e.after.push(after);
    }
    let last = &steps[steps.len() - 1];
    if !ends(last.plan.class) {
        e.fall_through(last.next);
    }
    e.out_of_line();
    e.asm.finish();
    Some(Piece { code: e.asm.code, host_entry, entry, exits: e.exits })
}

/// The classes that emit their own exits.
pub(super) fn ends(class: Class) -> bool {
    use Class::*;
    matches!(class, Jcc | Jmp | JmpIndirect | Call | CallIndirect | Ret)
}

impl Emitter<'_> {
    /// The piece's two entries: with the flags in RFLAGS, and in the `Cpu`.
    fn entries(&mut self) -> (usize, usize) {
        let first = self.steps.iter().map(|s| &s.plan).find(|p| p.clobbers_flags() || p.needs_flags || p.sets_flags);
        let fixed = self.source.second.is_some() || self.source.counted || self.source.heat.is_some();
        match first.filter(|plan| !fixed && !plan.clobbers_flags()) {
            Some(plan) if plan.needs_flags => {
                self.asm.load_flags(field::FLAGS);
                let host_entry = self.asm.code.len();
                self.flags = Flags::Host;
                self.retire_quietly();
                return (host_entry, 0);
            }
            Some(_) => {
                // Flags are set before anything could see the old ones: both entries are one.
                self.flags = Flags::Host;
                self.retire();
                return (0, 0);
            }
            None => {}
        }
        self.asm.save_flags(field::FLAGS);
        let entry = self.asm.code.len();
        self.check_second_page();
        self.retire();
        self.heat();
        (0, entry)
    }

    /// Instruction `index`.
    pub(super) fn one(&mut self, index: usize) -> After {
        let step = &self.steps[index];
        self.index = index;
        self.miss = None;
        let (label, misses) = (self.asm.label(), self.misses.len());
        self.step(step);
        self.keep_known(step);
        self.keep_again(step);
        self.asm.place(label);
        self.settle_misses(misses, label);
        After { label, flags: self.flags }
    }

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
            Class::Jcc if step.lead != Lead::Next => self.jcc_aside(step),
            Class::Jmp if step.lead != Lead::Next => {}
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
        self.address_in_code(R11, self.source.start() as i64);
        self.asm.jump_to(self.stubs.next);
        self.asm.place(stands);
    }

    // ---- flags ---------------------------------------------------------------------------

    /// RFLAGS is about to be destroyed.
    pub(super) fn flags_to_memory(&mut self) {
        if let Flags::Again(of) = self.flags {
            self.compute_again(of);
            self.flags = Flags::Host;
        }
        if self.flags == Flags::Host {
            self.asm.save_flags(field::FLAGS);
        }
        self.flags = Flags::Memory;
    }

    pub(super) fn flags_to_host(&mut self) {
        match self.flags {
            Flags::Memory => {
                self.asm.load_flags(field::FLAGS);
                self.flags = Flags::Both;
            }
            Flags::Again(of) => {
                self.compute_again(of);
                self.flags = Flags::Host;
            }
            Flags::Host | Flags::Both => {}
        }
    }
}

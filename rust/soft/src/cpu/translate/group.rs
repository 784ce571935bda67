//! Analyse and emit: one check for several accesses by the same base register.
//!
//! Code mostly touches several fields of an object, or pushes several registers, one after the other. The first
//! such access looks up all the bytes that the others will touch as well; when they lie in one page, and all that
//! is to be done there is allowed, the others need no check at all: R11 keeps the host's address, and they are
//! copied with `[r11 + distance]`. They cannot fault, so they leave the flags where they are.
//!
//! Where the check fails (no TLB entry yet, two pages, a device), a second, cold copy of these instructions does
//! it one by one, and comes back behind the last of them.

use super::asm::{cell, Label, Rm};
use super::classes::Class;
use super::emit::{ends, Emitter, Flags, Lead, Step};
use super::layout::{field, host::*};
use super::memory::RSP_NUMBER as RSP_BASE;
use super::near::{Known, Place};
use super::shape::home;
use crate::cpu::state::seg;
use iced_x86::{Mnemonic, OpKind, Register};

/// Most bytes of a group: the more there are, the more often they lie in two pages.
const SPAN: i32 = 128;
/// Most instructions that are looked at ahead.
const AHEAD: usize = 32;

/// What the accesses of a group touch, as displacements from the first one's base register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reach {
    /// The lowest byte.
    pub from: i32,
    /// Behind the highest.
    pub to: i32,
    /// One of them stores.
    pub write: bool,
}

impl Reach {
    /// With another access, whose base is `by` more by then; `None` where that is too far.
    fn wider(self, by: i32, access: &Access) -> Option<Self> {
        let from = access.place.displacement.checked_add(by)?;
        let to = from.checked_add(access.size)?.max(self.to);
        let from = from.min(self.from);
        let near = to.checked_sub(from).is_some_and(|span| span <= SPAN);
        near.then_some(Self { from, to, write: self.write | access.write })
    }
}

/// A group that was emitted.
pub(super) struct Group {
    /// Where its check fails.
    pub from: Label,
    /// Its instructions.
    pub first: usize,
    pub last: usize,
    /// What was open before the first.
    pub opened: u8,
    /// Where the flags were, and which step they could be had again from.
    pub flags: Flags,
    pub again: Option<usize>,
}

/// The state behind an instruction.
#[derive(Clone, Copy)]
pub(super) struct After {
    pub label: Label,
    pub flags: Flags,
}

/// What an instruction does to a base register.
pub(super) enum Move {
    /// Adds this.
    By(i32),
    /// Nothing can be said.
    Lost,
}

/// One access by base and displacement.
#[derive(Clone, Copy)]
struct Access {
    place: Place,
    size: i32,
    write: bool,
}

/// How `step` moves guest register `base`.
pub(super) fn moved(step: &Step, base: usize) -> Move {
    let rsp = match step.plan.class {
        Class::Push | Class::PushImmediate => -8,
        Class::Pop => 8,
        _ => 0,
    };
    let written = step.plan.operands.iter().flatten().any(|o| o.written && o.gpr() == Some(base));
    if !written {
        return Move::By(if base == RSP_BASE { rsp } else { 0 });
    }
    constant_move(step, base).map_or(Move::Lost, Move::By)
}

/// What a 64-bit addition of a constant adds.
fn constant_move(step: &Step, base: usize) -> Option<i32> {
    let ins = &step.ins;
    if step.plan.operands[0]?.size != 8 {
        return None;
    }
    let immediate = |index| match ins.op_kind(index) {
        OpKind::Immediate8to64 | OpKind::Immediate32to64 => i32::try_from(ins.immediate(index) as i64).ok(),
        _ => None,
    };
    let by = match ins.mnemonic() {
        Mnemonic::Add => immediate(1),
        Mnemonic::Sub => immediate(1).and_then(i32::checked_neg),
        Mnemonic::Inc => Some(1),
        Mnemonic::Dec => Some(-1),
        Mnemonic::Lea if ins.memory_index() == Register::None && ins.memory_base().is_gpr64() => {
            let same = ins.memory_base().number() == base;
            same.then_some(ins.memory_displacement64() as i64 as i32)
        }
        _ => None,
    };
    by.filter(|by| by.unsigned_abs() < 1 << 12)
}

/// Classes between which R11 may stay what it is.
fn keeps_r11(step: &Step) -> bool {
    use Class::*;
    let simple = matches!(step.plan.class, Copy | Vector | MovImmediate | Lea | Nothing | Carry | Widen | Spread);
    (simple || step.lead != Lead::Next) && !super::copies::takes_r11(step)
}

impl Emitter<'_> {
    /// The one access that a step makes, if a group may have it.
    fn access_of(&self, step: &Step) -> Option<Access> {
        let stack =
            |displacement, write| Some(Access { place: Place { base: RSP_BASE, displacement }, size: 8, write });
        match step.plan.class {
            Class::Push | Class::PushImmediate | Class::Call => stack(-8, true),
            Class::Pop | Class::Ret => stack(0, false),
            Class::Copy | Class::Vector => {
                let operand = step.plan.operands[step.plan.memory?]?;
                let size = step.ins.memory_size().size();
                let single = size.is_power_of_two() && size <= 32 && super::copies::alignment(step) == 1;
                let place = self.place_at(step).filter(|_| single)?;
                Some(Access { place, size: size as i32, write: operand.written })
            }
            _ => None,
        }
    }

    /// What the instructions from `index` on touch by way of `place`'s base, its own `size` bytes included; `None`
    /// where there is nothing more.
    pub(super) fn reach(&self, place: Place, size: i32, write: bool) -> Option<Reach> {
        if self.cold {
            return None;
        }
        // Others do more than this one access, before it or after.
        self.access_of(&self.steps[self.index]).filter(|own| own.place == place)?;
        let mut reach = Reach { from: place.displacement, to: place.displacement.checked_add(size)?, write };
        let Move::By(mut by) = moved(&self.steps[self.index], place.base) else { return None };
        let mut more = false;
        let ahead = self.steps.len().min(self.index + AHEAD);
        for index in self.index + 1..ahead {
            let step = &self.steps[index];
            match self.access_of(step).filter(|access| access.place.base == place.base) {
                Some(access) => match reach.wider(by, &access) {
                    Some(wider) => (reach, more) = (wider, true),
                    None => break,
                },
                None if !keeps_r11(step) || step.plan.memory.is_some() && step.plan.class != Class::Lea => break,
                None => {}
            }
            match moved(step, place.base) {
                Move::By(distance) => by += distance,
                Move::Lost => break,
            }
        }
        more.then_some(reach)
    }

    /// The operand of an access that a group's check has covered.
    pub(super) fn covered(&mut self, place: Place, size: usize, write: bool) -> Option<Rm> {
        let known = self.known.filter(|known| known.place.base == place.base && (known.write || !write))?;
        let (group, span) = known.group?;
        let distance = place.displacement.checked_sub(known.place.displacement)?;
        if distance < 0 || distance + size as i32 > span {
            return None;
        }
        self.groups[group].last = self.index;
        Some(Rm::Mem(R11, distance))
    }

    /// Begins a group: R11 becomes the host's address of its lowest byte. Gives the operand of its first access.
    pub(super) fn begin_group(&mut self, place: Place, reach: Reach) -> Rm {
        let from = self.asm.label();
        let lowest = Place { displacement: reach.from, ..place };
        self.load_place(lowest);
        let span = (reach.to - reach.from) as usize;
        if place.base == RSP_BASE {
            self.stack_span(from, span);
        } else {
            self.look_up(from, span, reach.write);
        }
        let (opened, flags, again) = (self.opened, self.flags, self.again);
        self.groups.push(Group { from, first: self.index, last: self.index, opened, flags, again });
        let group = Some((self.groups.len() - 1, span as i32));
        self.known = Some(Known { place: lowest, write: reach.write || place.base == RSP_BASE, group });
        Rm::Mem(R11, place.displacement - reach.from)
    }

    /// R11 = the linear address of a place.
    pub(super) fn load_place(&mut self, place: Place) {
        let base = if place.base == super::near::PAGE { cell(field::PAGE) } else { home(place.base) };
        match base {
            Rm::Reg(reg) => self.asm.lea(true, R11, Some(reg), None, place.displacement),
            slot => {
                self.asm.load(R11, slot);
                if place.displacement != 0 {
                    self.asm.lea(true, R11, Some(R11), None, place.displacement);
                }
            }
        }
    }

    /// The cold copies.
    pub(super) fn groups_out_of_line(&mut self) {
        self.cold = true;
        for group in std::mem::take(&mut self.groups) {
            self.asm.place(group.from);
            (self.flags, self.again, self.opened, self.known) = (group.flags, group.again, group.opened, None);
            for index in group.first..=group.last {
                self.one(index);
            }
            if ends(self.steps[group.last].plan.class) {
                continue;
            }
            let After { label, flags } = self.after[group.last];
            self.flags_as(flags);
            self.asm.jump(label);
        }
    }
}

/// The segments whose bases are zero in 64-bit code.
pub(super) fn flat(segment: usize) -> bool {
    segment != seg::FS && segment != seg::GS
}

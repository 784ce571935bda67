//! Emit: accesses near one before, by the same base register.
//!
//! After an access R11 is the host's address of its operand. Fields of one object mostly lie in one page, and
//! then the next field is at a known distance from there:
//!
//! ```text
//! ((r11 + distance + size - 1) ^ r11) & !0xfff == 0, else look up as ever
//! r11 += distance
//! ```
//!
//! Where the handler did the instruction before, R11 is -1: any distance forward leaves that page, and those
//! back look at the sign. What was checked for stores may be loaded from, not the other way round.

use super::asm::{cc, group, Label, Rm};
use super::classes::Class;
use super::emit::{Emitter, Lead, Step};
use super::group::{flat, moved, Move};
use super::layout::host::*;
use crate::cpu::op::{ADDR16, ADDR32};
use iced_x86::Register;

/// The base that stands for RIP; its displacements are page offsets.
pub(super) const PAGE: usize = 16;
/// Sign.
const S: u8 = 8;

/// An address by a base register, which is nothing but base and displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub base: usize,
    pub displacement: i32,
}

/// What R11 is the host's address of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub place: Place,
    /// Stores are allowed there.
    pub write: bool,
    /// The group whose check this was, and how many bytes from there on it covered.
    pub group: Option<(usize, i32)>,
}

/// An access that turned out not to be near.
pub(super) struct NearMiss {
    from: Label,
    back: Label,
    miss: Label,
    place: Place,
    size: usize,
    write: bool,
}

impl Emitter<'_> {
    /// The operand's address, if it is so simple.
    pub(super) fn place_at(&self, step: &Step) -> Option<Place> {
        let ins = &step.ins;
        let op = step.op;
        let plain = ins.memory_index() == Register::None && op.flags & (ADDR32 | ADDR16) == 0 && flat(op.seg());
        let base = match ins.memory_base() {
            Register::RIP => PAGE,
            base if base.is_gpr64() => base.number(),
            _ => return None,
        };
        plain.then_some(Place { base, displacement: ins.memory_displacement64() as i64 as i32 })
    }

    /// R11 moves on to `place`, if it can be so: `false` where it must be looked up.
    pub(super) fn near(&mut self, place: Place, size: usize, write: bool) -> bool {
        let Some(known) = self
            .known
            .filter(|known| known.group.is_none() && known.place.base == place.base && (known.write || !write))
        else {
            return false;
        };
        let distance = place.displacement as i64 - known.place.displacement as i64;
        let forward = distance >= 0 && distance + size as i64 > 1;
        if !(-4096..4096).contains(&distance)
            || !(forward || distance <= -(size as i64))
            || !size.is_power_of_two()
            || size > 32
        {
            return false;
        }
        let (miss, from, back) = (self.miss_label(), self.asm.label(), self.asm.label());
        if !forward {
            self.asm.modrm(&[], true, false, &[0x85], R11, Rm::Reg(R11)); // test r11, r11
            self.asm.jump_if(S, from);
        }
        let reach = distance + if forward { size as i64 - 1 } else { 0 };
        self.asm.lea(false, RAX, Some(R11), None, reach as i32);
        self.asm.alu(false, group::XOR, RAX, Rm::Reg(R11));
        self.asm.alu_imm(false, group::AND, Rm::Reg(RAX), -4096);
        self.asm.jump_if(cc::NE, from);
        if distance != 0 {
            self.asm.lea(true, R11, Some(R11), None, distance as i32);
        }
        self.asm.place(back);
        // What is known stays as strong as it was.
        self.near_misses.push(NearMiss { from, back, miss, place, size, write: known.write });
        self.known = Some(Known { place, ..known });
        true
    }

    /// The out-of-line parts.
    pub(super) fn near_out_of_line(&mut self) {
        for NearMiss { from, back, miss, place, size, write } in std::mem::take(&mut self.near_misses) {
            self.asm.place(from);
            self.load_place(place);
            self.asm.call_to(self.stubs.access[write as usize][size.trailing_zeros() as usize]);
            self.asm.jump_if(cc::E, back);
            self.asm.jump(miss);
        }
    }

    /// After an instruction: whether R11 is still what it was, and the base too.
    pub(super) fn keep_known(&mut self, step: &Step) {
        use Class::*;
        let Some(known) = &mut self.known else { return };
        let keeps = matches!(
            step.plan.class,
            Copy | Vector | MovImmediate | Lea | Nothing | Carry | Widen | Spread | Push | PushImmediate | Pop
        );
        let keeps = keeps || step.lead != Lead::Next;
        match moved(step, known.place.base) {
            Move::By(distance) if keeps => match known.place.displacement.checked_sub(distance) {
                Some(displacement) => known.place.displacement = displacement,
                None => self.known = None,
            },
            _ => self.known = None,
        }
    }
}

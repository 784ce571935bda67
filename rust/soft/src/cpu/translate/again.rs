//! Analyse and emit: flags that are not saved before a look-up destroys them, because they can be had again.
//!
//! After a comparison or simple arithmetic the flags follow from registers, and these mostly hold still until nobody
//! wants the flags any more. Then only the cold paths, which must have them in the `Cpu`, and what reads them after
//! all compute them anew ([`Flags::Again`]); elsewhere they are saved, as ever.
//!
//! | after | computed anew by |
//! |---|---|
//! | CMP, TEST | the same |
//! | AND, OR, XOR | TEST of the result with itself |
//! | ADD, SUB | doing it to what it was done to, which is the result less the other operand, or with it |

use super::asm::{group, Rm};
use super::classes::Class;
use super::emit::{ends, Emitter, Flags, Lead, Step};
use super::layout::{field, host::*};
use super::memory::RSP_NUMBER;
use super::shape::home;
use iced_x86::Mnemonic;

/// How flags are computed anew.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Same,
    Test,
    Undo,
}

/// How those that `step` sets are, if they can be.
fn how(step: &Step) -> Option<How> {
    let [first, second, ..] = step.plan.operands;
    let first = first?;
    let plain = step.plan.class == Class::Copy && step.plan.memory.is_none() && first.gpr().is_some();
    if !plain || step.plan.operands.iter().flatten().any(|operand| operand.high_byte()) {
        return None;
    }
    match step.ins.mnemonic() {
        Mnemonic::Cmp | Mnemonic::Test => Some(How::Same),
        Mnemonic::And | Mnemonic::Or | Mnemonic::Xor => Some(How::Test),
        Mnemonic::Add | Mnemonic::Sub if first.size >= 4 && second?.gpr() != first.gpr() => Some(How::Undo),
        _ => None,
    }
}

/// Whether `step` may change what the flags that `of` set are computed from.
fn disturbs(step: &Step, of: &Step) -> bool {
    let from = match how(of) {
        Some(How::Test) => [of.plan.operands[0], None],
        _ => [of.plan.operands[0], of.plan.operands[1]],
    };
    from.iter().flatten().filter_map(|operand| operand.gpr()).any(|guest| changes(step, guest))
}

fn changes(step: &Step, guest: usize) -> bool {
    use Class::*;
    let named = || step.plan.operands.iter().flatten().any(|o| o.written && o.gpr() == Some(guest));
    match step.plan.class {
        Nothing | Jcc | Jmp | Carry => false,
        Copy | Vector | MovImmediate | Lea => named(),
        Widen => guest == 0,
        Spread => guest == 2,
        Push | PushImmediate | PushMemory => guest == RSP_NUMBER,
        Pop => guest == RSP_NUMBER || named(),
        _ => true,
    }
}

/// It sets all flags without a look at the old ones, and nobody else may see these before.
fn overwrites(step: &Step) -> bool {
    step.plan.sets_flags && !step.plan.needs_flags && !step.plan.clobbers_flags()
}

/// It leaves the flags alone, and nobody can see them meanwhile.
fn indifferent(step: &Step) -> bool {
    use Class::*;
    let quiet = matches!(step.plan.class, Copy | Nothing | MovImmediate | Lea | Widen | Spread)
        || step.plan.class == Jmp && step.lead != Lead::Next;
    quiet && !step.plan.clobbers_flags() && !step.plan.sets_flags && !step.plan.needs_flags
}

/// Its emitter can do with flags that are nowhere while it looks up.
fn bears_it(step: &Step) -> bool {
    use Class::*;
    let class = step.plan.class;
    let one_access =
        matches!(class, Copy | Vector | Push | PushImmediate | PushMemory | Pop | Multiply | Cmpxchg | Carry);
    one_access || matches!(class, Nothing | MovImmediate | Lea | Widen | Spread) || matches!(class, Jcc | Jmp)
}

impl Emitter<'_> {
    /// RFLAGS is about to be destroyed by a look-up of the instruction in work.
    pub(super) fn flags_may_go(&mut self) {
        match (self.flags, self.again) {
            (Flags::Again(_), _) => {}
            (Flags::Host, Some(of)) if self.lasts(of) => self.flags = Flags::Again(of),
            _ => self.flags_to_memory(),
        }
    }

    /// The instruction in work is complete: whether the flags can still be had again.
    pub(super) fn keep_again(&mut self, step: &Step) {
        self.again = match step.plan.sets_flags {
            true => how(step).map(|_| self.index),
            false => self.again.filter(|&of| !disturbs(step, &self.steps[of])),
        };
    }

    /// From the instruction in work on, whether the flags that step `of` set can be had again wherever they may be
    /// wanted.
    fn lasts(&self, of: usize) -> bool {
        let of = &self.steps[of];
        for (ahead, step) in self.steps[self.index..].iter().enumerate() {
            if ahead > 0 && overwrites(step) {
                return true;
            }
            if !bears_it(step) {
                return false;
            }
            // It has them again before it changes anything.
            if step.plan.needs_flags || step.plan.sets_flags {
                return true;
            }
            if disturbs(step, of) {
                let next = self.steps[self.index + ahead + 1..].iter().find(|step| !indifferent(step));
                return next.is_some_and(overwrites);
            }
        }
        self.steps.last().is_some_and(|last| !ends(last.plan.class) || last.plan.class == Class::Jmp)
    }

    /// RFLAGS = what step `of` set. Changes RAX.
    pub(super) fn compute_again(&mut self, of: usize) {
        let step = &self.steps[of];
        let (Some(how), Some(first)) = (how(step), step.plan.operands[0]) else { return };
        let Some(result) = first.gpr().map(home) else { return };
        let wide = first.size == 8;
        match how {
            How::Same => self.copy(step, None),
            How::Test => {
                let reg = self.in_register(result, RAX);
                let prefixes: &[u8] = if first.size == 2 { &[0x66] } else { &[] };
                let opcode = if first.size == 1 { 0x84 } else { 0x85 };
                self.asm.modrm(prefixes, wide, first.size == 1, &[opcode], reg, Rm::Reg(reg));
            }
            How::Undo => {
                self.asm.load(RAX, result);
                let other = step.plan.operands[1].and_then(|operand| operand.gpr()).map(home);
                let turns = match step.ins.mnemonic() {
                    Mnemonic::Add => [group::SUB, group::ADD],
                    _ => [group::ADD, group::SUB],
                };
                for operation in turns {
                    match other {
                        Some(other) => self.asm.alu(wide, operation, RAX, other),
                        None => self.asm.alu_imm(wide, operation, Rm::Reg(RAX), step.ins.immediate(1) as i32),
                    }
                }
            }
        }
    }

    /// Puts the flags where they are at a place that is jumped to.
    pub(super) fn flags_as(&mut self, flags: Flags) {
        match flags {
            // That place has them again from registers.
            Flags::Again(_) => {}
            Flags::Host => self.flags_to_host(),
            Flags::Memory => self.flags_to_memory(),
            Flags::Both => {
                self.flags_to_host();
                if self.flags == Flags::Host {
                    self.asm.save_flags(field::FLAGS);
                }
                self.flags = Flags::Both;
            }
        }
    }
}

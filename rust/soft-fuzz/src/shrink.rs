//! Making a mismatch small: instructions go as long as it stays, then registers and memory become
//! zero where they can.

use crate::layout::*;
use crate::sequence::Sequence;

/// A sequence with what it starts from.
#[derive(Clone)]
pub struct Subject {
    /// 64 or 32.
    pub bits: u32,
    /// The instructions.
    pub sequence: Sequence,
    /// The registers; `rip` is its place.
    pub state: State,
    /// Seed of the memory's contents.
    pub fill: u64,
}

impl Subject {
    /// Laid out and ready to run.
    pub fn case(&self) -> Case {
        let (code, starts) = self.sequence.lay_out(self.state.rip);
        Case { bits: self.bits, code, starts, state: self.state.clone(), fill: self.fill, pokes: Vec::new() }
    }
}

/// The smallest subject found for which `fails` still holds.
pub fn shrink(mut subject: Subject, mut fails: impl FnMut(&Case) -> bool) -> Subject {
    while drop_one(&mut subject, &mut fails) {}
    for register in 0..16 {
        attempt(&mut subject, &mut fails, |s| s.state.gpr[register] = 0);
    }
    attempt(&mut subject, &mut fails, |s| s.state.rflags = 0x202);
    attempt(&mut subject, &mut fails, |s| s.fill = 0);
    attempt(&mut subject, &mut fails, |s| s.state.fx = State::default().fx);
    for slot in (fx::ST..fx::END).step_by(16) {
        attempt(&mut subject, &mut fails, |s| s.state.fx[slot..slot + 16].fill(0));
    }
    let area = if subject.state.rip >= PATCH { PATCH } else { CODE };
    attempt(&mut subject, &mut fails, |s| s.state.rip = area + 0x100);
    subject
}

fn drop_one(subject: &mut Subject, fails: &mut impl FnMut(&Case) -> bool) -> bool {
    let mut index = subject.sequence.items.len();
    while index > 0 {
        let (from, to) = subject.sequence.group(index - 1);
        index = from;
        let smaller = Subject { sequence: subject.sequence.without(from, to), ..subject.clone() };
        if fails(&smaller.case()) {
            *subject = smaller;
            return true;
        }
    }
    false
}

fn attempt(subject: &mut Subject, fails: &mut impl FnMut(&Case) -> bool, change: impl FnOnce(&mut Subject)) {
    let mut changed = subject.clone();
    change(&mut changed);
    if fails(&changed.case()) {
        *subject = changed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sequence::Item;

    #[test]
    fn test_shrink_keeps_only_what_the_failure_needs() {
        let items = (0..6u8).map(|n| Item { bytes: vec![0xb0 | n, 1], ..Item::default() }).collect();
        let state = State { gpr: [7; 16], rip: CODE, ..State::default() };
        let subject = Subject { bits: 64, sequence: Sequence { items }, state, fill: 5 };

        let small = shrink(subject, |case| case.code.contains(&0xb3) && case.state.gpr[2] == 7);

        assert_eq!(small.case().code, [0xb3, 1]);
        assert_eq!((small.state.gpr[2], small.state.gpr[3], small.fill), (7, 0, 0));
    }
}

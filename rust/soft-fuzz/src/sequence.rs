//! Sequences before they have an address: items that can be removed one by one, because branches
//! name items and RIP-relative operands name targets.

/// Where a branch or a code address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jump {
    /// Offset of the field in the item's bytes.
    pub at: usize,
    /// What the field holds.
    pub field: Field,
    /// The item; the number of items means the end.
    pub target: usize,
}

/// Kinds of fields that depend on an item's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// Relative to the instruction's end, 8 bits.
    Relative8,
    /// Relative to the instruction's end, 32 bits.
    Relative32,
    /// Absolute, 32 bits.
    Absolute32,
    /// The same, this many bytes behind.
    Address(u8),
}

/// One instruction.
#[derive(Clone, Debug, Default)]
pub struct Item {
    /// Its bytes, fields not yet filled in.
    pub bytes: Vec<u8>,
    /// A RIP-relative displacement: its offset, the address it leads to.
    pub rip: Option<(usize, u64)>,
    /// A code address.
    pub jump: Option<Jump>,
    /// Goes with the item before it: no branch leads here, and neither is tried without the other.
    pub glued: bool,
}

/// Instructions in order.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    /// The items.
    pub items: Vec<Item>,
}

impl Sequence {
    /// The bytes at address `rip`, and the offset of each item. A short branch that does not reach
    /// its target leads to the next instruction instead.
    pub fn lay_out(&self, rip: u64) -> (Vec<u8>, Vec<usize>) {
        let mut offsets = Vec::with_capacity(self.items.len() + 1);
        let mut at = 0;
        for item in &self.items {
            offsets.push(at);
            at += item.bytes.len();
        }
        offsets.push(at);
        let mut code = Vec::with_capacity(at);
        for item in &self.items {
            let start = code.len();
            code.extend_from_slice(&item.bytes);
            let end = rip + code.len() as u64;
            if let Some((field, target)) = item.rip {
                let displacement = target.wrapping_sub(end) as u32;
                code[start + field..start + field + 4].copy_from_slice(&displacement.to_le_bytes());
            }
            if let Some(jump) = item.jump {
                let target = rip + offsets[jump.target.min(self.items.len())] as u64;
                fill(&mut code[start + jump.at..], jump.field, target, end);
            }
        }
        offsets.pop();
        (code, offsets)
    }

    /// The sequence without items `from..to`; branches to them lead to what follows.
    pub fn without(&self, from: usize, to: usize) -> Self {
        let mut items = self.items.clone();
        items.drain(from..to);
        for jump in items.iter_mut().filter_map(|item| item.jump.as_mut()) {
            jump.target = match jump.target {
                target if target >= to => target - (to - from),
                target => target.min(from),
            };
        }
        Self { items }
    }

    /// First and last-plus-one item of the group that holds item `index`.
    pub fn group(&self, index: usize) -> (usize, usize) {
        let mut from = index;
        while self.items[from].glued && from > 0 {
            from -= 1;
        }
        let mut to = index + 1;
        while to < self.items.len() && self.items[to].glued {
            to += 1;
        }
        (from, to)
    }
}

fn fill(code: &mut [u8], field: Field, target: u64, end: u64) {
    match field {
        Field::Relative8 => code[0] = i8::try_from(target.wrapping_sub(end) as i64).unwrap_or(0) as u8,
        Field::Relative32 => code[..4].copy_from_slice(&(target.wrapping_sub(end) as u32).to_le_bytes()),
        Field::Absolute32 => code[..4].copy_from_slice(&(target as u32).to_le_bytes()),
        Field::Address(plus) => code[..4].copy_from_slice(&(target as u32 + plus as u32).to_le_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(bytes: &[u8], target: Option<usize>) -> Item {
        let jump = target.map(|target| Jump { at: 1, field: Field::Relative8, target });
        Item { bytes: bytes.to_vec(), jump, ..Item::default() }
    }

    #[test]
    fn test_without_moves_branch_targets() {
        let sequence = Sequence { items: vec![item(&[0xeb, 0], Some(2)), item(&[0x90], None), item(&[0x90], None)] };
        assert_eq!(sequence.lay_out(0x1000), (vec![0xeb, 1, 0x90, 0x90], vec![0, 2, 3]));

        let shorter = sequence.without(1, 2);

        assert_eq!(shorter.lay_out(0x1000), (vec![0xeb, 0, 0x90], vec![0, 2]));
    }
}

//! Programs whose shape matters to a translator: loops, branches both ways, calls and returns, jump
//! tables, several pages of code, and code that changes itself. What stands in between is made as
//! straight sequences are (`generate.rs`).
//!
//! Counters, saved stack pointers and tables lie in cells below the part of the data area that random
//! operands lead to. Labels are numbers counted down from [`LABELS`] until the sequence is complete.

use crate::generate::Generator;
use crate::layout::*;
use crate::sequence::{Field, Item, Jump, Sequence};
use crate::values::Kind;

/// Jump targets above this are labels; `usize::MAX` means "anywhere near".
const LABELS: usize = usize::MAX - 1;
const MOST_LABELS: usize = 1 << 16;
/// Offset in the data area of the first cell.
const CELLS: u64 = 0x10;
const LAST_CELL: u64 = 0x3f0;
/// Statements nest at most this deep.
const DEPTH: u32 = 2;
/// Two-byte instructions that one another may be replaced by: opcodes with two 32-bit registers.
const ALIKE: [u8; 10] = [0x01, 0x09, 0x11, 0x19, 0x21, 0x29, 0x31, 0x39, 0x85, 0x89];

/// What may be changed about an instruction.
#[derive(Clone, Copy)]
enum Part {
    /// An immediate of four bytes at this offset.
    Immediate(u8),
    /// All of a two-byte instruction.
    Whole,
    /// A branch's condition.
    Condition,
}

/// An instruction that others change.
struct Point {
    label: usize,
    part: Part,
    emitted: bool,
}

struct Shaper<'g, 'a> {
    g: &'g mut Generator<'a>,
    /// Item of each label.
    labels: Vec<usize>,
    functions: Vec<usize>,
    points: Vec<Point>,
    cell: u64,
}

impl Generator<'_> {
    /// A program with a shape; where `changing`, one that changes itself.
    pub fn shaped(&mut self, changing: bool) -> (Sequence, [Kind; 16]) {
        self.bits = 64;
        let kinds = self.begin();
        let mut shaper = Shaper { g: self, labels: Vec::new(), functions: Vec::new(), points: Vec::new(), cell: CELLS };
        shaper.program(changing);
        let labels = shaper.labels;
        self.aim_branches();
        for jump in self.items.iter_mut().filter_map(|item| item.jump.as_mut()) {
            if jump.target > LABELS - MOST_LABELS {
                jump.target = labels[LABELS - jump.target];
            }
        }
        (Sequence { items: std::mem::take(&mut self.items) }, kinds)
    }
}

impl Shaper<'_, '_> {
    fn program(&mut self, changing: bool) {
        for _ in 0..if changing { 1 + self.g.rng.below(4) } else { 0 } {
            let label = self.label();
            let part = match self.g.rng.below(6) {
                0 => Part::Whole,
                1 => Part::Condition,
                2 => Part::Immediate(7),
                3 => Part::Immediate(1),
                _ => Part::Immediate(2),
            };
            self.points.push(Point { label, part, emitted: false });
        }
        for _ in 0..1 + self.g.rng.below(2) {
            let label = self.label();
            self.functions.push(label);
        }
        self.statements(DEPTH);
        if changing {
            self.repeat(0);
        }
        let end = self.label();
        self.jump(&[0xe9], end);
        for function in self.functions.clone() {
            self.function(function);
        }
        for index in 0..self.points.len() {
            self.point(index);
        }
        self.place(end);
    }

    // ---- labels, cells, items --------------------------------------------------------------

    fn label(&mut self) -> usize {
        self.labels.push(0);
        LABELS - (self.labels.len() - 1)
    }

    fn place(&mut self, label: usize) {
        self.labels[LABELS - label] = self.g.items.len();
    }

    fn cell(&mut self) -> [u8; 4] {
        let at = DATA + self.cell;
        self.cell = if self.cell + 8 > LAST_CELL { CELLS } else { self.cell + 8 };
        (at as u32).to_le_bytes()
    }

    fn bytes(&mut self, parts: &[&[u8]]) {
        self.g.raw(&parts.concat(), false);
    }

    /// A branch: opcode and 32 bits to a label.
    fn jump(&mut self, opcode: &[u8], target: usize) {
        self.item(opcode, Field::Relative32, target, &[]);
    }

    /// Bytes, a field that names a label, bytes.
    fn item(&mut self, before: &[u8], field: Field, target: usize, after: &[u8]) {
        let jump = Some(Jump { at: before.len(), field, target });
        self.g.items.push(Item { bytes: [before, &[0; 4], after].concat(), jump, ..Item::default() });
    }

    fn straight(&mut self) {
        let family = self.g.rng.below(8);
        for _ in 0..1 + self.g.rng.below(5) {
            self.g.instruction(family);
        }
    }

    /// A register other than RSP.
    fn register(&mut self) -> u8 {
        self.g.rng.pick(&[0, 1, 2, 3, 5, 6, 7])
    }

    // ---- statements ------------------------------------------------------------------------

    fn statements(&mut self, depth: u32) {
        for _ in 0..1 + self.g.rng.below(3) {
            match self.g.rng.below(12) {
                0..=2 => self.straight(),
                3..=4 if depth > 0 => self.repeat(depth - 1),
                5 if depth > 0 => self.either(depth - 1),
                6..=7 => self.call(),
                8 if depth > 0 => self.table(),
                9 => self.pad(),
                _ if !self.points.is_empty() => self.change(),
                _ => self.straight(),
            }
        }
    }

    /// mov dword [cell], n; l: body; dec dword [cell]; jnz l
    fn repeat(&mut self, depth: u32) {
        let (cell, count) = (self.cell(), 2 + self.g.rng.below(9) as u8);
        self.bytes(&[&[0xc7, 0x04, 0x25], &cell, &[count, 0, 0, 0]]);
        let top = self.label();
        self.place(top);
        self.forget();
        self.statements(depth);
        if self.g.rng.percent(60) && !self.points.is_empty() {
            let index = self.g.rng.below(self.points.len() as u64) as usize;
            self.point(index);
            self.change();
        }
        self.bytes(&[&[0xff, 0x0c, 0x25], &cell]);
        self.jump(&[0x0f, 0x85], top);
    }

    /// What registers hold is not what it was the first time round.
    fn forget(&mut self) {
        for (register, kind) in self.g.kinds.iter_mut().enumerate() {
            if register != 4 {
                *kind = Kind::Value;
            }
        }
    }

    fn either(&mut self, depth: u32) {
        let (other, after) = (self.label(), self.label());
        let condition = 0x80 | self.g.rng.below(16) as u8;
        self.jump(&[0x0f, condition], other);
        self.statements(depth);
        self.jump(&[0xe9], after);
        self.place(other);
        self.statements(depth);
        self.place(after);
    }

    fn call(&mut self) {
        let function = self.g.rng.pick(&self.functions);
        self.g.ensure(4, Kind::Stack);
        match self.g.rng.below(3) {
            0 => self.jump(&[0xe8], function),
            1 => {
                // mov r, function; call r
                let register = self.register();
                self.item(&[0xb8 | register], Field::Absolute32, function, &[]);
                self.bytes(&[&[0xff, 0xd0 | register]]);
            }
            _ => {
                // mov qword [cell], function; call [cell]
                let cell = self.cell();
                self.item(&[&[0x48, 0xc7, 0x04, 0x25], &cell[..]].concat(), Field::Absolute32, function, &[]);
                self.bytes(&[&[0xff, 0x14, 0x25], &cell]);
            }
        }
    }

    /// f: mov [cell], rsp; body; mov rsp, [cell]; ret
    fn function(&mut self, label: usize) {
        let cell = self.cell();
        self.place(label);
        self.forget();
        self.bytes(&[&[0x48, 0x89, 0x24, 0x25], &cell]);
        self.straight();
        if self.g.rng.percent(40) && !self.points.is_empty() {
            self.change();
        }
        self.straight();
        self.bytes(&[&[0x48, 0x8b, 0x24, 0x25], &cell]);
        match self.g.rng.below(4) {
            0 => {
                let popped = 8 * self.g.rng.below(3) as u8;
                self.bytes(&[&[0xc2, popped, 0]]);
            }
            _ => self.bytes(&[&[0xc3]]),
        }
    }

    /// A loop that each time jumps elsewhere by a table.
    fn table(&mut self) {
        let targets = [self.label(), self.label(), self.label(), self.label()];
        let table: Vec<[u8; 4]> = targets.iter().map(|_| self.cell()).collect();
        if u32::from_le_bytes(table[3]) != u32::from_le_bytes(table[0]) + 24 {
            return targets.into_iter().for_each(|target| self.place(target));
        }
        for (cell, &target) in table.iter().zip(&targets) {
            self.item(&[&[0x48, 0xc7, 0x04, 0x25], &cell[..]].concat(), Field::Absolute32, target, &[]);
        }
        let (counter, after, top) = (self.cell(), self.label(), self.label());
        let count = 4 + self.g.rng.below(8) as u8;
        self.bytes(&[&[0xc7, 0x04, 0x25], &counter, &[count, 0, 0, 0]]);
        self.place(top);
        self.forget();
        // mov ecx, [counter]; and ecx, 3; jmp [table + rcx * 8]
        self.bytes(&[&[0x8b, 0x0c, 0x25], &counter]);
        self.bytes(&[&[0x83, 0xe1, 3]]);
        self.bytes(&[&[0xff, 0x24, 0xcd], &table[0]]);
        for target in targets {
            self.place(target);
            self.forget();
            self.straight();
            if self.g.rng.percent(60) {
                self.jump(&[0xe9], after);
            }
        }
        self.place(after);
        self.bytes(&[&[0xff, 0x0c, 0x25], &counter]);
        self.jump(&[0x0f, 0x85], top);
    }

    /// Code that is jumped over, so that what follows lies in another page.
    fn pad(&mut self) {
        let after = self.label();
        self.jump(&[0xe9], after);
        for _ in 0..self.g.rng.below(200) {
            self.g.items.push(Item { bytes: vec![0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0], glued: true, ..Item::default() });
        }
        self.place(after);
    }

    // ---- changes of code -------------------------------------------------------------------

    /// The instruction that changes, once.
    fn point(&mut self, index: usize) {
        let Point { label, part, emitted } = self.points[index];
        if emitted {
            return;
        }
        self.points[index].emitted = true;
        self.place(label);
        let register = self.register();
        let value = (self.g.rng.u64() as u32).to_le_bytes();
        match part {
            // mov r, imm32; add r, imm32; xor dword [cell], imm32
            Part::Immediate(1) => self.bytes(&[&[0xb8 | register], &value]),
            Part::Immediate(7) => {
                let cell = self.cell();
                self.bytes(&[&[0x81, 0x34, 0x25], &cell, &value]);
            }
            Part::Immediate(_) => self.bytes(&[&[0x81, 0xc0 | register], &value]),
            Part::Whole => {
                let two = self.two_registers();
                self.bytes(&[&two]);
            }
            Part::Condition => {
                let after = self.label();
                self.jump(&[0x0f, 0x80 | value[0] & 15], after);
                self.straight();
                self.place(after);
            }
        }
        self.forget();
    }

    fn two_registers(&mut self) -> [u8; 2] {
        let (one, other) = (self.register(), self.register());
        [self.g.rng.pick(&ALIKE), 0xc0 | one << 3 | other]
    }

    /// Changes one of the points.
    fn change(&mut self) {
        let index = self.g.rng.below(self.points.len() as u64) as usize;
        let (label, part) = (self.points[index].label, self.points[index].part);
        match part {
            Part::Immediate(at) => self.change_immediate(label, at),
            Part::Whole => {
                let two = self.two_registers();
                self.item(&[0x66, 0xc7, 0x04, 0x25], Field::Address(0), label, &two);
            }
            Part::Condition => {
                let condition = 0x80 | self.g.rng.below(16) as u8;
                self.item(&[0xc6, 0x04, 0x25], Field::Address(1), label, &[condition]);
            }
        }
    }

    fn change_immediate(&mut self, label: usize, at: u8) {
        let value = (self.g.rng.u64() as u32).to_le_bytes();
        let register = self.register() << 3;
        let address = Field::Address(at);
        match self.g.rng.below(9) {
            0 => self.item(&[0xc7, 0x04, 0x25], address, label, &value),
            1 => self.item(&[0x89, 0x04 | register, 0x25], address, label, &[]),
            2 => self.item(&[0x81, 0x04, 0x25], address, label, &value),
            3 => self.item(&[0xf0, 0x81, 0x04, 0x25], address, label, &value),
            4 => self.item(&[0x87, 0x04 | register, 0x25], address, label, &[]),
            5 => self.item(&[0x66, 0x0f, 0x7e, 0x04 | register, 0x25], address, label, &[]),
            6 => self.item(&[0xc6, 0x04, 0x25], Field::Address(at + value[1] % 4), label, &value[..1]),
            7 => {
                // mov edi, address; mov [rdi], r
                self.item(&[0xbf], address, label, &[]);
                self.bytes(&[&[0x89, 0x07 | register]]);
                self.g.kinds[7] = Kind::Value;
            }
            _ => {
                // mov esi, somewhere in the data; mov edi, address; mov ecx, 4; cld; rep movsb
                self.g.ensure(6, Kind::Pointer);
                self.item(&[0xbf], address, label, &[]);
                self.bytes(&[&[0xb9, 4, 0, 0, 0]]);
                self.bytes(&[&[0xfc]]);
                self.bytes(&[&[0xf3, 0xa4]]);
                self.forget();
            }
        }
    }
}

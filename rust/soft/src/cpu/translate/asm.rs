//! A small assembler for host code: just the forms that the translator emits. SDM vol. 2, 2.
//!
//! Code is written into a buffer and copied to where it runs afterwards; jumps within a piece go by
//! [`Label`]s, jumps to stubs by their offset in the code region, so nothing depends on the region's
//! address.

use super::layout::host::RBP;

/// An operand of ModRM's r/m field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rm {
    /// A register.
    Reg(u8),
    /// `[base + displacement]`.
    Mem(u8, i32),
    /// `[base + index]`.
    Sum(u8, u8),
}

impl Rm {
    /// What ModRM.rm names, and the index with it: REX.B and REX.X extend these.
    fn base_and_index(self) -> (u8, u8) {
        match self {
            Rm::Reg(reg) | Rm::Mem(reg, _) => (reg, 0),
            Rm::Sum(base, index) => (base, index),
        }
    }
}

/// A field of the `Cpu`.
pub const fn cell(displacement: i32) -> Rm {
    Rm::Mem(RBP, displacement)
}

/// A place in the piece under construction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(usize);

/// Condition codes.
#[allow(missing_docs)]
pub mod cc {
    pub const B: u8 = 2;
    pub const AE: u8 = 3;
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const BE: u8 = 6;
}

/// Operations of the arithmetic group, by their number in opcodes.
#[allow(missing_docs)]
pub mod group {
    pub const ADD: u8 = 0;
    pub const OR: u8 = 1;
    pub const AND: u8 = 4;
    pub const SUB: u8 = 5;
    pub const XOR: u8 = 6;
    pub const CMP: u8 = 7;
}

/// A VEX instruction without its operands. SDM vol. 2, 2.3.5.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vex {
    /// Opcode map: 1 for 0F, 2 for 0F 38, 3 for 0F 3A.
    pub map: u8,
    /// VEX.pp: 0, or 1, 2, 3 for 66, F3, F2.
    pub prefix: u8,
    /// VEX.L.
    pub long: bool,
    /// VEX.W.
    pub wide: bool,
    /// The opcode.
    pub opcode: u8,
}

/// Code under construction.
pub struct Asm {
    /// The bytes.
    pub code: Vec<u8>,
    /// Where the first byte will be, from the start of the region.
    pub origin: usize,
    labels: Vec<usize>,
    /// Places of four-byte displacements, and the label each leads to.
    fixups: Vec<(usize, Label)>,
}

impl Asm {
    /// Nothing yet.
    pub fn new(origin: usize) -> Self {
        Self { code: Vec::with_capacity(1024), origin, labels: Vec::new(), fixups: Vec::new() }
    }

    /// Where the next byte will be, from the start of the region.
    pub fn here(&self) -> usize {
        self.origin + self.code.len()
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: i32) {
        self.bytes(&value.to_le_bytes());
    }

    /// An instruction with ModRM: prefixes, REX by its parts, opcode, operands. `byte` registers
    /// 4-7 need a REX prefix to be SPL, BPL, SIL and DIL.
    pub fn modrm(&mut self, prefixes: &[u8], wide: bool, byte: bool, opcode: &[u8], reg: u8, rm: Rm) {
        self.bytes(prefixes);
        let (low, index) = rm.base_and_index();
        let rex = 0x40 | (wide as u8) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | low >> 3;
        let needed = byte && (matches!(reg, 4..=7) || matches!(rm, Rm::Reg(4..=7)));
        if rex != 0x40 || needed {
            self.code.push(rex);
        }
        self.bytes(opcode);
        self.operands(reg, rm);
    }

    /// ModRM and what follows it.
    fn operands(&mut self, reg: u8, rm: Rm) {
        let (low, _) = rm.base_and_index();
        let field = (reg & 7) << 3 | low & 7;
        match rm {
            Rm::Reg(_) => self.code.push(0xc0 | field),
            // With a displacement of a byte, which some bases must have.
            Rm::Sum(base, index) => self.bytes(&[0x44 | (reg & 7) << 3, (index & 7) << 3 | base & 7, 0]),
            Rm::Mem(_, displacement) => {
                // RBP and R13 have no form without a displacement, RSP and R12 none without SIB.
                let size = match displacement {
                    0 if low & 7 != 5 => 0,
                    -128..=127 => 0x40,
                    _ => 0x80,
                };
                self.code.push(size | field);
                if low & 7 == 4 {
                    self.code.push(0x24);
                }
                match size {
                    0 => {}
                    0x40 => self.code.push(displacement as u8),
                    _ => self.imm32(displacement),
                }
            }
        }
    }

    /// An instruction with VEX and ModRM: `reg`, `vvvv` (15 where there is none, or register 0) and `rm`.
    pub fn vex(&mut self, vex: &Vex, reg: u8, vvvv: u8, rm: Rm) {
        let (low, index) = rm.base_and_index();
        let last = (vvvv ^ 15) << 3 | (vex.long as u8) << 2 | vex.prefix;
        let r = (reg & 8 ^ 8) << 4;
        if vex.map == 1 && !vex.wide && low < 8 && index < 8 {
            self.bytes(&[0xc5, r | last]);
        } else {
            let (x, b) = ((index & 8 ^ 8) << 3, (low & 8 ^ 8) << 2);
            self.bytes(&[0xc4, r | x | b | vex.map, (vex.wide as u8) << 7 | last]);
        }
        self.code.push(vex.opcode);
        self.operands(reg, rm);
    }

    /// `lea reg, [base + index << scale + displacement]`, 64 or 32 bits.
    pub fn lea(&mut self, wide: bool, reg: u8, base: Option<u8>, index: Option<(u8, u8)>, displacement: i32) {
        let (Some(b), None) = (base, index) else {
            return self.lea_sib(wide, reg, base, index, displacement);
        };
        self.modrm(&[], wide, false, &[0x8d], reg, Rm::Mem(b, displacement));
    }

    fn lea_sib(&mut self, wide: bool, reg: u8, base: Option<u8>, index: Option<(u8, u8)>, displacement: i32) {
        let (x, scale) = index.unwrap_or((4, 0));
        let b = base.unwrap_or(5);
        let rex = 0x40 | (wide as u8) << 3 | (reg >> 3) << 2 | (x >> 3) << 1 | if base.is_some() { b >> 3 } else { 0 };
        self.bytes(&[rex, 0x8d]);
        let size = match (base, displacement) {
            (None, _) => 0,
            (_, 0) if b & 7 != 5 => 0,
            (_, -128..=127) => 0x40,
            _ => 0x80,
        };
        self.bytes(&[size | (reg & 7) << 3 | 4, scale << 6 | (x & 7) << 3 | b & 7]);
        match (base, size) {
            (Some(_), 0) => {}
            (_, 0x40) => self.code.push(displacement as u8),
            _ => self.imm32(displacement),
        }
    }

    /// `mov reg, rm`, 64 bits.
    pub fn load(&mut self, reg: u8, rm: Rm) {
        self.modrm(&[], true, false, &[0x8b], reg, rm);
    }

    /// `mov reg, rm`, 32 bits.
    pub fn load32(&mut self, reg: u8, rm: Rm) {
        self.modrm(&[], false, false, &[0x8b], reg, rm);
    }

    /// `mov rm, reg`, 64 bits.
    pub fn store(&mut self, rm: Rm, reg: u8) {
        self.modrm(&[], true, false, &[0x89], reg, rm);
    }

    /// `mov rm, reg`, 32 bits.
    pub fn store32(&mut self, rm: Rm, reg: u8) {
        self.modrm(&[], false, false, &[0x89], reg, rm);
    }

    /// `mov reg32, imm32`, zero-extended.
    pub fn load_imm(&mut self, reg: u8, value: u32) {
        if reg >= 8 {
            self.code.push(0x41);
        }
        self.code.push(0xb8 | reg & 7);
        self.bytes(&value.to_le_bytes());
    }

    /// `mov reg, imm64`, in as few bytes as hold it.
    pub fn load_imm64(&mut self, reg: u8, value: u64) {
        if value <= u32::MAX as u64 {
            return self.load_imm(reg, value as u32);
        }
        self.bytes(&[0x48 | reg >> 3, 0xb8 | reg & 7]);
        self.bytes(&value.to_le_bytes());
    }

    /// `mov rm, imm32` with 1, 4 (dword) or 8 (sign-extended) bytes.
    pub fn store_imm(&mut self, size: u8, rm: Rm, value: i32) {
        match size {
            1 => {
                self.modrm(&[], false, true, &[0xc6], 0, rm);
                self.code.push(value as u8);
            }
            _ => {
                self.modrm(&[], size == 8, false, &[0xc7], 0, rm);
                self.imm32(value);
            }
        }
    }

    /// `op reg, rm` of the arithmetic group.
    pub fn alu(&mut self, wide: bool, operation: u8, reg: u8, rm: Rm) {
        self.modrm(&[], wide, false, &[operation << 3 | 3], reg, rm);
    }

    /// `op rm, imm`.
    pub fn alu_imm(&mut self, wide: bool, operation: u8, rm: Rm, value: i32) {
        if (-128..=127).contains(&value) {
            self.modrm(&[], wide, false, &[0x83], operation, rm);
            self.code.push(value as u8);
        } else {
            self.modrm(&[], wide, false, &[0x81], operation, rm);
            self.imm32(value);
        }
    }

    /// `cmp byte rm, imm`.
    pub fn cmp_byte(&mut self, rm: Rm, value: u8) {
        self.modrm(&[], false, true, &[0x80], group::CMP, rm);
        self.code.push(value);
    }

    /// `test reg8, imm`.
    pub fn test_byte(&mut self, reg: u8, value: u8) {
        self.modrm(&[], false, true, &[0xf6], 0, Rm::Reg(reg));
        self.code.push(value);
    }

    /// `movzx reg32, word or byte rm`.
    pub fn load_short(&mut self, bytes: u8, reg: u8, rm: Rm) {
        self.modrm(&[], false, bytes == 1, &[0x0f, if bytes == 1 { 0xb6 } else { 0xb7 }], reg, rm);
    }

    /// `shl` (4), `shr` (5) or `sar` (7) `reg, count`.
    pub fn shift(&mut self, wide: bool, operation: u8, reg: u8, count: u8) {
        self.modrm(&[], wide, false, &[0xc1], operation, Rm::Reg(reg));
        self.code.push(count);
    }

    /// `rorx reg32, rm, count`: leaves the flags alone. For hosts with BMI2.
    pub fn rotate(&mut self, reg: u8, rm: Rm, count: u8) {
        self.vex(&Vex { map: 3, prefix: 3, long: false, wide: false, opcode: 0xf0 }, reg, 0, rm);
        self.code.push(count);
    }

    // ---- flags -------------------------------------------------------------------------------

    /// `lahf`, then AH and OF to the bytes of the `Cpu`'s flags image. Changes AH only: to put the two
    /// together in AX first would cost the host a merge of its parts.
    pub fn save_flags(&mut self, image: i32) {
        self.bytes(&[0x9f]);
        self.modrm(&[], false, false, &[0x0f, 0x90], 0, cell(image)); // seto
        self.modrm(&[], false, false, &[0x88], 4, cell(image + 1)); // mov [image + 1], ah
    }

    /// The image's flags into RFLAGS: `add al, 0x7f` overflows for an OF of 1. Changes RAX only.
    pub fn load_flags(&mut self, image: i32) {
        self.load_short(1, 0, cell(image));
        self.bytes(&[0x04, 0x7f]);
        self.modrm(&[], false, false, &[0x8a], 4, cell(image + 1)); // mov ah, [image + 1]
        self.bytes(&[0x9e]);
    }

    // ---- control -----------------------------------------------------------------------------

    /// A label to be placed later.
    pub fn label(&mut self) -> Label {
        self.labels.push(usize::MAX);
        Label(self.labels.len() - 1)
    }

    /// Places a label here.
    pub fn place(&mut self, label: Label) {
        self.labels[label.0] = self.code.len();
    }

    /// `jmp label`.
    pub fn jump(&mut self, label: Label) {
        self.code.push(0xe9);
        self.fix(label);
    }

    /// `jcc label`.
    pub fn jump_if(&mut self, condition: u8, label: Label) {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.fix(label);
    }

    /// `lea reg, [rip + label]`.
    pub fn lea_label(&mut self, reg: u8, label: Label) {
        self.bytes(&[0x48 | (reg >> 3) << 2, 0x8d, (reg & 7) << 3 | 5]);
        self.fix(label);
    }

    fn fix(&mut self, label: Label) {
        self.fixups.push((self.code.len(), label));
        self.imm32(0);
    }

    /// `jmp` to an offset in the region. Gives where its displacement is, to be patched.
    pub fn jump_to(&mut self, target: usize) -> usize {
        self.code.push(0xe9);
        self.displacement(target)
    }

    /// `call` of an offset in the region.
    pub fn call_to(&mut self, target: usize) {
        self.code.push(0xe8);
        self.displacement(target);
    }

    fn displacement(&mut self, target: usize) -> usize {
        let at = self.here();
        self.imm32(target.wrapping_sub(at + 4) as i32);
        at
    }

    /// `jecxz` over the next `bytes` bytes.
    pub fn skip_if_ecx_zero(&mut self, bytes: u8) {
        self.bytes(&[0x67, 0xe3, bytes]);
    }

    /// Where a label is, from the start of the region.
    pub fn offset_of(&self, label: Label) -> usize {
        self.origin + self.labels[label.0]
    }

    /// Resolves the labels' jumps; all labels are placed.
    pub fn finish(&mut self) {
        for (at, label) in std::mem::take(&mut self.fixups) {
            let distance = self.labels[label.0] as i32 - (at as i32 + 4);
            self.code[at..at + 4].copy_from_slice(&distance.to_le_bytes());
        }
    }
}

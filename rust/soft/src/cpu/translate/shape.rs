//! Decode: an instruction's encoding taken apart, so that it can be put together again with other
//! registers. SDM vol. 2, 2.1.

use super::asm::{Rm, Vex};
use super::layout::HOME;
use iced_x86::{ConstantOffsets, Instruction, Mnemonic, OpAccess, OpCodeOperandKind, OpKind, Register};

/// The parts of an encoding without its operands.
#[derive(Clone, Copy, Debug, Default)]
pub struct Shape {
    /// Prefixes that belong to the opcode or the operand size: 66, F2, F3, and LOCK.
    prefixes: [u8; 3],
    prefix_count: u8,
    /// REX.W, VEX.W.
    pub wide: bool,
    /// The opcode is this one, not `opcode`.
    pub vex: Option<Vex>,
    opcode: [u8; 3],
    opcode_count: u8,
    /// ModRM as it was.
    pub modrm: Option<u8>,
    immediate: [u8; 8],
    immediate_count: u8,
}

impl Shape {
    /// Takes an instruction of the legacy or VEX encodings apart; `None` for EVEX and the like.
    pub fn new(bytes: &[u8], offsets: &ConstantOffsets) -> Option<Self> {
        let mut shape = Self::default();
        let mut at = 0;
        while let Some(&byte) = bytes.get(at) {
            match byte {
                // REX counts only right before the opcode.
                0x40..=0x4f => shape.wide = byte & 8 != 0,
                0x66 | 0xf2 | 0xf3 | 0xf0 => {
                    let room = shape.prefixes.get_mut(shape.prefix_count as usize)?;
                    *room = byte;
                    shape.prefix_count += 1;
                    shape.wide = false;
                }
                0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x67 => shape.wide = false,
                _ => break,
            }
            at += 1;
        }
        let prefixes = &shape.prefixes[..shape.prefix_count as usize];
        if prefixes.contains(&0xf2) && prefixes.contains(&0xf3) {
            return None;
        }
        let count = match bytes.get(at..)? {
            [0x0f, 0x38 | 0x3a, ..] => 3,
            [0x0f, ..] => 2,
            [0xc4 | 0xc5, ..] => return Self::vex(bytes, at, offsets),
            [0x62, ..] => return None,
            _ => 1,
        };
        shape.opcode[..count].copy_from_slice(bytes.get(at..at + count)?);
        shape.opcode_count = count as u8;
        at += count;
        if has_modrm(&shape.opcode[..count]) {
            shape.modrm = Some(*bytes.get(at)?);
        }
        if offsets.has_immediate() {
            let (start, size) = (offsets.immediate_offset(), offsets.immediate_size());
            shape.immediate[..size].copy_from_slice(bytes.get(start..start + size)?);
            shape.immediate_count = size as u8;
        }
        Some(shape)
    }

    fn vex(bytes: &[u8], at: usize, offsets: &ConstantOffsets) -> Option<Self> {
        // The two-byte form is the three-byte one of map 1 without W.
        let (map, last, at) = match *bytes.get(at..)? {
            [0xc5, last, ..] => (1, last & 0x7f, at + 2),
            [_, first, last, ..] => (first & 0x1f, last, at + 3),
            _ => return None,
        };
        let opcode = *bytes.get(at)?;
        let wide = last & 0x80 != 0;
        let vex = Vex { map, prefix: last & 3, long: last & 4 != 0, wide, opcode };
        let mut shape = Self { wide, vex: Some(vex), ..Self::default() };
        let zeroes = map == 1 && opcode == 0x77;
        if !zeroes {
            shape.modrm = Some(*bytes.get(at + 1)?);
        }
        // In map 3 the last byte is an immediate always; iced does not count one that names a register.
        if map == 3 || offsets.has_immediate() {
            (shape.immediate[0], shape.immediate_count) = (*bytes.last()?, 1);
        }
        Some(shape)
    }

    /// The prefixes to emit; REP prefixes mean nothing in the one-byte map's arithmetic.
    pub fn prefixes(&self) -> Prefixes {
        let all = &self.prefixes[..self.prefix_count as usize];
        let mut kept = Prefixes::default();
        // A prefix twice is as good as once, and the mandatory one goes last, next to REX.
        for wanted in [0xf0, 0x66, 0xf2, 0xf3] {
            let repeat = wanted >= 0xf2;
            if all.contains(&wanted) && !(repeat && self.opcode_count == 1) {
                kept.push(wanted);
            }
        }
        kept
    }

    /// The opcode bytes.
    pub fn opcode(&self) -> &[u8] {
        &self.opcode[..self.opcode_count as usize]
    }

    /// The immediate's bytes.
    pub fn immediate(&self) -> &[u8] {
        &self.immediate[..self.immediate_count as usize]
    }
}

/// At most three prefixes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prefixes {
    bytes: [u8; 4],
    count: usize,
}

impl Prefixes {
    fn push(&mut self, byte: u8) {
        self.bytes[self.count] = byte;
        self.count += 1;
    }

    /// The bytes.
    pub fn get(&self) -> &[u8] {
        &self.bytes[..self.count]
    }
}

fn has_modrm(opcode: &[u8]) -> bool {
    match *opcode {
        [one] => match one {
            0x00..=0x3f => one & 7 < 4,
            0x63 | 0x69 | 0x6b | 0x80..=0x8f | 0xc0 | 0xc1 | 0xc6 | 0xc7 | 0xd0..=0xd3 | 0xf6 | 0xf7 | 0xfe | 0xff => {
                true
            }
            _ => false,
        },
        [_, two] => {
            !matches!(two, 0x05..=0x0c | 0x30..=0x37 | 0x77 | 0x80..=0x8f | 0xa0..=0xa2 | 0xa8..=0xaa | 0xc8..=0xcf)
        }
        _ => true,
    }
}

/// What part of the encoding names an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// ModRM.reg.
    Reg,
    /// VEX.vvvv.
    Vvvv,
    /// ModRM.rm, a register.
    RmReg,
    /// ModRM.rm, memory.
    Memory,
    /// The opcode's low bits.
    OpcodeReg,
    /// An immediate, or a register that the opcode implies.
    Implied,
    /// Anything else.
    Other,
}

/// An operand: role, register, access.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// What names it.
    pub role: Role,
    /// The register, if it is one.
    pub register: Register,
    /// Its bytes, for registers.
    pub size: usize,
    /// Its old value matters.
    pub read: bool,
    /// It gets a value.
    pub written: bool,
}

impl Operand {
    /// Operand `index` of `ins`, accessed so.
    pub fn new(ins: &Instruction, index: u32, kind: OpCodeOperandKind, access: OpAccess) -> Self {
        use OpAccess::*;
        use OpCodeOperandKind as K;
        let register = ins.op_register(index);
        let role = match (ins.op_kind(index), kind) {
            (OpKind::Memory, _) => Role::Memory,
            (OpKind::Register, K::r8_reg | K::r16_reg | K::r32_reg | K::r64_reg | K::xmm_reg | K::ymm_reg) => Role::Reg,
            (OpKind::Register, K::r32_vvvv | K::r64_vvvv | K::xmm_vvvv | K::ymm_vvvv) => Role::Vvvv,
            (
                OpKind::Register,
                K::r8_or_mem
                | K::r16_or_mem
                | K::r32_or_mem
                | K::r64_or_mem
                | K::xmm_or_mem
                | K::ymm_or_mem
                | K::r16_rm
                | K::r32_rm
                | K::r64_rm
                | K::xmm_rm
                | K::ymm_rm,
            ) => Role::RmReg,
            (OpKind::Register, K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode) => Role::OpcodeReg,
            (OpKind::Register, K::al | K::ax | K::eax | K::rax | K::cl | K::xmm_is4 | K::ymm_is4) => Role::Implied,
            (OpKind::Register, _) => Role::Other,
            (kind, _) if kind >= OpKind::Immediate8 && kind <= OpKind::Immediate32to64 => Role::Implied,
            _ => Role::Other,
        };
        Self {
            role,
            register,
            size: register.size(),
            // XOR of a register with itself is said to read nothing; copied, it must still get twice the same.
            read: access != Write || matches!(ins.mnemonic(), Mnemonic::Xor | Mnemonic::Sub | Mnemonic::Sbb),
            written: matches!(access, Write | CondWrite | ReadWrite | ReadCondWrite),
        }
    }

    /// Number of the guest's general register.
    pub fn gpr(&self) -> Option<usize> {
        self.register.is_gpr().then(|| self.register.full_register().number())
    }

    /// AH, CH, DH or BH.
    pub fn high_byte(&self) -> bool {
        matches!(self.register, Register::AH | Register::CH | Register::DH | Register::BH)
    }
}

/// A guest register's home as an operand.
pub fn home(guest: usize) -> Rm {
    match HOME[guest] {
        Some(host) => Rm::Reg(host),
        None => super::asm::cell(super::layout::field::register(guest)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn shape(bytes: &[u8]) -> Shape {
        let mut decoder = Decoder::new(64, bytes, DecoderOptions::NONE);
        let ins = decoder.decode();
        Shape::new(bytes, &decoder.get_constant_offsets(&ins)).expect("legacy encoding")
    }

    #[test]
    fn test_shape_of_arithmetic_with_immediate() {
        // add qword ptr fs:[rbx+rcx*4+0x11223344], 0x55
        let s = shape(&[0x64, 0x48, 0x83, 0x84, 0x8b, 0x44, 0x33, 0x22, 0x11, 0x55]);
        assert!(s.wide);
        assert_eq!((s.opcode(), s.modrm, s.immediate()), (&[0x83][..], Some(0x84), &[0x55][..]));
    }

    #[test]
    fn test_shape_keeps_mandatory_prefixes_of_two_byte_opcodes_only() {
        assert_eq!(shape(&[0xf3, 0x0f, 0x10, 0xc1]).prefixes().get(), [0xf3]);
        assert_eq!(shape(&[0xf3, 0x89, 0xc8]).prefixes().get(), [0u8; 0]);
        assert_eq!(shape(&[0xf0, 0x66, 0x01, 0x08]).prefixes().get(), [0xf0, 0x66]);
    }

    #[test]
    fn test_shape_of_both_vex_forms() {
        let zero_upper = shape(&[0xc5, 0xf8, 0x77]);
        assert_eq!((zero_upper.vex.map(|v| v.opcode), zero_upper.modrm), (Some(0x77), None));
        // vblendvpd ymm1, ymm2, [rbx], ymm4
        let blend = shape(&[0xc4, 0xe3, 0x6d, 0x4b, 0x0b, 0x40]);
        assert_eq!(blend.vex, Some(Vex { map: 3, prefix: 1, long: true, wide: false, opcode: 0x4b }));
        assert_eq!((blend.modrm, blend.immediate()), (Some(0x0b), &[0x40][..]));
    }
}

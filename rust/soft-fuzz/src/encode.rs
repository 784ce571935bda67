//! Machine code from an encoding's description: opcode, prefixes, ModRM, SIB, displacement and
//! immediate are put together by hand, so that every freedom of the format is used (an assembler
//! would choose one form only). SDM vol. 2A, 2.1-2.3.

use iced_x86::{Code, EncodingKind, MandatoryPrefix, OpCodeOperandKind as K, OpCodeTableKind};

/// What the r/m field may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rm {
    /// No ModRM, or its fields are part of the opcode.
    None,
    /// A register.
    Register,
    /// Memory.
    Memory,
    /// Either.
    Either,
}

/// What a register field names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bank {
    /// General registers of 8 bits.
    Gpr8,
    /// Wider ones.
    Gpr,
    /// MMX or x87 registers: eight of them.
    Eight,
    /// XMM or YMM registers.
    Xmm,
    /// Segment registers.
    Segment,
}

/// An encoding taken apart.
#[derive(Clone, Debug)]
pub struct Form {
    /// The encoding.
    pub code: Code,
    /// The ModRM.reg field's registers, when it names one.
    pub reg: Option<Bank>,
    /// What the r/m field may be.
    pub rm: Rm,
    /// The r/m field's registers, when it names one.
    pub rm_bank: Bank,
    /// Registers named by the opcode's low bits.
    pub opcode_reg: Option<Bank>,
    /// What registers VEX.vvvv names, if any.
    pub vvvv: Option<Bank>,
    /// The memory operand's index is a vector.
    pub vector_index: bool,
    /// Bytes of immediates, displacement of a branch or absolute address, in order.
    pub immediates: Vec<u8>,
    /// The immediate is a branch displacement.
    pub branch: bool,
    /// The immediate is an address (`moffs`).
    pub moffs: bool,
    /// Uses `rSI`.
    pub si: bool,
    /// Uses `rDI`.
    pub di: bool,
    /// 64, or 32 for compatibility mode.
    pub bits: u32,
    /// Writes a segment register, or is about control and debug registers.
    pub system: bool,
    fixed_reg: Option<u8>,
    fixed_rm: Option<u8>,
    wide: Option<bool>,
}

/// A memory operand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Address {
    /// Base register.
    pub base: Option<u8>,
    /// Index register (not 4) and log2 of its scale.
    pub index: Option<(u8, u8)>,
    /// Displacement; of a RIP-relative operand the low half of its target.
    pub disp: i32,
    /// RIP-relative.
    pub rip: bool,
    /// 32-bit address size.
    pub short: bool,
    /// Segment override prefix.
    pub segment: Option<u8>,
}

/// Choices for one instruction.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// ModRM.reg.
    pub reg: u8,
    /// ModRM.rm when it is a register.
    pub rm: u8,
    /// The memory operand otherwise.
    pub memory: Option<Address>,
    /// The opcode's register.
    pub opcode_reg: u8,
    /// VEX.vvvv.
    pub vvvv: u8,
    /// Immediate bytes.
    pub immediate: Vec<u8>,
    /// Prefixes that mean nothing here or change the meaning: the caller decodes the result.
    pub noise: Vec<u8>,
    /// LOCK, REP and REPNE.
    pub prefix: Option<u8>,
    /// A REX prefix even where none is needed.
    pub rex: bool,
    /// REX.W where it does not matter.
    pub wide: bool,
    /// A 32-bit displacement even where 8 bits suffice.
    pub long_displacement: bool,
}

/// Encoded bytes, and where the displacement of a RIP-relative operand is.
pub struct Encoded {
    /// The instruction.
    pub bytes: Vec<u8>,
    /// Offset of a displacement that is relative to the instruction's end.
    pub rip_at: Option<usize>,
}

impl Form {
    /// Takes an encoding apart; `None` where an operand is of a kind that user code of this CPU
    /// model never has (far pointers, mask registers).
    pub fn new(code: Code, bits: u32) -> Option<Self> {
        let info = code.op_code();
        let mut form = Self {
            code,
            reg: None,
            rm: Rm::None,
            rm_bank: Bank::Gpr,
            opcode_reg: None,
            vvvv: None,
            vector_index: false,
            immediates: Vec::new(),
            branch: false,
            moffs: false,
            si: false,
            di: false,
            bits,
            system: false,
            fixed_reg: u8::try_from(info.group_index()).ok(),
            fixed_rm: u8::try_from(info.rm_group_index()).ok(),
            wide: width(code),
        };
        for (index, &kind) in info.op_kinds().iter().enumerate() {
            form.operand(index, kind)?;
        }
        Some(form)
    }

    fn operand(&mut self, index: usize, kind: K) -> Option<()> {
        match kind {
            K::r8_or_mem => self.set_rm(Rm::Either, Bank::Gpr8),
            K::r16_or_mem | K::r32_or_mem | K::r64_or_mem => self.set_rm(Rm::Either, Bank::Gpr),
            K::mm_or_mem => self.set_rm(Rm::Either, Bank::Eight),
            K::xmm_or_mem | K::ymm_or_mem => self.set_rm(Rm::Either, Bank::Xmm),
            K::r16_rm | K::r32_rm | K::r64_rm => self.set_rm(Rm::Register, Bank::Gpr),
            K::mm_rm => self.set_rm(Rm::Register, Bank::Eight),
            K::xmm_rm | K::ymm_rm => self.set_rm(Rm::Register, Bank::Xmm),
            K::mem => self.set_rm(Rm::Memory, Bank::Gpr),
            K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
                self.set_rm(Rm::Memory, Bank::Gpr);
                self.vector_index = true;
            }
            K::r8_reg => self.reg = Some(Bank::Gpr8),
            K::r16_reg | K::r32_reg | K::r64_reg => self.reg = Some(Bank::Gpr),
            K::mm_reg => self.reg = Some(Bank::Eight),
            K::xmm_reg | K::ymm_reg => self.reg = Some(Bank::Xmm),
            K::seg_reg => {
                self.reg = Some(Bank::Segment);
                self.system |= index == 0;
            }
            K::cr_reg | K::dr_reg | K::tr_reg => self.system = true,
            K::es | K::cs | K::ss | K::ds | K::fs | K::gs => {
                self.system |= self.code.mnemonic() == iced_x86::Mnemonic::Pop;
            }
            K::r8_opcode => self.opcode_reg = Some(Bank::Gpr8),
            K::r16_opcode | K::r32_opcode | K::r64_opcode => self.opcode_reg = Some(Bank::Gpr),
            K::sti_opcode => self.opcode_reg = Some(Bank::Eight),
            K::r32_vvvv | K::r64_vvvv => self.vvvv = Some(Bank::Gpr),
            K::xmm_vvvv | K::ymm_vvvv => self.vvvv = Some(Bank::Xmm),
            // The register is in the immediate's upper half.
            K::xmm_is4 | K::ymm_is4 => self.immediates.push(1),
            K::imm8 | K::imm8sex16 | K::imm8sex32 | K::imm8sex64 => self.immediates.push(1),
            K::imm16 => self.immediates.push(2),
            K::imm32 | K::imm32sex64 => self.immediates.push(4),
            K::imm64 => self.immediates.push(8),
            K::br16_1 | K::br32_1 | K::br64_1 => self.set_branch(1),
            K::br32_4 | K::br64_4 => self.set_branch(4),
            K::mem_offs => {
                self.immediates.push(self.bits as u8 / 8);
                self.moffs = true;
            }
            K::seg_rSI => self.si = true,
            K::es_rDI | K::seg_rDI => self.di = true,
            K::al | K::cl | K::ax | K::dx | K::eax | K::rax | K::st0 | K::imm8_const_1 | K::seg_rBX_al => {}
            _ => return None,
        }
        Some(())
    }

    fn set_rm(&mut self, rm: Rm, bank: Bank) {
        (self.rm, self.rm_bank) = (rm, bank);
    }

    fn set_branch(&mut self, bytes: u8) {
        self.immediates.push(bytes);
        self.branch = true;
    }

    /// Puts an instruction together.
    pub fn encode(&self, choice: &Choice) -> Encoded {
        let mut bytes = choice.noise.clone();
        let memory = choice.memory.unwrap_or_default();
        bytes.extend(memory.segment);
        if memory.short || !matches!(self.code.op_code().address_size(), 0 | 64) && self.other_address_size() {
            bytes.push(0x67);
        }
        bytes.extend(choice.prefix);
        let info = self.code.op_code();
        let (opcode, length) = (info.op_code(), info.op_code_len());
        let opcode = opcode.to_be_bytes()[4 - length as usize..].to_vec();
        let has_modrm = self.rm != Rm::None || self.reg.is_some() || self.fixed_reg.is_some();
        let extension = self.extension(choice, &memory);
        match info.encoding() {
            EncodingKind::VEX => self.vex(choice, extension, &mut bytes),
            _ => self.legacy(choice, extension, &mut bytes),
        }
        bytes.extend_from_slice(&opcode);
        if self.opcode_reg.is_some() {
            let last = bytes.len() - 1;
            bytes[last] += choice.opcode_reg & 7;
        }
        let mut rip_at = None;
        if has_modrm {
            let reg = self.fixed_reg.unwrap_or(choice.reg) & 7;
            match (choice.memory, self.fixed_rm) {
                (Some(address), None) => {
                    rip_at = address.encode(reg, choice.long_displacement, &mut bytes);
                    // The same form is an absolute address in 32-bit code.
                    rip_at = rip_at.filter(|_| self.bits == 64);
                }
                (_, rm) => bytes.push(0xc0 | reg << 3 | rm.unwrap_or(choice.rm) & 7),
            }
        }
        bytes.extend_from_slice(&choice.immediate);
        Encoded { bytes, rip_at }
    }

    fn other_address_size(&self) -> bool {
        self.code.op_code().address_size() != self.bits
    }

    /// REX.R, X and B in bits 2, 1 and 0.
    fn extension(&self, choice: &Choice, memory: &Address) -> u8 {
        let reg = if self.reg.is_some() { choice.reg >> 3 } else { 0 };
        let base = match (choice.memory, self.opcode_reg) {
            (Some(_), _) => memory.base.unwrap_or(0) >> 3,
            (_, Some(_)) => choice.opcode_reg >> 3,
            _ if self.rm == Rm::None => 0,
            _ => choice.rm >> 3,
        };
        let index = memory.index.map_or(0, |(register, _)| register >> 3);
        reg << 2 | index << 1 | base
    }

    fn legacy(&self, choice: &Choice, extension: u8, bytes: &mut Vec<u8>) {
        let info = self.code.op_code();
        let mandatory = mandatory(info.mandatory_prefix());
        if info.operand_size() == 16 && mandatory != Some(0x66) {
            bytes.push(0x66);
        }
        bytes.extend(mandatory);
        let wide = self.wide.unwrap_or(choice.wide) && self.bits == 64;
        let rex = 0x40 | (wide as u8) << 3 | extension;
        if rex != 0x40 || choice.rex {
            bytes.push(rex);
        }
        bytes.extend_from_slice(match info.table() {
            OpCodeTableKind::T0F => &[0x0f],
            OpCodeTableKind::T0F38 => &[0x0f, 0x38],
            OpCodeTableKind::T0F3A => &[0x0f, 0x3a],
            _ => &[],
        });
    }

    fn vex(&self, choice: &Choice, extension: u8, bytes: &mut Vec<u8>) {
        let info = self.code.op_code();
        let map = match info.table() {
            OpCodeTableKind::T0F => 1,
            OpCodeTableKind::T0F38 => 2,
            _ => 3,
        };
        let pp = match info.mandatory_prefix() {
            MandatoryPrefix::P66 => 1,
            MandatoryPrefix::PF3 => 2,
            MandatoryPrefix::PF2 => 3,
            _ => 0,
        };
        let wide = info.w() == 1 || info.is_wig() && choice.wide;
        let vvvv = if self.vvvv.is_some() { choice.vvvv & 15 } else { 0 };
        if map == 1 && !wide && extension & 3 == 0 && !choice.rex {
            bytes.push(0xc5);
            bytes.push((!extension & 4) << 5 | (!vvvv & 15) << 3 | (info.l() as u8) << 2 | pp);
            return;
        }
        bytes.push(0xc4);
        bytes.push((!extension & 7) << 5 | map);
        bytes.push((wide as u8) << 7 | (!vvvv & 15) << 3 | (info.l() as u8) << 2 | pp);
    }
}

/// REX.W: required, forbidden, or free.
fn width(code: Code) -> Option<bool> {
    let info = code.op_code();
    match info.operand_size() {
        64 if info.default_op_size64() || info.force_op_size64() => None,
        64 => Some(true),
        16 | 32 => Some(false),
        _ if info.w() == 1 => Some(true),
        _ => Some(false),
    }
}

fn mandatory(prefix: MandatoryPrefix) -> Option<u8> {
    match prefix {
        MandatoryPrefix::P66 => Some(0x66),
        MandatoryPrefix::PF3 => Some(0xf3),
        MandatoryPrefix::PF2 => Some(0xf2),
        _ => None,
    }
}

impl Address {
    /// Appends ModRM, SIB and displacement; gives the offset of a RIP-relative displacement.
    fn encode(&self, reg: u8, long: bool, bytes: &mut Vec<u8>) -> Option<usize> {
        let modrm = |mode: u8, rm: u8| mode << 6 | reg << 3 | rm;
        if self.rip {
            bytes.push(modrm(0, 5));
            bytes.extend_from_slice(&self.disp.to_le_bytes());
            return Some(bytes.len() - 4);
        }
        let Some(base) = self.base else {
            let (index, scale) = self.index.unwrap_or((4, 0));
            bytes.extend_from_slice(&[modrm(0, 4), scale << 6 | (index & 7) << 3 | 5]);
            bytes.extend_from_slice(&self.disp.to_le_bytes());
            return None;
        };
        let mode = match self.disp {
            0 if base & 7 != 5 && !long => 0,
            -128..=127 if !long => 1,
            _ => 2,
        };
        if let (None, false) = (self.index, base & 7 == 4) {
            bytes.push(modrm(mode, base & 7));
        } else {
            let (index, scale) = self.index.unwrap_or((4, 0));
            bytes.extend_from_slice(&[modrm(mode, 4), scale << 6 | (index & 7) << 3 | base & 7]);
        }
        match mode {
            0 => {}
            1 => bytes.push(self.disp as u8),
            _ => bytes.extend_from_slice(&self.disp.to_le_bytes()),
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::{host_has, usable};
    use iced_x86::{Decoder, Mnemonic};

    /// Every encoding that could get a row decodes to itself.
    #[test]
    fn test_encode_of_every_code_decodes_to_the_same_code() {
        let (mut seen, mut wrong) = (0, Vec::new());
        let on_host = |code: &Code| code.cpuid_features().iter().all(|&feature| host_has(feature));
        let both = [64, 32].into_iter().flat_map(|bits| Code::values().map(move |code| (code, bits)));
        for (code, bits) in both.filter(|&(code, bits)| usable(code, bits) && on_host(&code)) {
            let Some(form) = Form::new(code, bits) else { continue };
            let address = Address {
                base: Some(3),
                // Not the register that a gather loads.
                index: Some((if bits == 64 { 9 } else { 2 }, 2)),
                disp: 0x40,
                ..Address::default()
            };
            let immediate = vec![1; form.immediates.iter().map(|&n| n as usize).sum()];
            let memory = (form.rm == Rm::Memory || form.rm == Rm::Either).then_some(address);
            let choice = Choice { reg: 1, rm: 2, opcode_reg: 1, memory, immediate, ..Choice::default() };
            let encoded = form.encode(&choice);
            let decoded = Decoder::new(bits, &encoded.bytes, 0).decode();
            // Reserved NOPs of which a part became hints.
            let renamed = matches!(decoded.mnemonic(), Mnemonic::Prefetchw | Mnemonic::Prefetcht0)
                && code.mnemonic() == Mnemonic::Reservednop;
            if (decoded.code(), decoded.len()) != (code, encoded.bytes.len()) && !renamed {
                wrong.push(format!("{code:?}: {:02x?} is {:?}", encoded.bytes, decoded.code()));
            }
            seen += 1;
        }
        assert!(seen > 1000, "{seen}");
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}

//! Native code of a thunk: load what the instruction reads, run it, store what it writes.
//!
//! Registers at entry (System V): RDI = sixteen guest GPRs in x86 order, RSI = `FpState`,
//! RDX = scratch, RCX = guest flags (arithmetic bits only). At exit RAX holds LAHF's AH and OF in AL
//! where the instruction writes flags.
//!
//! XMM and MMX registers keep their numbers, because the ABI lets a callee use all of them. Explicit
//! GPR operands move to R8 and R9, a memory operand becomes `[rdx]`, or `[r10]` where the instruction
//! reads RDX itself (PCMPESTRx). No GPR that the ABI preserves is ever written.

use iced_x86::{Encoder, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

use super::fpstate::{MXCSR, ST, XMM, YMM_HIGH};

/// How an instruction gets the guest's MXCSR, and the guest the flags it raised.
///
/// Loading a different MXCSR costs more than most instructions, so the common case avoids it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mxcsr {
    /// The instruction does not use it.
    #[default]
    Unused,
    /// The guest's control bits are the default ones: run under the host's MXCSR and add its flags to
    /// the guest's. Right only while the host has no flag that the guest lacks; if it has one, or
    /// other control bits, the guest's value is loaded first, and may stay.
    Shared,
    /// Any guest value that masks all exceptions: loaded before, the host's is put back after.
    Swapped,
}

/// How the thunk's environment is set up around the instruction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Environment {
    /// How the guest's MXCSR takes effect.
    pub mxcsr: Mxcsr,
    /// Load and store the whole x87 state around the instruction.
    pub x87: bool,
    /// The instruction puts the x87 unit into MMX mode.
    pub mmx: bool,
    /// The instruction reads arithmetic flags.
    pub reads_flags: bool,
    /// The instruction writes arithmetic flags.
    pub writes_flags: bool,
    /// Vector registers have upper halves: a VEX instruction.
    pub wide: bool,
}

const STMXCSR_HOST: &[u8] = &[0x0F, 0xAE, 0x5C, 0x24, 0xF0]; // stmxcsr [rsp-16], below the push
const LDMXCSR_HOST: &[u8] = &[0x0F, 0xAE, 0x54, 0x24, 0xF0];
const STMXCSR_GUEST: &[u8] = &[0x0F, 0xAE, 0x5E, MXCSR as u8]; // stmxcsr [rsi+24]
const LDMXCSR_GUEST: &[u8] = &[0x0F, 0xAE, 0x56, MXCSR as u8];
/// Loads the guest's MXCSR unless the host's will do:
/// `(host ^ guest) & (host | !0x3F) == 0` says that control bits agree and no flag is too many.
const SHARE_MXCSR: &[&[u8]] = &[
    STMXCSR_HOST,
    &[0x8B, 0x44, 0x24, 0xF0],        // mov eax, [rsp-16]
    &[0x44, 0x8B, 0x5E, MXCSR as u8], // mov r11d, [rsi+24]
    &[0x41, 0x31, 0xC3],              // xor r11d, eax
    &[0x83, 0xC8, 0xC0],              // or eax, ~0x3F
    &[0x41, 0x85, 0xC3],              // test r11d, eax
    &[0x74, 0x04],                    // jz past the load
    LDMXCSR_GUEST,
];
const ADD_FLAGS_TO_GUEST: &[&[u8]] = &[
    STMXCSR_HOST,
    &[0x44, 0x8B, 0x5C, 0x24, 0xF0],  // mov r11d, [rsp-16]
    &[0x44, 0x09, 0x5E, MXCSR as u8], // or [rsi+24], r11d
];
/// FXRSTOR loads MXCSR too; for the time of the thunk the image holds the host's, because changing it
/// twice would cost as much as the rest.
const LOAD_X87: &[&[u8]] = &[
    &[0x44, 0x8B, 0x5E, MXCSR as u8], // mov r11d, [rsi+24]
    STMXCSR_GUEST,
    &[0x48, 0x0F, 0xAE, 0x0E], // fxrstor64 [rsi]
];
/// FNINIT, slow, only where EMMS does not leave a state that suits the ABI.
const STORE_X87: &[&[u8]] = &[
    &[0x48, 0x0F, 0xAE, 0x06],        // fxsave64 [rsi]
    &[0x44, 0x89, 0x5E, MXCSR as u8], // mov [rsi+24], r11d
    &[0x66, 0x81, 0x3E, 0x7F, 0x03],  // cmp word [rsi], 0x037F: the ABI's control word
    &[0x75, 0x0A],                    // jne to fninit
    &[0xF6, 0x46, 0x02, 0x80],        // test byte [rsi+2], 0x80: an exception is pending
    &[0x75, 0x04],                    // jne to fninit
    EMMS,
    &[0xEB, 0x02], // jmp past fninit
    &[0xDB, 0xE3], // fninit
];
const VZEROUPPER: &[u8] = &[0xC5, 0xF8, 0x77];
const EMMS: &[u8] = &[0x0F, 0x77];
const LOAD_FLAGS: &[u8] = &[0x51, 0x9D]; // push rcx; popfq
const SAVE_FLAGS: &[u8] = &[0x9F, 0x0F, 0x90, 0xC0]; // lahf; seto al
const MOV_R10_RDX: &[u8] = &[0x49, 0x89, 0xD2];
const RET: u8 = 0xC3;

/// A guest register and the host register that stands for it in the thunk.
struct Placed {
    guest: Register,
    host: Register,
    written: bool,
}

/// The code of a thunk, or `None` where the encoder cannot express the instruction.
pub fn encode(ins: &Instruction, environment: Environment, factory: &mut InstructionInfoFactory) -> Option<Vec<u8>> {
    let placed = place_registers(ins, factory);
    let needs_rdx = placed.iter().any(|p| p.host == Register::RDX);
    let base = if needs_rdx { Register::R10 } else { Register::RDX };
    let body = rewrite(ins, base)?;

    let mut code = Vec::with_capacity(128);
    let swapped = environment.mxcsr == Mxcsr::Swapped;
    if swapped {
        code.extend(STMXCSR_HOST);
    }
    if environment.mxcsr == Mxcsr::Shared {
        code.extend(SHARE_MXCSR.concat());
    }
    if needs_rdx {
        code.extend(MOV_R10_RDX);
    }
    if environment.x87 {
        code.extend(LOAD_X87.concat());
    }
    placed.iter().for_each(|p| load(&mut code, p, environment.wide));
    if swapped {
        code.extend(LDMXCSR_GUEST);
    }
    if environment.reads_flags {
        code.extend(LOAD_FLAGS);
    }
    code.extend(body);
    // None of the stores changes a flag, and RAX is stored before the flags take its place.
    placed.iter().filter(|p| p.written).for_each(|p| store(&mut code, p, environment.wide));
    if environment.writes_flags {
        code.extend(SAVE_FLAGS);
    }
    leave(&mut code, environment);
    Some(code)
}

/// Puts the host's floating-point environment back and returns.
fn leave(code: &mut Vec<u8>, environment: Environment) {
    if environment.x87 {
        code.extend(STORE_X87.concat());
    } else if environment.mmx {
        code.extend(EMMS);
    }
    if environment.wide {
        // Upper halves in use would slow down the host's own SSE instructions.
        code.extend(VZEROUPPER);
    }
    match environment.mxcsr {
        Mxcsr::Shared => code.extend(ADD_FLAGS_TO_GUEST.concat()),
        Mxcsr::Swapped => code.extend([STMXCSR_GUEST, LDMXCSR_HOST].concat()),
        Mxcsr::Unused => {}
    }
    code.push(RET);
}

/// Which guest registers take part, and where. All of them are loaded, even those only written:
/// many instructions leave a part of their destination alone.
fn place_registers(ins: &Instruction, factory: &mut InstructionInfoFactory) -> Vec<Placed> {
    let explicit = explicit_gprs(ins);
    let addressing = addressing_registers(ins);
    let mut placed: Vec<Placed> = Vec::new();
    for used in factory.info(ins).used_registers() {
        let register = used.register();
        let guest = register.full_register();
        let written = is_write(used.access());
        if register.is_segment_register() || !(guest.is_vector_register() || guest.is_gpr() || guest.is_mm()) {
            continue;
        }
        if addressing.contains(&guest) && !explicit.contains(&guest) && !implicit_operand(ins, guest) {
            continue;
        }
        let host = match explicit.iter().position(|&e| e == guest) {
            Some(0) => Register::R8,
            Some(_) => Register::R9,
            None => guest,
        };
        match placed.iter_mut().find(|p| p.guest == guest) {
            Some(known) => known.written |= written,
            None => placed.push(Placed { guest, host, written }),
        }
    }
    placed
}

/// Registers that only form the address; the thunk replaces the address, so it must not load them
/// over its own pointers.
fn addressing_registers(ins: &Instruction) -> [Register; 2] {
    [ins.memory_base(), ins.memory_index()].map(Register::full_register)
}

/// PCMPESTRx are the only instructions here whose implicit GPRs may also form the address.
fn implicit_operand(ins: &Instruction, guest: Register) -> bool {
    use iced_x86::Mnemonic::{Pcmpestri, Pcmpestri64, Pcmpestrm, Pcmpestrm64, Pcmpistri};
    let lengths = matches!(guest, Register::RAX | Register::RDX);
    let index = guest == Register::RCX;
    match super::vex::plain(ins.mnemonic()) {
        Pcmpestri | Pcmpestri64 => lengths || index,
        Pcmpestrm | Pcmpestrm64 => lengths,
        Pcmpistri => index,
        _ => false,
    }
}

fn explicit_gprs(ins: &Instruction) -> Vec<Register> {
    let mut registers = Vec::new();
    for operand in 0..ins.op_count() {
        let register = ins.op_register(operand).full_register();
        if ins.op_kind(operand) == OpKind::Register && register.is_gpr() && !registers.contains(&register) {
            registers.push(register);
        }
    }
    registers
}

fn is_write(access: OpAccess) -> bool {
    use OpAccess::{CondWrite, ReadCondWrite, ReadWrite, Write};
    matches!(access, Write | CondWrite | ReadWrite | ReadCondWrite)
}

/// The instruction's bytes with its GPR operands and its memory operand replaced.
fn rewrite(ins: &Instruction, base: Register) -> Option<Vec<u8>> {
    let mut host = *ins;
    let explicit = explicit_gprs(ins);
    for operand in 0..ins.op_count() {
        if ins.op_kind(operand) == OpKind::Register && ins.op_register(operand).is_gpr() {
            let register = ins.op_register(operand);
            let second = explicit.first() != Some(&register.full_register());
            host.set_op_register(operand, stand_in(register, second)?);
        }
        if ins.op_kind(operand) == OpKind::Memory {
            host.set_memory_base(base);
            host.set_memory_index(Register::None);
            host.set_memory_index_scale(1);
            host.set_memory_displacement64(0);
            host.set_memory_displ_size(0);
        }
    }
    host.set_segment_prefix(Register::None);
    host.set_has_rep_prefix(false);
    host.set_has_repne_prefix(false);
    let mut encoder = Encoder::new(64);
    encoder.encode(&host, 0).ok()?;
    Some(encoder.take_buffer())
}

fn stand_in(register: Register, second: bool) -> Option<Register> {
    match (register.size(), second) {
        (4, false) => Some(Register::R8D),
        (4, true) => Some(Register::R9D),
        (8, false) => Some(Register::R8),
        (8, true) => Some(Register::R9),
        _ => None,
    }
}

fn load(code: &mut Vec<u8>, placed: &Placed, wide: bool) {
    let number = placed.guest.number();
    if placed.guest.is_mm() {
        rsi_relative(code, 0x6F, number, ST + 16 * number); // movq mm, [rsi+..]
    } else if placed.guest.is_gpr() {
        rdi_relative(code, 0x8B, placed);
    } else if wide {
        load_ymm(code, number);
    } else {
        rsi_relative(code, 0x28, number, XMM + 16 * number); // movaps xmm, [rsi+..]
    }
}

fn store(code: &mut Vec<u8>, placed: &Placed, wide: bool) {
    let number = placed.guest.number();
    if placed.guest.is_mm() {
        rsi_relative(code, 0x7F, number, ST + 16 * number);
        // mov word [rsi+..], 0xFFFF: MMX writes set the register's exponent and sign.
        code.extend([0x66, 0xC7, 0x86]);
        code.extend(((ST + 16 * number + 8) as u32).to_le_bytes());
        code.extend([0xFF, 0xFF]);
    } else if placed.guest.is_gpr() {
        rdi_relative(code, 0x89, placed);
    } else if wide {
        store_ymm(code, number);
    } else {
        rsi_relative(code, 0x29, number, XMM + 16 * number);
    }
}

/// VMOVAPS of the lower half of a YMM register and VINSERTF128 of the upper one, from their slots.
fn load_ymm(code: &mut Vec<u8>, number: usize) {
    vex_rsi_relative(code, &[1, 0x78, 0x28], number, XMM + 16 * number);
    let and_lower_half = (!number as u8 & 15) << 3;
    vex_rsi_relative(code, &[3, 0x05 | and_lower_half, 0x18], number, YMM_HIGH + 16 * number);
    code.push(1);
}

/// VMOVAPS and VEXTRACTF128 to the slots.
fn store_ymm(code: &mut Vec<u8>, number: usize) {
    vex_rsi_relative(code, &[1, 0x78, 0x29], number, XMM + 16 * number);
    vex_rsi_relative(code, &[3, 0x7D, 0x19], number, YMM_HIGH + 16 * number);
    code.push(1);
}

/// A VEX instruction of register and `[rsi+offset]`: map, last prefix byte, opcode.
fn vex_rsi_relative(code: &mut Vec<u8>, [map, prefix, opcode]: &[u8; 3], number: usize, offset: usize) {
    let extension = if number >= 8 { 0x60 } else { 0xE0 };
    code.extend([0xC4, extension | map, *prefix, *opcode, 0x86 | ((number & 7) << 3) as u8]);
    code.extend((offset as u32).to_le_bytes());
}

/// `0F opcode reg, [rsi+offset]`.
fn rsi_relative(code: &mut Vec<u8>, opcode: u8, number: usize, offset: usize) {
    code.extend((number >= 8).then_some(0x44));
    code.extend([0x0F, opcode, 0x86 | ((number & 7) << 3) as u8]);
    code.extend((offset as u32).to_le_bytes());
}

/// `opcode host, [rdi + 8 * guest]` with REX.W.
fn rdi_relative(code: &mut Vec<u8>, opcode: u8, placed: &Placed) {
    let host = placed.host.number();
    let rex = if host >= 8 { 0x4C } else { 0x48 };
    let offset = 8 * placed.guest.number();
    code.extend([rex, opcode, 0x47 | ((host & 7) << 3) as u8, offset as u8]);
}

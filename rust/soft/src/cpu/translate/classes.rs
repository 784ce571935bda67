//! Analyse: what the translator does with each instruction, and what an instruction does to the flags.
//!
//! An instruction that is in no class here is executed by its interpreter handler, called from
//! translated code: the table decides speed, not coverage.

use super::shape::{Operand, Role, Shape};
use crate::host::classify::host_has;
use crate::host::vex::plain;
use iced_x86::{ConstantOffsets, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register, RflagsBits};

/// How an instruction is emitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// By a call of the interpreter's handler.
    Handler,
    /// Same opcode, other registers; a memory operand becomes a host address.
    Copy,
    /// A vector instruction, copied as well.
    Vector,
    /// Nothing to do.
    Nothing,
    /// MOV of an immediate to a register.
    MovImmediate,
    Lea,
    Push,
    PushImmediate,
    /// PUSH of a quadword in memory.
    PushMemory,
    Pop,
    Leave,
    /// CBW, CWDE, CDQE.
    Widen,
    /// CWD, CDQ, CQO.
    Spread,
    /// MUL and one-operand IMUL.
    Multiply,
    /// DIV, IDIV (true).
    Divide(bool),
    Cmpxchg,
    /// CLC, STC, CMC.
    Carry,
    Jcc,
    Jmp,
    JmpIndirect,
    Call,
    CallIndirect,
    Ret,
    Cli,
    Sti,
    PushFlags,
    PopFlags,
    SwapGs,
}

/// The arithmetic flags, as iced counts them.
pub const ARITHMETIC: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::PF | RflagsBits::CF;

/// An instruction ready to be emitted.
pub struct Plan {
    /// How.
    pub class: Class,
    /// Its encoding.
    pub shape: Shape,
    /// Its operands, at most four.
    pub operands: [Option<Operand>; 4],
    /// Index of the memory operand.
    pub memory: Option<usize>,
    /// The flags must be right before it: it reads some, or leaves some alone.
    pub needs_flags: bool,
    /// It changes flags.
    pub sets_flags: bool,
}

impl Plan {
    /// Executed by its handler.
    fn handler() -> Self {
        Self {
            class: Class::Handler,
            shape: Shape::default(),
            operands: [None; 4],
            memory: None,
            needs_flags: false,
            sets_flags: false,
        }
    }

    /// It destroys the host's flags before it could set the guest's, or may leave for where they must be in the
    /// `Cpu`.
    pub fn clobbers_flags(&self) -> bool {
        let simple = matches!(
            self.class,
            Class::Copy
                | Class::Nothing
                | Class::MovImmediate
                | Class::Lea
                | Class::Widen
                | Class::Spread
                | Class::Multiply
                | Class::Carry
                | Class::Jcc
                | Class::Jmp
        );
        !simple || self.memory.is_some() && self.class != Class::Lea
    }
}

/// Whether all six flags come from the operands alone; those the manual calls undefined are as the
/// host leaves them.
fn defines_all(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        plain(mnemonic),
        Add | Adc
            | Sub
            | Sbb
            | And
            | Or
            | Xor
            | Cmp
            | Test
            | Neg
            | Imul
            | Mul
            | Xadd
            | Cmpxchg
            | Comisd
            | Comiss
            | Ucomisd
            | Ucomiss
            | Ptest
            | Vtestps
            | Vtestpd
            | Popcnt
    )
}

/// A shift by an immediate that is not zero sets all flags.
fn fixed_shift(ins: &Instruction) -> bool {
    let shift = matches!(ins.mnemonic(), Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar);
    let mask = if width(ins, 0) == 8 { 63 } else { 31 };
    shift && is_immediate(ins, 1) && ins.immediate(1) & mask != 0
}

fn class_of(ins: &Instruction) -> Class {
    use Class as C;
    use Mnemonic::*;
    let registers_only = |index| index >= ins.op_count() || ins.op_kind(index) == OpKind::Register;
    match ins.mnemonic() {
        Mov if ins.op0_kind() == OpKind::Register && is_immediate(ins, 1) => C::MovImmediate,
        Add | Or | Adc | Sbb | And | Sub | Xor | Cmp | Test | Inc | Dec | Neg | Not | Mov | Movzx | Movsx | Movsxd
        | Movnti | Bswap | Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Xadd | Xchg | Bsf | Bsr | Tzcnt | Lzcnt
        | Popcnt => C::Copy,
        Cmovo | Cmovno | Cmovb | Cmovae | Cmove | Cmovne | Cmovbe | Cmova | Cmovs | Cmovns | Cmovp | Cmovnp | Cmovl
        | Cmovge | Cmovle | Cmovg => C::Copy,
        Seto | Setno | Setb | Setae | Sete | Setne | Setbe | Seta | Sets | Setns | Setp | Setnp | Setl | Setge
        | Setle | Setg => C::Copy,
        // With a register offset the memory operand is a bit string.
        Bt | Bts | Btr | Btc if registers_only(0) || is_immediate(ins, 1) => C::Copy,
        Shld | Shrd if is_immediate(ins, 2) => C::Copy,
        Imul if ins.op_count() > 1 => C::Copy,
        Crc32 => C::Copy,
        Imul | Mul => C::Multiply,
        Div => C::Divide(false),
        Idiv => C::Divide(true),
        Lea => C::Lea,
        Push if ins.op0_kind() == OpKind::Register && ins.op0_register().is_gpr64() => C::Push,
        Push if ins.op0_kind() == OpKind::Memory && ins.stack_pointer_increment() == -8 => C::PushMemory,
        Push if is_immediate(ins, 0) && ins.stack_pointer_increment() == -8 => C::PushImmediate,
        Pop if ins.op0_kind() == OpKind::Register && ins.op0_register().is_gpr64() => C::Pop,
        Leave if ins.stack_pointer_increment() == 0 && ins.code() == iced_x86::Code::Leaveq => C::Leave,
        Cbw | Cwde | Cdqe => C::Widen,
        Cwd | Cdq | Cqo => C::Spread,
        // Compared with itself it would be written twice.
        Cmpxchg if ins.op0_kind() == OpKind::Memory || ins.op0_register().full_register() != Register::RAX => {
            C::Cmpxchg
        }
        Clc | Stc | Cmc => C::Carry,
        Cli => C::Cli,
        Sti => C::Sti,
        Pushfq => C::PushFlags,
        Popfq => C::PopFlags,
        Swapgs => C::SwapGs,
        Nop | Endbr64 | Endbr32 | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchw | Reservednop
        | Lfence | Sfence => C::Nothing,
        Jo | Jno | Jb | Jae | Je | Jne | Jbe | Ja | Js | Jns | Jp | Jnp | Jl | Jge | Jle | Jg
            if ins.op0_kind() == OpKind::NearBranch64 =>
        {
            C::Jcc
        }
        Jmp if ins.op0_kind() == OpKind::NearBranch64 => C::Jmp,
        Call if ins.op0_kind() == OpKind::NearBranch64 => C::Call,
        Jmp if ins.is_jmp_near_indirect() => C::JmpIndirect,
        Call if ins.is_call_near_indirect() => C::CallIndirect,
        Ret => C::Ret,
        Andn | Bextr | Blsi | Blsmsk | Blsr | Bzhi | Sarx | Shlx | Shrx | Rorx | Pdep | Pext | Mulx | Adcx | Adox
        | Movbe
            if host_has(ins.code()) =>
        {
            C::Copy
        }
        _ if super::vector::covered(ins) => C::Vector,
        _ => C::Handler,
    }
}

fn is_immediate(ins: &Instruction, index: u32) -> bool {
    index < ins.op_count() && (OpKind::Immediate8..=OpKind::Immediate32to64).contains(&ins.op_kind(index))
}

/// The plan for an instruction of 64-bit code.
pub fn plan(ins: &Instruction, bytes: &[u8], offsets: &ConstantOffsets, factory: &mut InstructionInfoFactory) -> Plan {
    let class = class_of(ins);
    let shape = Shape::new(bytes, offsets);
    let (Some(shape), true) = (shape, class != Class::Handler && ins.op_count() <= 4) else { return Plan::handler() };
    let mut operands = [None; 4];
    let info = factory.info(ins);
    let kinds = ins.op_code();
    for index in 0..ins.op_count() {
        let operand = Operand::new(ins, index, kinds.op_kind(index), info.op_access(index));
        let high = operand.high_byte() && !takes_high_bytes(ins, class);
        if high || operand.role == Role::Other && class_needs_operands(class) {
            return Plan::handler();
        }
        operands[index as usize] = Some(operand);
    }
    let memory = operands.iter().position(|o| o.is_some_and(|o| o.role == Role::Memory));
    let memory = memory.filter(|_| class != Class::Nothing);
    if memory.is_some() && !addressable(ins) {
        return Plan::handler();
    }
    let no_modrm = memory.is_some() && shape.modrm.is_none();
    let narrow = matches!(class, Class::Multiply | Class::Divide(_)) && width(ins, 0) < 4;
    if class_needs_operands(class) && (no_modrm || narrow) {
        return Plan::handler();
    }
    let modified = ins.rflags_modified() & ARITHMETIC;
    let reads = ins.rflags_read() & ARITHMETIC != 0;
    let partly = modified != 0 && !defines_all(ins.mnemonic()) && !fixed_shift(ins);
    Plan { class, shape, operands, memory, needs_flags: reads || partly, sets_flags: modified != 0 }
}

/// AH, CH, DH and BH can be brought and put back there.
fn takes_high_bytes(ins: &Instruction, class: Class) -> bool {
    let exchanges = matches!(ins.mnemonic(), Mnemonic::Xchg | Mnemonic::Xadd);
    let by_cl = ins.op_count() == 2 && ins.op1_kind() == OpKind::Register && ins.op1_register() == Register::CL;
    class == Class::Copy && !exchanges && !by_cl
}

/// Bytes of operand `index`.
pub fn width(ins: &Instruction, index: u32) -> usize {
    match ins.op_kind(index) {
        OpKind::Register => ins.op_register(index).size(),
        _ => ins.memory_size().size(),
    }
}

/// Classes whose emitters look at roles.
fn class_needs_operands(class: Class) -> bool {
    matches!(
        class,
        Class::Copy | Class::Vector | Class::MovImmediate | Class::Cmpxchg | Class::Multiply | Class::Divide(_)
    )
}

/// The address is one the emitter can form: general registers, RIP, FS and GS.
fn addressable(ins: &Instruction) -> bool {
    let base = ins.memory_base();
    let index = ins.memory_index();
    if base == Register::RIP && i32::try_from(ins.memory_displacement64() as i64).is_err() {
        return false;
    }
    (base == Register::None || base == Register::RIP || base.is_gpr32() || base.is_gpr64())
        && (index == Register::None || index.is_gpr32() || index.is_gpr64())
}

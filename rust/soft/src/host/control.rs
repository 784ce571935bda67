//! Instructions that only move control state: done here in Rust, because they are cheaper and safer
//! than a round trip through the host's FPU.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::fpenv::{fldenv, fnsave, fnstenv, frstor, EnvFormat};
use super::fpstate::{array, mxcsr_is_valid, FpState};
use super::thunk::{ExecContext, MemAccess, Outcome, Scratch};

/// A control instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlOp {
    /// FWAIT, FNENI, FNDISI, FNSETPM: nothing beyond the check for pending exceptions.
    Nothing,
    /// EMMS.
    Emms,
    /// LDMXCSR; #GP on reserved bits.
    Ldmxcsr,
    /// STMXCSR.
    Stmxcsr,
    /// FNCLEX.
    Fnclex,
    /// FNINIT.
    Fninit,
    /// FLDCW.
    Fldcw,
    /// FNSTCW.
    Fnstcw,
    /// FNSTSW to memory.
    FnstswMemory,
    /// FNSTSW AX.
    FnstswAx,
    /// FLDENV, with 32-bit operand size where set.
    Fldenv(bool),
    /// FNSTENV.
    Fnstenv(bool),
    /// FRSTOR.
    Frstor(bool),
    /// FNSAVE.
    Fnsave(bool),
    /// MASKMOVDQU of data and mask register.
    MaskmovXmm(u8, u8),
    /// MASKMOVQ of data and mask register.
    MaskmovMm(u8, u8),
    /// VZEROUPPER.
    ZeroUpper,
    /// VZEROALL.
    ZeroAll,
}

/// The control instruction and its memory operand, if `ins` is one.
pub fn control_op(ins: &Instruction) -> Option<(ControlOp, MemAccess)> {
    use ControlOp as Op;
    use MemAccess::{MaskedWrite, Read, Write};
    Some(match ins.code() {
        Code::Wait | Code::Fneni | Code::Fndisi | Code::Fnsetpm => (Op::Nothing, MemAccess::None),
        Code::Emms => (Op::Emms, MemAccess::None),
        Code::Ldmxcsr_m32 | Code::VEX_Vldmxcsr_m32 => (Op::Ldmxcsr, Read(4)),
        Code::Stmxcsr_m32 | Code::VEX_Vstmxcsr_m32 => (Op::Stmxcsr, Write(4)),
        Code::Fnclex => (Op::Fnclex, MemAccess::None),
        Code::Fninit => (Op::Fninit, MemAccess::None),
        Code::Fldcw_m2byte => (Op::Fldcw, Read(2)),
        Code::Fnstcw_m2byte => (Op::Fnstcw, Write(2)),
        Code::Fnstsw_m2byte => (Op::FnstswMemory, Write(2)),
        Code::Fnstsw_AX => (Op::FnstswAx, MemAccess::None),
        Code::Fldenv_m14byte => (Op::Fldenv(false), Read(14)),
        Code::Fldenv_m28byte => (Op::Fldenv(true), Read(28)),
        Code::Fnstenv_m14byte => (Op::Fnstenv(false), Write(14)),
        Code::Fnstenv_m28byte => (Op::Fnstenv(true), Write(28)),
        Code::Frstor_m94byte => (Op::Frstor(false), Read(94)),
        Code::Frstor_m108byte => (Op::Frstor(true), Read(108)),
        Code::Fnsave_m94byte => (Op::Fnsave(false), Write(94)),
        Code::Fnsave_m108byte => (Op::Fnsave(true), Write(108)),
        Code::VEX_Vzeroupper => (Op::ZeroUpper, MemAccess::None),
        Code::VEX_Vzeroall => (Op::ZeroAll, MemAccess::None),
        Code::Maskmovdqu_rDI_xmm_xmm | Code::VEX_Vmaskmovdqu_rDI_xmm_xmm => {
            let [data, mask] = register_pair(ins);
            (Op::MaskmovXmm(data, mask), MaskedWrite(16))
        }
        Code::Maskmovq_rDI_mm_mm => {
            let [data, mask] = register_pair(ins);
            (Op::MaskmovMm(data, mask), MaskedWrite(8))
        }
        _ => return None,
    })
}

/// Numbers of the two register operands of MASKMOVx, data first.
fn register_pair(ins: &Instruction) -> [u8; 2] {
    let mut registers = (0..ins.op_count()).filter(|&i| ins.op_kind(i) == OpKind::Register).map(|i| ins.op_register(i));
    [(); 2].map(|()| registers.next().unwrap_or(Register::XMM0).number() as u8)
}

/// Runs `op`. Pending exceptions have been checked before.
pub fn run(
    op: ControlOp,
    regs: &mut [u64; 16],
    fp: &mut FpState,
    scratch: &mut Scratch,
    context: &ExecContext,
) -> Outcome {
    let memory = &mut scratch.0;
    let format = |wide| EnvFormat { wide, real_mode: context.real_mode };
    match op {
        ControlOp::Nothing => {}
        ControlOp::Emms => {
            fp.set_top_keeping_registers(0);
            fp.set_ftw_abridged(0);
        }
        ControlOp::Ldmxcsr => {
            let value = u32::from_le_bytes(array(&memory[..]));
            if !mxcsr_is_valid(value) {
                return Outcome::Gp;
            }
            fp.set_mxcsr(value);
        }
        ControlOp::Stmxcsr => memory[..4].copy_from_slice(&fp.mxcsr().to_le_bytes()),
        ControlOp::Fnclex => fp.fnclex(),
        ControlOp::Fninit => fp.fninit(),
        ControlOp::Fldcw => fp.set_fcw(u16::from_le_bytes(array(&memory[..]))),
        ControlOp::Fnstcw => memory[..2].copy_from_slice(&fp.fcw().to_le_bytes()),
        ControlOp::FnstswMemory => memory[..2].copy_from_slice(&fp.fsw().to_le_bytes()),
        ControlOp::FnstswAx => regs[0] = regs[0] & !0xFFFF | u64::from(fp.fsw()),
        ControlOp::Fldenv(wide) => fldenv(fp, memory, format(wide)),
        ControlOp::Fnstenv(wide) => fnstenv(fp, memory, format(wide)),
        ControlOp::Frstor(wide) => frstor(fp, memory, format(wide)),
        ControlOp::Fnsave(wide) => fnsave(fp, memory, format(wide)),
        ControlOp::MaskmovXmm(data, mask) => {
            let (data, mask) = (fp.xmm(data.into()), fp.xmm(mask.into()));
            masked(scratch, &data.to_le_bytes(), &mask.to_le_bytes());
        }
        ControlOp::ZeroUpper | ControlOp::ZeroAll => {
            for index in 0..if context.long_mode { 16 } else { 8 } {
                fp.set_ymm_high(index, 0);
                if op == ControlOp::ZeroAll {
                    fp.set_xmm(index, 0);
                }
            }
        }
        ControlOp::MaskmovMm(data, mask) => {
            fp.enter_mmx();
            let (data, mask) = (fp.mm(data.into()), fp.mm(mask.into()));
            masked(scratch, &data.to_le_bytes(), &mask.to_le_bytes());
        }
    }
    Outcome::Done
}

/// Data to the scratch's start, one bit per byte to write as a u16 at [`Scratch::MASK`].
fn masked(scratch: &mut Scratch, data: &[u8], mask: &[u8]) {
    scratch.0[..data.len()].copy_from_slice(data);
    let bits = mask.iter().enumerate().fold(0_u16, |bits, (i, byte)| bits | u16::from(byte >> 7) << i);
    scratch.0[Scratch::MASK..Scratch::MASK + 2].copy_from_slice(&bits.to_le_bytes());
}

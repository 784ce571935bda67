//! SSE instructions: the guest's XMM registers live in the host's, opened by the first block that
//! uses them and closed by whatever leaves translated code (`stubs.rs`). Floating-point arithmetic
//! also needs the guest's MXCSR in force, which is possible only while it masks all exceptions: a
//! SIMD exception must never reach the host.

use crate::host::classify::{class, host_has, is_aligned, supported, uses_mxcsr, Class};
use crate::host::control::control_op;
use iced_x86::{Instruction, Mnemonic, OpKind};

/// Whether an instruction can be copied: no implied operands but XMM0, and the host has it.
pub fn covered(ins: &Instruction) -> bool {
    use Mnemonic::*;
    let code = ins.code();
    let implied = matches!(
        ins.mnemonic(),
        Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64 | Pcmpistri | Pcmpistrm | Maskmovdqu | Maskmovq
    );
    supported(code)
        && host_has(code)
        && !implied
        && matches!(class(ins), Class::SseInt | Class::SseFp)
        && control_op(ins).is_none()
        && !ins.has_lock_prefix()
}

/// What must be open: 1 for the registers, 2 for MXCSR too.
pub fn level(ins: &Instruction) -> u8 {
    1 + uses_mxcsr(ins.code()) as u8
}

/// The alignment the memory operand must have, or else #GP(0).
pub fn alignment(ins: &Instruction) -> usize {
    let memory = (0..ins.op_count()).any(|index| ins.op_kind(index) == OpKind::Memory);
    if memory && ins.memory_size().size() == 16 && is_aligned(ins) {
        16
    } else {
        1
    }
}

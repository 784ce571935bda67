//! SSE and AVX instructions: the guest's XMM registers live in the host's, opened by the first block that
//! uses them and closed by whatever leaves translated code (`stubs.rs`). Floating-point arithmetic
//! also needs the guest's MXCSR in force, which is possible only while it masks all exceptions: a
//! SIMD exception must never reach the host. The upper halves of YMM registers are a door of their own,
//! so that guests which only use SSE do not pay for them.

use crate::host::classify::{class, host_has, is_aligned, supported, uses_mxcsr, Class};
use crate::host::control::control_op;
use crate::host::vex::{is_vex, plain};
use iced_x86::{Instruction, Mnemonic, OpKind};

/// Whether an instruction can be copied: no implied operands but XMM0, and the host has it.
pub fn covered(ins: &Instruction) -> bool {
    use Mnemonic::*;
    let code = ins.code();
    // `control_op` is for the interpreter.
    if matches!(ins.mnemonic(), Vzeroupper | Vzeroall) {
        return supported(code);
    }
    let implied = matches!(
        plain(ins.mnemonic()),
        Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64 | Pcmpistri | Pcmpistrm | Maskmovdqu | Maskmovq
    );
    supported(code)
        && host_has(code)
        && !implied
        && matches!(class(ins), Class::SseInt | Class::SseFp | Class::Avx)
        && control_op(ins).is_none()
        && !ins.has_lock_prefix()
}

/// What is open of the vector registers: bits.
pub mod open {
    /// XMM registers.
    pub const XMM: u8 = 1;
    /// MXCSR is the guest's.
    pub const MXCSR: u8 = 2;
    /// The upper halves of YMM registers.
    pub const YMM: u8 = 4;
    /// The doors there are.
    pub const DOORS: [u8; 4] = [XMM, XMM | MXCSR, XMM | YMM, XMM | MXCSR | YMM];
}

/// What must be open: one of [`open::DOORS`], as its index.
pub fn door(ins: &Instruction) -> usize {
    uses_mxcsr(ins.code()) as usize | (is_vex(ins.code()) as usize) << 1
}

/// The alignment the memory operand must have, or else #GP(0).
pub fn alignment(ins: &Instruction) -> usize {
    let memory = (0..ins.op_count()).any(|index| ins.op_kind(index) == OpKind::Memory);
    match ins.memory_size().size() {
        size @ (16 | 32) if memory && is_aligned(ins) => size,
        _ => 1,
    }
}

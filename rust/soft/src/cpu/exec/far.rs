//! Control transfers beyond the segment: far JMP, CALL and RET, INT, IRET, SYSCALL and their kin.

use crate::cpu::table::Row;
use crate::rows;

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {};

/// Placeholder: far JMP.
pub fn bind_jmp_far(_: &mut crate::cpu::bind::Binder) -> Option<crate::cpu::op::Handler> {
    None
}
/// Placeholder: far CALL.
pub fn bind_call_far(_: &mut crate::cpu::bind::Binder) -> Option<crate::cpu::op::Handler> {
    None
}

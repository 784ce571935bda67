//! Privileged and system instructions.

use crate::cpu::table::Row;
use crate::rows;

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {};

/// Placeholder: MOV to and from segment, control and debug registers.
pub fn bind_mov_special(_: &mut crate::cpu::bind::Binder) -> Option<crate::cpu::op::Handler> {
    None
}
/// Placeholder: PUSH of a segment register.
pub fn bind_push_sreg(_: &mut crate::cpu::bind::Binder) -> Option<crate::cpu::op::Handler> {
    None
}
/// Placeholder: POP of a segment register.
pub fn bind_pop_sreg(_: &mut crate::cpu::bind::Binder) -> Option<crate::cpu::op::Handler> {
    None
}

//! Control transfers beyond the segment: far JMP, CALL and RET, INT, IRET, SYSCALL and their kin.

use crate::cpu::table::Row;
use crate::rows;

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {};

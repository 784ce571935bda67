//! Privileged and system instructions.

use crate::cpu::table::Row;
use crate::rows;

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {};

//! The instruction handlers, by family; each file brings its rows of the opcode table.

pub mod alu;
pub mod far;
pub mod system;

use super::table::Row;

/// The rows of all families.
pub const ROWS: &[&[Row]] = &[alu::ROWS, far::ROWS, system::ROWS];

//! The instruction handlers, by family; each file brings its rows of the opcode table.

pub mod alu;
pub mod avx;
pub mod bits;
pub mod control;
pub mod far;
pub mod flow;
pub mod fp;
pub mod iret;
pub mod mov;
pub mod muldiv;
pub mod segments;
pub mod shift;
pub mod string;
pub mod syscall;
pub mod sysio;
pub mod system;
pub mod xsave;

use super::table::Row;

/// The rows of all families.
pub const ROWS: &[&[Row]] = &[
    alu::ROWS,
    avx::ROWS,
    bits::ROWS,
    flow::ROWS,
    fp::ROWS,
    mov::ROWS,
    muldiv::ROWS,
    shift::ROWS,
    string::ROWS,
    control::ROWS,
    far::ROWS,
    iret::ROWS,
    segments::ROWS,
    syscall::ROWS,
    sysio::ROWS,
    system::ROWS,
    xsave::ROWS,
];

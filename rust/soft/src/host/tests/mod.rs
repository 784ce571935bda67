//! Tests of the thunks: against the host running the unchanged instruction, and case by case.

mod against_host;
mod cases;
mod oracle;
mod xsave;

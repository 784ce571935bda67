//! `make fuzz`: random user-mode instruction sequences, executed by the host's CPU and by Ostler's
//! interpreter, and compared: registers, flags, x87, MMX and SSE state, memory, exceptions.
//!
//! | file | what |
//! |---|---|
//! | `select.rs`, `encode.rs`, `generate.rs` | which instructions, their bytes, sequences of them |
//! | `layout.rs`, `values.rs` | address space, initial registers and memory |
//! | `native.rs`, `subject.rs` | the two executors |
//! | `compare.rs`, `shrink.rs`, `corpus.rs` | differences, reproducers, regressions |
//! | `coverage.rs`, `campaign.rs` | what was tried, the loop |
//! | `robust.rs` | random bytes in random states must neither panic nor hang the interpreter |

pub mod campaign;
pub mod compare;
pub mod corpus;
pub mod coverage;
pub mod encode;
pub mod generate;
pub mod layout;
pub mod native;
pub mod recipes;
pub mod rng;
pub mod robust;
pub mod select;
pub mod sequence;
pub mod shapes;
pub mod shrink;
pub mod subject;
pub mod values;

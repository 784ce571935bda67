//! Host-specific code: the guest's extended state, and running the host's own SIMD and x87
//! instructions on it.
//!
//! Everything that knows the host's instruction set or touches its FPU lives below this module, so
//! that an interpreter for other hosts has one folder to replace. The way of one guest instruction:
//!
//! 1. decode time: [`thunk::ThunkCache::get`] turns the decoded instruction into a [`thunk::Thunk`];
//! 2. run time: the interpreter computes the address, checks alignment and access, copies a memory
//!    operand into a [`thunk::Scratch`], calls [`thunk::exec`] and copies the result out again.
//!
//! The state images (FXSAVE, FNSAVE, XSAVE families) are pure functions over byte slices.

pub mod classify;
pub mod control;
pub mod encode;
pub mod execmem;
pub mod fpenv;
pub mod fpstate;
pub mod fxsave;
pub mod kvm;
pub mod pointer;
pub mod soft_crypto;
pub(crate) mod table;
pub mod thunk;
pub mod vex;
pub mod xsave;

#[cfg(test)]
mod tests;

//! Ostler software CPU

pub mod host;

//! Ostler software CPU

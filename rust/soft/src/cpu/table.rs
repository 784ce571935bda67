//! The opcode table: one row per mnemonic, from which decoder binding, coverage and tests derive.

use super::bind::Binder;
use super::exec;
use super::op::Handler;
use crate::host::classify::supported;
use iced_x86::{Code, Mnemonic};
use std::sync::OnceLock;

/// Who can execute an instruction, and how it is tested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Deterministic in user mode: compared with the host by `make fuzz`.
    User,
    /// A user-mode branch: compared too, its target being within the sequence.
    Branch,
    /// User mode, but its result is not reproducible (RDTSC, RDRAND, CPUID, system calls).
    Volatile,
    /// Privileged or about modes and segments: tests/accel's business.
    System,
    /// Runs on the host's SIMD or x87 unit; these rows come from `host::classify::supported`.
    Simd,
}

/// One row.
#[derive(Clone, Copy)]
pub struct Row {
    /// The instruction.
    pub mnemonic: Mnemonic,
    /// Who can execute it.
    pub class: Class,
    /// Where it is specified.
    pub manual: &'static str,
    /// Chooses its handler by operand kinds and sizes; `None`: this form does not exist.
    pub bind: fn(&mut Binder) -> Option<Handler>,
}

/// Shorthand for rows: `rows! { User "SDM 2A" { Add => alu::bind::<Add>, … } }`.
#[macro_export]
#[doc(hidden)]
macro_rules! rows {
    ($($class:ident $manual:literal { $($mnemonic:ident => $bind:expr,)* })*) => {
        &[$($($crate::cpu::table::Row {
            mnemonic: iced_x86::Mnemonic::$mnemonic,
            class: $crate::cpu::table::Class::$class,
            manual: $manual,
            bind: $bind,
        },)*)*]
    };
}

/// All rows by mnemonic number.
fn index() -> &'static [Option<Row>] {
    static INDEX: OnceLock<Vec<Option<Row>>> = OnceLock::new();
    INDEX.get_or_init(|| {
        let mut index = vec![None; Mnemonic::values().len()];
        for code in Code::values().filter(|&code| supported(code)) {
            let mnemonic = code.mnemonic();
            index[mnemonic as usize] = Some(Row {
                mnemonic,
                class: Class::Simd,
                manual: "SDM vol. 1, 8-12; by host thunk",
                bind: exec::fp::bind,
            });
        }
        for row in exec::ROWS.iter().flat_map(|rows| rows.iter()) {
            index[row.mnemonic as usize] = Some(*row);
        }
        index
    })
}

/// Makes what decoding looks things up in, as it is the same for all vCPUs of a process and of those forked from it:
/// milliseconds, and more than a MiB.
pub(crate) fn prepare() {
    index();
    crate::host::vex::plain(Mnemonic::INVALID);
    // The tables of decoder and encoder.
    let nop = iced_x86::Decoder::new(64, &[0x90], iced_x86::DecoderOptions::NONE).decode();
    let _ = iced_x86::Encoder::new(64).encode(&nop, 0);
}

/// The row of a mnemonic.
pub fn row(mnemonic: Mnemonic) -> Option<&'static Row> {
    index()[mnemonic as usize].as_ref()
}

/// Every row.
pub fn rows() -> impl Iterator<Item = &'static Row> {
    index().iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_no_mnemonic_has_two_rows() {
        let mut seen = std::collections::HashSet::new();
        for row in exec::ROWS.iter().flat_map(|rows| rows.iter()) {
            assert!(seen.insert(row.mnemonic), "{:?} twice", row.mnemonic);
        }
    }
}

//! What was compared, by row of the opcode table and by encoding.

use crate::select::Catalogue;
use iced_x86::{Code, Mnemonic};

/// The encodings of both modes.
fn codes(catalogue: &Catalogue) -> Vec<Code> {
    let both = catalogue.rows.iter().flat_map(|row| row.codes.iter().chain(&row.codes32));
    let mut codes: Vec<Code> = both.copied().collect();
    codes.sort();
    codes.dedup();
    codes
}

/// Counts per encoding.
pub struct Coverage {
    completed: Vec<u64>,
    faulted: Vec<u64>,
}

impl Default for Coverage {
    fn default() -> Self {
        let codes = Code::values().len();
        Self { completed: vec![0; codes], faulted: vec![0; codes] }
    }
}

impl Coverage {
    /// Notes an executed instruction.
    pub fn note(&mut self, code: Code, completed: bool) {
        let counts = if completed { &mut self.completed } else { &mut self.faulted };
        counts[code as usize] += 1;
    }

    /// Executed to its end, or always faulting by its nature.
    fn covered(&self, code: Code) -> bool {
        let faults = matches!(code.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 | Mnemonic::Hlt)
            || matches!(code.mnemonic(), Mnemonic::Int3 | Mnemonic::Int1);
        self.completed[code as usize] > 0 || faults && self.faulted[code as usize] > 0
    }

    /// Encodings of the catalogue that were executed, and all of them.
    pub fn encodings(&self, catalogue: &Catalogue) -> (usize, usize) {
        let all = codes(catalogue);
        (all.iter().filter(|&&code| self.covered(code)).count(), all.len())
    }

    /// Encodings never executed.
    pub fn missing_encodings(&self, catalogue: &Catalogue) -> Vec<Code> {
        codes(catalogue).into_iter().filter(|&code| !self.covered(code)).collect()
    }

    /// Rows of which no encoding was executed.
    pub fn missing_rows(&self, catalogue: &Catalogue) -> Vec<Mnemonic> {
        let missing =
            catalogue.rows.iter().filter(|row| !row.codes.iter().chain(&row.codes32).any(|&code| self.covered(code)));
        missing.map(|row| row.mnemonic).collect()
    }

    /// Exceptions compared.
    pub fn faults(&self) -> u64 {
        self.faulted.iter().sum()
    }
}

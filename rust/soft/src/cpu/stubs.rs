//! Placeholders until segment.rs, interrupt.rs and debug.rs land: whoever lands them deletes these.

use super::{Cpu, Exit, Stop, R};

impl Cpu {
    /// Delivers `self.fault`; RIP is the faulting (or, for traps, the next) instruction.
    pub fn deliver_fault(&mut self) -> R {
        self.exit = Some(Exit::Shutdown);
        Err(Stop::Exit)
    }
    /// Delivers an external interrupt.
    pub fn deliver_interrupt(&mut self, _vector: u8) -> R {
        self.deliver_fault()
    }
    /// Delivers an NMI.
    pub fn deliver_nmi(&mut self) -> R {
        self.deliver_fault()
    }
    /// TF, enabled debug registers or guest debugging ask for one instruction at a time.
    pub fn single_step_wanted(&self) -> bool {
        false
    }
    /// Instruction breakpoints, before an instruction: `Err(Fault)` with #DB or `Err(Exit)`.
    pub fn debug_before(&mut self) -> R {
        Ok(())
    }
    /// Data breakpoints and single step, after an instruction that ended with `stop` (RIP is the next one's).
    pub fn debug_after(&mut self, _stop: Stop) -> R {
        Ok(())
    }
}

//! Hardware task switches. SDM vol. 3, 7.

use super::event::Event;
use super::segment::selector_error;
use super::{Cpu, R};

impl Cpu {
    /// An event through a task gate.
    pub(super) fn task_gate(&mut self, selector: u16, event: Event) -> R {
        Err(self.gp(selector_error(selector) | event.ext()))
    }
}

impl Cpu {
    /// A far JMP or CALL to a TSS; `next` is the old task's RIP.
    pub(super) fn task_jump(&mut self, selector: u16, _next: u64, _call: bool) -> R {
        Err(self.gp(selector_error(selector)))
    }
}

impl Cpu {
    /// IRET with NT set.
    pub(super) fn task_return(&mut self) -> R {
        Err(self.gp(selector_error(self.tr.selector)))
    }
}

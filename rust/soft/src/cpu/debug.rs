//! Debug registers: breakpoints, single step, guest debugging by user space.
//!
//! SDM vol. 3, 17.2-17.3; `KVM_SET_GUEST_DEBUG` of the KVM API.

use super::state::rflags;
use super::{vector, Cpu, Fault, Stop, R};

/// DR6 bits.
#[allow(missing_docs)]
pub mod dr6 {
    pub const HITS: u64 = 0xf;
    pub const BD: u64 = 1 << 13;
    pub const BS: u64 = 1 << 14;
    pub const BT: u64 = 1 << 15;
    /// Bits that read as one.
    pub const FIXED: u64 = 0xffff_0ff0;
}

/// DR7 bits.
#[allow(missing_docs)]
pub mod dr7 {
    pub const ENABLES: u64 = 0xff;
    pub const GD: u64 = 1 << 13;
    /// Reads as one.
    pub const FIXED: u64 = 0x400;
}

/// Values of `Cpu::shadow`, as in `kvm_vcpu_events.interrupt.shadow`.
#[allow(missing_docs)]
pub mod shadow {
    pub const MOV_SS: u8 = 1;
    pub const STI: u8 = 2;
}

/// `kvm_guest_debug.control` bits.
#[allow(missing_docs)]
pub mod guest_debug {
    pub const ENABLE: u32 = 1;
    pub const SINGLE_STEP: u32 = 2;
    pub const USE_SW_BP: u32 = 1 << 16;
    pub const USE_HW_BP: u32 = 1 << 17;
}

impl Cpu {
    /// Stops with #DB; `bits` go into DR6 when it is delivered.
    #[cold]
    pub fn debug_exception(&mut self, bits: u64) -> Stop {
        self.fault = Fault { vector: vector::DB, error: None, payload: bits };
        Stop::Fault
    }

    /// DR6 and DR7 at the delivery of #DB: the breakpoint bits are set anew, BD BS BT add up, GD
    /// is cleared so that the handler can use the registers.
    pub(super) fn note_debug_exception(&mut self, bits: u64) {
        self.dr[6] = self.dr[6] & !dr6::HITS | dr6::FIXED | bits;
        self.dr[7] &= !dr7::GD;
    }
}

impl Cpu {
    /// The DR7 in force: user space's, when it debugs by hardware breakpoints.
    fn dr7_now(&self) -> u64 {
        if self.guest_debug & guest_debug::USE_HW_BP != 0 {
            self.guest_debug_dr[7]
        } else {
            self.dr[7]
        }
    }

    /// Whether any breakpoint is enabled.
    pub fn breakpoints_armed(&self) -> bool {
        self.dr7_now() & dr7::ENABLES != 0
    }

    /// I/O breakpoints; see `debug_after`.
    #[inline]
    pub(super) fn port_breakpoint(&mut self, _port: u16, _size: u64) {
        if self.dr[7] & dr7::ENABLES == 0 {}
    }
}

impl Cpu {
    /// TF, enabled debug registers or guest debugging ask for one instruction at a time.
    pub fn single_step_wanted(&self) -> bool {
        let tf = self.sys_flags as u64 & rflags::TF != 0;
        tf || self.breakpoints_armed() || self.guest_debug & guest_debug::SINGLE_STEP != 0
    }

    /// Instruction breakpoints, before an instruction: `Err(Fault)` with #DB or `Err(Exit)`.
    pub fn debug_before(&mut self) -> R {
        self.trace.tf = self.sys_flags as u64 & rflags::TF != 0;
        Ok(())
    }

    /// Data breakpoints and single step, after an instruction that ended with `stop`; RIP is the
    /// next one's.
    pub fn debug_after(&mut self, _stop: Stop) -> R {
        if self.trace.tf && self.shadow != shadow::MOV_SS {
            return Err(self.debug_exception(dr6::BS));
        }
        Ok(())
    }
}

/// What was noted at the start of a traced instruction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trace {
    /// TF was set; software interrupts and system calls clear it.
    pub(crate) tf: bool,
}

//! The MSR face of the local APIC: x2APIC registers 0x800 to 0x83f, IA32_APIC_BASE and
//! IA32_TSC_DEADLINE (Intel SDM volume 3, "Extended XAPIC (x2APIC)").
//!
//! Every refused access is #GP(0): registers that do not exist, wrong direction, reserved bits.

use super::registers::lvt_index;
use super::regs::*;
use super::state::{LapicState, Outcome};
use super::timer::Clock;
use super::Gp;

/// First MSR of the x2APIC's range, and the one after its last.
pub const X2APIC_MSRS: std::ops::Range<u32> = 0x800..0x840;
/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Bits that may be set in a 32-bit register's write; `None` for what cannot be written.
fn writable_bits(state: &LapicState, offset: u32) -> Option<u64> {
    let bits = match offset {
        TPR => 0xff,
        // Only 0 may be written to these two.
        EOI | ESR => 0,
        SVR => SVR_BITS,
        LVT_TIMER..=LVT_ERROR => state.lvt_bits(lvt_index(offset)),
        TIMER_INITIAL => !0,
        TIMER_DIVIDE => 0xb,
        SELF_IPI => 0xff,
        _ => return None,
    };
    Some(bits.into())
}

impl LapicState {
    /// RDMSR of an x2APIC register.
    pub(crate) fn msr_read(&self, msr: u32, clock: &Clock) -> Result<u64, Gp> {
        if !self.x2apic() || !X2APIC_MSRS.contains(&msr) {
            return Err(Gp);
        }
        match (msr - X2APIC_MSRS.start) << 4 {
            EOI => Err(Gp),
            ICR => Ok(u64::from(self.icr_high) << 32 | u64::from(self.icr_low)),
            offset => self.read_register(offset, clock).map(u64::from).ok_or(Gp),
        }
    }

    /// WRMSR of an x2APIC register.
    pub(crate) fn msr_write(&mut self, msr: u32, value: u64, clock: &Clock) -> Result<Outcome, Gp> {
        if !self.x2apic() || !X2APIC_MSRS.contains(&msr) {
            return Err(Gp);
        }
        let offset = (msr - X2APIC_MSRS.start) << 4;
        if offset == ICR {
            if value & X2APIC_ICR_RESERVED != 0 {
                return Err(Gp);
            }
            self.icr_high = (value >> 32) as u32;
            let ipi = self.write_icr_low(value as u32);
            return Ok(Outcome { ipi, eoi: None });
        }
        if value & !writable_bits(self, offset).ok_or(Gp)? != 0 {
            return Err(Gp);
        }
        self.write_register(offset, value as u32, clock).ok_or(Gp)
    }

    /// WRMSR of IA32_APIC_BASE by the guest: the transitions of figure "Local x2APIC State
    /// Transitions" and no others.
    pub(crate) fn write_base(&mut self, value: u64) -> Result<(), Gp> {
        let old_x2apic = self.x2apic();
        let old_enabled = self.hardware_enabled();
        let enabled = value & APIC_BASE_ENABLE != 0;
        let extended = value & APIC_BASE_EXTD != 0;
        self.check_base(value)?;
        if old_x2apic && enabled && !extended || !old_enabled && extended {
            return Err(Gp);
        }
        self.apply_base(value);
        Ok(())
    }

    /// What no writer may do, the VMM included: reserved bits, EXTD without enable.
    fn check_base(&self, value: u64) -> Result<(), Gp> {
        let physical = 1u64.checked_shl(self.cpuid.physical_bits.into()).map_or(!0, |bit| bit - 1);
        let extd = if self.cpuid.x2apic { APIC_BASE_EXTD } else { 0 };
        let allowed = physical & (APIC_BASE_ADDRESS | APIC_BASE_BSP | APIC_BASE_ENABLE | extd);
        let invalid = value & APIC_BASE_EXTD != 0 && value & APIC_BASE_ENABLE == 0;
        if value & !allowed != 0 || invalid {
            return Err(Gp);
        }
        Ok(())
    }

    /// Sets IA32_APIC_BASE for the VMM (KVM_SET_SREGS): any valid mode follows any other.
    pub(crate) fn restore_base(&mut self, value: u64) -> Result<(), Gp> {
        self.check_base(value)?;
        self.apply_base(value);
        Ok(())
    }

    fn apply_base(&mut self, value: u64) {
        let was_enabled = self.hardware_enabled();
        let was_x2apic = self.x2apic();
        self.base = value;
        if was_enabled && !self.hardware_enabled() {
            // The SDM lets a disabled APIC lose its state; TPR stays, because CR8 still works.
            let tpr = self.tpr;
            self.init();
            self.tpr = tpr;
            self.xapic_id = self.initial_id as u8;
        }
        if self.x2apic() && !was_x2apic {
            self.ldr = self.x2apic_ldr();
            // Entering x2APIC mode leaves nothing of the 8-bit destination behind.
            self.icr_high = 0;
        } else if was_x2apic && !self.x2apic() {
            self.ldr = 0;
        }
    }

    /// RDMSR of IA32_TSC_DEADLINE: 0 unless armed.
    pub(crate) fn tsc_deadline(&self) -> u64 {
        self.timer.tsc_deadline
    }

    /// WRMSR of IA32_TSC_DEADLINE; a deadline that has passed interrupts before the next
    /// instruction.
    pub(crate) fn write_tsc_deadline(&mut self, value: u64, clock: &Clock) {
        self.run_timer(clock);
        let mode = self.timer_mode();
        if self.timer.write_tsc_deadline(value, mode, clock) {
            self.raise_local(TIMER);
        }
    }
}

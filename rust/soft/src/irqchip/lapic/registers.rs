//! Reading and writing the local APIC's registers, as both faces share it: the xAPIC page and
//! the x2APIC MSRs differ in what they check before, not in what a register does.

use super::super::delivery::{DeliveryMode, Ipi};
use super::regs::*;
use super::state::{LapicState, Outcome};
use super::timer::{Clock, TimerMode};

impl LapicState {
    /// Value of the register at `offset`, or `None` where there is none.
    pub(crate) fn read_register(&self, offset: u32, clock: &Clock) -> Option<u32> {
        let value = match offset {
            ID if self.x2apic() => self.initial_id,
            ID => u32::from(self.xapic_id) << 24,
            VERSION => VERSION_VALUE,
            TPR => self.tpr.into(),
            APR if !self.x2apic() => 0,
            PPR => self.ppr().into(),
            // Write-only; the memory-mapped one reads as 0.
            EOI => 0,
            LDR => self.ldr,
            DFR if !self.x2apic() => self.dfr,
            SVR => self.svr,
            ISR..=IRR_LAST => self.read_vectors(offset),
            ESR => self.esr,
            ICR => self.icr_low,
            ICR2 if !self.x2apic() => self.icr_high,
            LVT_TIMER..=LVT_ERROR => self.lvt[lvt_index(offset)],
            TIMER_INITIAL => self.timer.initial,
            TIMER_CURRENT => self.timer.current(self.timer_mode(), clock),
            TIMER_DIVIDE => self.timer.divide(),
            _ => return None,
        };
        Some(value)
    }

    fn read_vectors(&self, offset: u32) -> u32 {
        let index = (offset >> 4) as usize & 7;
        match offset & !0x7f {
            ISR => self.isr.0[index],
            TMR => self.tmr.0[index],
            _ => self.irr.0[index],
        }
    }

    /// Writes the register at `offset`; `None` where there is none. Writes to read-only registers
    /// do nothing (the x2APIC face has refused them before).
    pub(crate) fn write_register(&mut self, offset: u32, value: u32, clock: &Clock) -> Option<Outcome> {
        let mut outcome = Outcome::default();
        match offset {
            ID => self.xapic_id = (value >> 24) as u8,
            TPR => self.tpr = value as u8,
            EOI => outcome.eoi = self.end_of_interrupt(),
            LDR => self.ldr = value & 0xff00_0000,
            DFR if !self.x2apic() => self.dfr = value | 0x0fff_ffff,
            SVR => self.write_svr(value),
            ESR => self.esr = std::mem::take(&mut self.esr_latch),
            ICR => outcome.ipi = self.write_icr_low(value),
            ICR2 if !self.x2apic() => self.icr_high = value & 0xff00_0000,
            LVT_TIMER..=LVT_ERROR => self.write_lvt(lvt_index(offset), value, clock),
            TIMER_INITIAL => {
                self.run_timer(clock);
                let mode = self.timer_mode();
                self.timer.write_initial(value, mode, clock);
            }
            TIMER_DIVIDE => {
                self.run_timer(clock);
                self.timer.write_divide(value, clock);
            }
            SELF_IPI if self.x2apic() => self.self_ipi(value as u8),
            VERSION | APR | PPR | TIMER_CURRENT | ISR..=IRR_LAST => (),
            _ => return None,
        }
        Some(outcome)
    }

    fn write_svr(&mut self, value: u32) {
        self.svr = value & SVR_BITS;
        if !self.software_enabled() {
            self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
        }
    }

    /// Bits that exist in an LVT entry, as CPUID has it.
    pub(crate) fn lvt_bits(&self, index: usize) -> u32 {
        let missing = if index == TIMER && !self.cpuid.tsc_deadline { LVT_TSC_DEADLINE } else { 0 };
        LVT_BITS[index] & !missing
    }

    fn write_lvt(&mut self, index: usize, value: u32, clock: &Clock) {
        let mut entry = value & self.lvt_bits(index) & !LVT_READ_ONLY;
        if !self.software_enabled() {
            entry |= LVT_MASKED;
        }
        if index == TIMER {
            // A count that ran out before this write ran out in the old mode.
            self.run_timer(clock);
            let old_mode = self.timer_mode();
            self.timer.change_mode(old_mode, TimerMode::from_lvt(entry));
        }
        self.lvt[index] = entry;
    }

    /// Writes the ICR's command half, which sends.
    pub(crate) fn write_icr_low(&mut self, value: u32) -> Option<Ipi> {
        self.icr_low = value & ICR_LOW_BITS;
        let destination = if self.x2apic() { self.icr_high } else { self.icr_high >> 24 };
        let ipi = Ipi::from_icr(self.icr_low, destination);
        let message = ipi.message;
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority if message.vector < FIRST_LEGAL_VECTOR => {
                self.report_error(ESR_SEND_ILLEGAL_VECTOR);
                None
            }
            DeliveryMode::Reserved | DeliveryMode::ExtInt | DeliveryMode::Smi => None,
            _ => Some(ipi),
        }
    }

    fn self_ipi(&mut self, vector: u8) {
        if vector < FIRST_LEGAL_VECTOR {
            self.report_error(ESR_SEND_ILLEGAL_VECTOR);
        } else {
            self.accept_vector(vector, false);
        }
    }
}

/// Index into the local vector table of the entry at `offset`.
pub(crate) fn lvt_index(offset: u32) -> usize {
    (((offset - LVT_TIMER) >> 4) as usize).min(LVT_COUNT - 1)
}

impl LapicState {
    /// A load from the register page. The SDM allows aligned 32-bit loads; shorter ones within a
    /// register are served too, as in KVM. Anything else reads as 0. Returns false if there is no
    /// such register, which is an error to report.
    #[must_use]
    pub(crate) fn mmio_read(&self, offset: u32, data: &mut [u8], clock: &Clock) -> bool {
        if !self.hardware_enabled() || self.x2apic() {
            data.fill(0xff);
            return true;
        }
        data.fill(0);
        let Some(value) = self.read_register(offset & !0xf, clock) else {
            return false;
        };
        let within = (offset & 0xf) as usize;
        if let Some(source) = value.to_le_bytes().get(within..within + data.len()) {
            data.copy_from_slice(source);
        }
        true
    }

    /// A store to the register page. Only aligned 32-bit stores do anything.
    pub(crate) fn mmio_write(&mut self, offset: u32, data: &[u8], clock: &Clock) -> Outcome {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return Outcome::default();
        };
        if !self.hardware_enabled() || self.x2apic() || offset & 0xf != 0 {
            return Outcome::default();
        }
        match self.write_register(offset, u32::from_le_bytes(bytes), clock) {
            Some(outcome) => outcome,
            None => {
                self.report_error(ESR_ILLEGAL_ADDRESS);
                Outcome::default()
            }
        }
    }
}

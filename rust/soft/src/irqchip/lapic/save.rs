//! `struct kvm_lapic_state`: the register page as KVM_GET_LAPIC and KVM_SET_LAPIC carry it.
//!
//! Every register lies at its offset, 32 bits wide. In x2APIC mode the ID register holds the
//! full identity if the VM chose KVM_X2APIC_API_USE_32BIT_IDS, else the identity shifted to the
//! xAPIC's place. What comes in is hostile: only bits that exist are taken.

use super::regs::*;
use super::state::{LapicState, Vectors};
use super::timer::{Clock, Saved, TimerMode};
use super::InvalidState;
use kvm_bindings::kvm_lapic_state;

/// Registers of the page that are copied out as they read.
const PLAIN: [u32; 14] = [
    ID,
    VERSION,
    TPR,
    PPR,
    LDR,
    SVR,
    ESR,
    ICR,
    LVT_TIMER,
    LVT_TIMER + 0x10,
    LVT_TIMER + 0x20,
    LVT_TIMER + 0x30,
    LVT_TIMER + 0x40,
    LVT_ERROR,
];

fn put(page: &mut kvm_lapic_state, offset: u32, value: u32) {
    let start = offset as usize;
    for (slot, byte) in page.regs[start..start + 4].iter_mut().zip(value.to_le_bytes()) {
        *slot = byte as _;
    }
}

fn take(page: &kvm_lapic_state, offset: u32) -> u32 {
    let start = offset as usize;
    let mut bytes = [0; 4];
    for (byte, slot) in bytes.iter_mut().zip(&page.regs[start..start + 4]) {
        *byte = *slot as u8;
    }
    u32::from_le_bytes(bytes)
}

fn take_vectors(page: &kvm_lapic_state, offset: u32) -> Vectors {
    let mut vectors = Vectors(std::array::from_fn(|index| take(page, offset + 0x10 * index as u32)));
    // The APIC never holds exception vectors, so no restored state may bring them in.
    vectors.0[0] &= 0xffff_0000;
    vectors
}

impl LapicState {
    /// The register page as KVM_GET_LAPIC returns it.
    pub(crate) fn save(&self, wide_ids: bool, clock: &Clock) -> kvm_lapic_state {
        let mut page = kvm_lapic_state { regs: [0; 1024] };
        for offset in PLAIN {
            put(&mut page, offset, self.read_register(offset, clock).unwrap_or(0));
        }
        for index in 0..8 {
            let step = 0x10 * index as u32;
            put(&mut page, ISR + step, self.isr.0[index]);
            put(&mut page, TMR + step, self.tmr.0[index]);
            put(&mut page, IRR + step, self.irr.0[index]);
        }
        put(&mut page, DFR, self.dfr);
        put(&mut page, ICR2, self.icr_high);
        put(&mut page, TIMER_INITIAL, self.timer.initial);
        put(&mut page, TIMER_CURRENT, self.timer.current(self.timer_mode(), clock));
        put(&mut page, TIMER_DIVIDE, self.timer.divide());
        if self.x2apic() && !wide_ids {
            put(&mut page, ID, self.initial_id << 24);
        }
        page
    }

    /// Takes a register page as KVM_SET_LAPIC gives it. IA32_APIC_BASE must have been set before:
    /// it decides how the page is read.
    pub(crate) fn restore(
        &mut self,
        page: &kvm_lapic_state,
        wide_ids: bool,
        clock: &Clock,
    ) -> Result<(), InvalidState> {
        let id = take(page, ID);
        if self.x2apic() {
            let expected = if wide_ids { self.initial_id } else { self.initial_id << 24 };
            if id != expected {
                return Err(InvalidState::ApicId { id, expected });
            }
            self.ldr = self.x2apic_ldr();
            self.icr_high = take(page, ICR2);
        } else {
            self.xapic_id = (id >> 24) as u8;
            self.ldr = take(page, LDR) & 0xff00_0000;
            self.icr_high = take(page, ICR2) & 0xff00_0000;
        }
        self.tpr = take(page, TPR) as u8;
        self.dfr = take(page, DFR) | 0x0fff_ffff;
        self.svr = take(page, SVR) & SVR_BITS;
        self.isr = take_vectors(page, ISR);
        self.tmr = take_vectors(page, TMR);
        self.irr = take_vectors(page, IRR);
        self.esr = take(page, ESR) & 0xff;
        self.esr_latch = 0;
        self.icr_low = take(page, ICR) & ICR_LOW_BITS;
        self.restore_lvt(page);
        let saved = Saved {
            initial: take(page, TIMER_INITIAL),
            current: take(page, TIMER_CURRENT),
            divide: take(page, TIMER_DIVIDE),
        };
        let mode = TimerMode::from_lvt(self.lvt[TIMER]);
        self.timer.restore(saved, mode, clock);
        Ok(())
    }

    fn restore_lvt(&mut self, page: &kvm_lapic_state) {
        let forced = if self.software_enabled() { 0 } else { LVT_MASKED };
        let bits: [u32; LVT_COUNT] = std::array::from_fn(|index| self.lvt_bits(index));
        // A software-disabled APIC has every entry masked, except that LINT0 may carry the PIC
        // as it does after reset.
        for (index, entry) in self.lvt.iter_mut().enumerate() {
            let value = take(page, LVT_TIMER + 0x10 * index as u32) & bits[index] & !LVT_READ_ONLY;
            *entry = if index == LINT0 { value } else { value | forced };
        }
    }
}

//! A vCPU's local APIC: xAPIC page, x2APIC MSRs, timer, pending events.
//!
//! [`Lapic`] is the vCPU's handle: a cell (`cell`), which holds the state machine (`state`,
//! `registers`, `x2apic`, `timer`, `save`), plus the rest of the interrupt hardware, to which it
//! sends IPIs and ends of interrupt with no lock held.

mod cell;
mod registers;
mod regs;
mod save;
mod state;
mod timer;
mod x2apic;

pub use state::PendingEvents;
pub use x2apic::{MSR_APIC_BASE, MSR_TSC_DEADLINE, X2APIC_MSRS};

pub(crate) use cell::LapicCell;
pub(crate) use state::{EndOfInterrupt, Outcome};

use super::delivery;
use super::shared::Shared;
use super::{lock, read};
use cell::{ANY_PENDING, PENDING_INIT, PENDING_NMI, PENDING_SIPI, PENDING_VECTOR};
use kvm_bindings::kvm_lapic_state;
use regs::{APIC_BASE_ADDRESS, APIC_BASE_BSP, ESR_ILLEGAL_ADDRESS, LINT1};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::Arc;

/// The access is refused: inject #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the local APIC refuses the access with #GP(0)")]
pub struct Gp;

/// A register page this local APIC cannot take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidState {
    /// In x2APIC mode the identity is fixed.
    #[error("local APIC state has APIC ID {id:#x}, expected {expected:#x}")]
    ApicId {
        /// The identity in the page.
        id: u32,
        /// What it must be.
        expected: u32,
    },
}

/// A vCPU's handle on its local APIC. Meant for the vCPU's thread, safe from any.
pub struct Lapic {
    cell: Arc<LapicCell>,
    shared: Arc<Shared>,
}

impl Lapic {
    pub(crate) fn new(cell: Arc<LapicCell>, shared: Arc<Shared>) -> Self {
        Self { cell, shared }
    }

    fn flag(&self, bits: u32) -> bool {
        self.cell.summary.load(SeqCst) & bits != 0
    }

    /// Carries out what a register write asked of the other chips.
    fn complete(&self, outcome: Outcome) {
        if let Some(ipi) = outcome.ipi {
            delivery::send_ipi(&read(&self.shared.lapics), self.cell.vcpu, &ipi);
        }
        if let Some(eoi) = outcome.eoi {
            self.shared.end_of_interrupt(eoi);
        }
    }

    /// The vCPU's id, also its APIC ID at power-up.
    pub fn vcpu(&self) -> u32 {
        self.cell.vcpu
    }

    /// Whether this is the boot processor, which starts running at reset and at INIT.
    pub fn is_bsp(&self) -> bool {
        self.apic_base() & APIC_BASE_BSP != 0
    }

    // --- pending events ---------------------------------------------------------------------

    /// Whether anything waits: a vectored interrupt, ExtINT, NMI, INIT or SIPI.
    #[inline]
    pub fn attention(&self) -> bool {
        let summary = self.cell.summary.load(SeqCst);
        summary & ANY_PENDING != 0 || self.cell.pic_wants(summary)
    }

    /// Whether [`Lapic::ack_interrupt`] would return a vector.
    #[inline]
    pub fn has_interrupt(&self) -> bool {
        let summary = self.cell.summary.load(SeqCst);
        summary & PENDING_VECTOR != 0 || self.cell.pic_wants(summary)
    }

    /// Acknowledges the interrupt to deliver now: the PIC's first where LINT0 admits it, else the
    /// local APIC's highest above the processor priority.
    pub fn ack_interrupt(&self) -> Option<u8> {
        if self.cell.pic_wants(self.cell.summary.load(SeqCst)) {
            if let Some(vector) = self.shared.acknowledge_pic() {
                return Some(vector);
            }
        }
        if !self.flag(PENDING_VECTOR) {
            return None;
        }
        self.cell.update(|state, _| state.acknowledge())
    }

    /// Whether an NMI waits that no NMI in progress holds back.
    #[inline]
    pub fn nmi_pending(&self) -> bool {
        self.flag(PENDING_NMI)
    }

    /// Whether an INIT waits.
    #[inline]
    pub fn init_pending(&self) -> bool {
        self.flag(PENDING_INIT)
    }

    /// Whether a start-up IPI waits.
    #[inline]
    pub fn sipi_pending(&self) -> bool {
        self.flag(PENDING_SIPI)
    }

    /// Takes one NMI for delivery. NMIs count as blocked from here to [`Lapic::nmi_done`]: until
    /// then at most one more is remembered.
    pub fn take_nmi(&self) -> bool {
        self.flag(PENDING_NMI)
            && self.cell.update(|state, _| {
                let taken = state.events.nmis > 0 && !state.events.nmi_blocked;
                if taken {
                    state.events.nmis -= 1;
                    state.events.nmi_blocked = true;
                }
                taken
            })
    }

    /// IRET ended the NMI handler.
    pub fn nmi_done(&self) {
        self.cell.update(|state, _| state.events.nmi_blocked = false);
    }

    /// Raises an NMI (KVM_NMI, or a device wired to the processor's pin).
    pub fn raise_nmi(&self) {
        self.cell.update(|state, _| state.accept_nmi());
    }

    /// Pulses LINT1, the PC's NMI line as the local vector table routes it.
    pub fn raise_lint1(&self) -> bool {
        self.cell.update(|state, _| state.raise_local(LINT1))
    }

    /// Takes a pending INIT; the caller resets the vCPU and calls [`Lapic::init_reset`].
    pub fn take_init(&self) -> bool {
        self.flag(PENDING_INIT) && self.cell.update(|state, _| std::mem::take(&mut state.events.init))
    }

    /// Takes a pending start-up vector, to be dropped unless the vCPU waits for one.
    pub fn take_sipi(&self) -> Option<u8> {
        if !self.flag(PENDING_SIPI) {
            return None;
        }
        self.cell.update(|state, _| state.events.sipi.take())
    }

    /// The pending events, for KVM_GET_VCPU_EVENTS and KVM_GET_MP_STATE.
    pub fn events(&self) -> PendingEvents {
        lock(&self.cell.guarded).state.events
    }

    /// Restores the pending events; counts beyond the hardware's are cut.
    pub fn set_events(&self, events: PendingEvents) {
        let limit = if events.nmi_blocked { 1 } else { 2 };
        let nmis = events.nmis.min(limit);
        self.cell.update(|state, _| state.events = PendingEvents { nmis, ..events });
    }

    /// INIT's effect on the registers.
    pub fn init_reset(&self) {
        self.cell.update(|state, _| state.init());
    }

    /// Power-up state, IA32_APIC_BASE included.
    pub fn reset(&self) {
        self.cell.update(|state, _| state.power_up());
    }

    // --- registers --------------------------------------------------------------------------

    /// Guest-physical address of the register page. Accesses to it belong here in every mode:
    /// without an enabled xAPIC they read as ones and write nothing.
    #[inline]
    pub fn mmio_base(&self) -> u64 {
        self.cell.base.load(SeqCst) & APIC_BASE_ADDRESS
    }

    /// A load of `data.len()` bytes at `offset` into the register page.
    pub fn mmio_read(&self, offset: u32, data: &mut [u8]) {
        let exists = lock(&self.cell.guarded).state.mmio_read(offset, data, &self.cell.clock());
        if !exists {
            self.cell.update(|state, _| state.report_error(ESR_ILLEGAL_ADDRESS));
        }
    }

    /// A store to the register page.
    pub fn mmio_write(&self, offset: u32, data: &[u8]) {
        let outcome = self.cell.update(|state, clock| state.mmio_write(offset, data, clock));
        self.complete(outcome);
    }

    /// RDMSR of 0x800 to 0x83f.
    pub fn msr_read(&self, msr: u32) -> Result<u64, Gp> {
        lock(&self.cell.guarded).state.msr_read(msr, &self.cell.clock())
    }

    /// WRMSR of 0x800 to 0x83f.
    pub fn msr_write(&self, msr: u32, value: u64) -> Result<(), Gp> {
        let outcome = self.cell.update(|state, clock| state.msr_write(msr, value, clock))?;
        self.complete(outcome);
        Ok(())
    }

    /// RDMSR of IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.cell.base.load(SeqCst)
    }

    /// WRMSR of IA32_APIC_BASE by the guest.
    pub fn set_apic_base(&self, value: u64) -> Result<(), Gp> {
        self.cell.update(|state, _| state.write_base(value))
    }

    /// IA32_APIC_BASE set by the VMM: any valid mode may follow any other.
    pub fn restore_apic_base(&self, value: u64) -> Result<(), Gp> {
        self.cell.update(|state, _| state.restore_base(value))
    }

    /// Sets CPUID's MAXPHYADDR (46 until then), above which IA32_APIC_BASE is reserved.
    pub fn set_physical_bits(&self, bits: u8) {
        self.cell.update(|state, _| state.cpuid.physical_bits = bits);
    }

    /// Sets what CPUID promises: x2APIC mode and the timer's TSC-deadline mode (both until then).
    pub fn set_features(&self, x2apic: bool, tsc_deadline: bool) {
        self.cell.update(|state, _| {
            state.cpuid.x2apic = x2apic;
            state.cpuid.tsc_deadline = tsc_deadline;
        });
    }

    /// RDMSR of IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&self) -> u64 {
        lock(&self.cell.guarded).state.tsc_deadline()
    }

    /// WRMSR of IA32_TSC_DEADLINE.
    pub fn set_tsc_deadline(&self, value: u64) {
        self.cell.update(|state, clock| state.write_tsc_deadline(value, clock));
    }

    /// The guest's TSC jumped (IA32_TSC or IA32_TSC_ADJUST written): wait anew for the deadline.
    pub fn tsc_changed(&self) {
        self.cell.update(|state, clock| {
            let deadline = state.tsc_deadline();
            if deadline != 0 {
                state.write_tsc_deadline(deadline, clock);
            }
        });
    }

    /// CR8: the task priority's class.
    pub fn cr8(&self) -> u64 {
        u64::from(lock(&self.cell.guarded).state.tpr >> 4)
    }

    /// Writes CR8; the caller has checked that only the low four bits are set.
    pub fn set_cr8(&self, value: u64) {
        self.cell.update(|state, _| state.tpr = ((value & 0xf) << 4) as u8);
    }

    // --- state ------------------------------------------------------------------------------

    /// KVM_GET_LAPIC.
    pub fn state(&self) -> kvm_lapic_state {
        let wide_ids = self.shared.wide_ids();
        lock(&self.cell.guarded).state.save(wide_ids, &self.cell.clock())
    }

    /// KVM_SET_LAPIC. IA32_APIC_BASE must be set before.
    pub fn set_state(&self, page: &kvm_lapic_state) -> Result<(), InvalidState> {
        let wide_ids = self.shared.wide_ids();
        self.cell.update(|state, clock| state.restore(page, wide_ids, clock))
    }
}

#[cfg(test)]
mod tests;

//! A vCPU's local APIC: xAPIC page, x2APIC MSRs, timer, pending events.
//!
//! [`LapicCell`] guards the state machine of `state` with a mutex and keeps two atomics in front
//! of it: a summary of what is pending, polled by the vCPU after every block, and the address
//! other threads match messages against. Both are refreshed before the mutex is released.
//! [`Lapic`] is the vCPU's handle: a cell plus the rest of the interrupt hardware, to which it
//! sends IPIs and ends of interrupt with no lock held.

mod registers;
mod regs;
mod save;
mod state;
mod timer;
mod x2apic;

pub use state::PendingEvents;
pub use x2apic::{MSR_APIC_BASE, MSR_TSC_DEADLINE, X2APIC_MSRS};

pub(crate) use state::{EndOfInterrupt, Outcome};

use super::chip::Shared;
use super::delivery::{self, Address, Message};
use super::timers::{Slot, Timers};
use super::{lock, read, Host};
use kvm_bindings::kvm_lapic_state;
use regs::{APIC_BASE_ADDRESS, APIC_BASE_BSP, LINT0, LINT1};
use state::LapicState;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use timer::Clock;

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

const PENDING_VECTOR: u32 = 1 << 0;
const PENDING_NMI: u32 = 1 << 1;
const PENDING_INIT: u32 = 1 << 2;
const PENDING_SIPI: u32 = 1 << 3;
const ANY_PENDING: u32 = PENDING_VECTOR | PENDING_NMI | PENDING_INIT | PENDING_SIPI;
/// LINT0 lets the PIC's INTR through.
const ADMITS_EXTINT: u32 = 1 << 4;
/// LINT0 turns what arrives there into NMIs.
const LINT0_IS_NMI: u32 = 1 << 5;

/// What is behind the mutex.
struct Guarded {
    state: LapicState,
    /// The deadline the timer thread was last told.
    armed_ns: Option<u64>,
}

/// One local APIC, shared between its vCPU and everybody who interrupts it.
pub(crate) struct LapicCell {
    vcpu: u32,
    slot: Slot,
    host: Arc<dyn Host>,
    timers: Arc<Timers>,
    pic_output: Arc<AtomicBool>,
    summary: AtomicU32,
    /// [`Address`] packed into one word, so that a reader never sees half of a change.
    address: AtomicU64,
    base: AtomicU64,
    guarded: Mutex<Guarded>,
}

impl LapicCell {
    pub(crate) fn new(
        vcpu: u32,
        slot: Slot,
        host: Arc<dyn Host>,
        timers: Arc<Timers>,
        pic_output: Arc<AtomicBool>,
    ) -> Self {
        let state = LapicState::new(vcpu);
        let cell = Self {
            vcpu,
            slot,
            host,
            timers,
            pic_output,
            summary: AtomicU32::new(0),
            address: AtomicU64::new(0),
            base: AtomicU64::new(0),
            guarded: Mutex::new(Guarded { state, armed_ns: None }),
        };
        cell.update(|_, _| ());
        cell
    }

    pub(crate) fn vcpu(&self) -> u32 {
        self.vcpu
    }

    fn clock(&self) -> Clock<'_> {
        Clock { host: &*self.host, vcpu: self.vcpu }
    }

    /// What messages are matched against.
    pub(crate) fn address(&self) -> Address {
        let word = self.address.load(SeqCst);
        Address {
            initial_id: self.vcpu,
            xapic_id: (word >> 8) as u8,
            ldr: (word >> 32) as u32,
            dfr: (word as u32 >> 16) << 28,
            hardware_enabled: word & 1 != 0,
            x2apic: word & 2 != 0,
            software_enabled: word & 4 != 0,
        }
    }

    fn pack_address(address: &Address) -> u64 {
        u64::from(address.ldr) << 32
            | u64::from(address.dfr >> 28) << 16
            | u64::from(address.xapic_id) << 8
            | u64::from(address.software_enabled) << 2
            | u64::from(address.x2apic) << 1
            | u64::from(address.hardware_enabled)
    }

    /// Runs `change` under the lock, then refreshes the atomics and the timer, then kicks the
    /// vCPU if something became pending.
    fn update<R>(&self, change: impl FnOnce(&mut LapicState, &Clock) -> R) -> R {
        let mut guarded = lock(&self.guarded);
        let result = change(&mut guarded.state, &self.clock());
        let rose = self.publish(&mut guarded);
        drop(guarded);
        if rose {
            self.host.kick(self.vcpu as usize);
        }
        result
    }

    /// Refreshes everything that is readable without the lock. Returns whether something is
    /// pending now that was not before.
    fn publish(&self, guarded: &mut Guarded) -> bool {
        let state = &guarded.state;
        self.base.store(state.base, SeqCst);
        self.address.store(Self::pack_address(&state.address()), SeqCst);
        let expiry_ns = state.timer.expiry_ns();
        let summary = summarise(state);
        if expiry_ns != guarded.armed_ns {
            guarded.armed_ns = expiry_ns;
            self.timers.arm(self.slot, expiry_ns);
        }
        let rose = summary & !self.summary.swap(summary, SeqCst);
        rose & ANY_PENDING != 0 || (rose & ADMITS_EXTINT != 0 && self.pic_output.load(SeqCst))
    }

    /// Takes a message addressed to this APIC. Returns whether it was accepted.
    pub(crate) fn accept(&self, message: &Message) -> bool {
        self.update(|state, _| state.accept(message))
    }

    /// The timer thread: this APIC's deadline has come.
    pub(crate) fn timer_due(&self) {
        let mut guarded = lock(&self.guarded);
        // The queue has forgotten the deadline it reported, so whatever is next is news to it.
        guarded.armed_ns = None;
        guarded.state.run_timer(&self.clock());
        let rose = self.publish(&mut guarded);
        drop(guarded);
        if rose {
            self.host.kick(self.vcpu as usize);
        }
    }

    /// A tick of the PIT, for a guest that uses LINT0 as its NMI watchdog.
    pub(crate) fn pit_tick(&self) {
        if self.summary.load(SeqCst) & LINT0_IS_NMI != 0 {
            self.update(|state, _| state.raise_local(LINT0));
        }
    }

    fn pic_wants(&self, summary: u32) -> bool {
        summary & ADMITS_EXTINT != 0 && self.pic_output.load(SeqCst)
    }

    /// The PIC's output went up.
    pub(crate) fn pic_raised(&self) {
        if self.summary.load(SeqCst) & ADMITS_EXTINT != 0 {
            self.host.kick(self.vcpu as usize);
        }
    }
}

fn summarise(state: &LapicState) -> u32 {
    let flag = |condition: bool, bit: u32| if condition { bit } else { 0 };
    flag(state.deliverable().is_some(), PENDING_VECTOR)
        | flag(state.events.nmis > 0 && !state.events.nmi_blocked, PENDING_NMI)
        | flag(state.events.init, PENDING_INIT)
        | flag(state.events.sipi.is_some(), PENDING_SIPI)
        | flag(state.admits_extint(), ADMITS_EXTINT)
        | flag(state.lint0_is_nmi(), LINT0_IS_NMI)
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
        self.cell.update(|state, clock| state.mmio_read(offset, data, clock));
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
        self.cell.update(|state, _| state.physical_bits = bits);
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

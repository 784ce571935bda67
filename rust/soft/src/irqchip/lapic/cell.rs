//! [`LapicCell`]: one local APIC, shared between its vCPU and everybody who interrupts it.
//!
//! A mutex guards the state machine of `state`; in front of it are atomics: a summary of what is
//! pending, polled by the vCPU after every block, and the address other threads match messages
//! against. They are refreshed before the mutex is released. This lock is a leaf but for the timer
//! queue's: what a register write asks of other chips is returned, not done here.

use super::super::delivery::{Address, Message};
use super::super::timers::{Slot, Timers};
use super::super::{lock, Host};
use super::regs::LINT0;
use super::state::LapicState;
use super::timer::Clock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

pub(super) const PENDING_VECTOR: u32 = 1 << 0;
pub(super) const PENDING_NMI: u32 = 1 << 1;
pub(super) const PENDING_INIT: u32 = 1 << 2;
pub(super) const PENDING_SIPI: u32 = 1 << 3;
pub(super) const ANY_PENDING: u32 = PENDING_VECTOR | PENDING_NMI | PENDING_INIT | PENDING_SIPI;
/// LINT0 lets the PIC's INTR through.
pub(super) const ADMITS_EXTINT: u32 = 1 << 4;
/// LINT0 turns what arrives there into NMIs.
pub(super) const LINT0_IS_NMI: u32 = 1 << 5;

/// What is behind the mutex.
pub(super) struct Guarded {
    pub(super) state: LapicState,
    /// The deadline the timer thread was last told.
    armed_ns: Option<u64>,
}

/// One local APIC, shared between its vCPU and everybody who interrupts it.
pub(crate) struct LapicCell {
    pub(super) vcpu: u32,
    slot: Slot,
    host: Arc<dyn Host>,
    timers: Arc<Timers>,
    pic_output: Arc<AtomicBool>,
    pub(super) summary: AtomicU32,
    /// [`Address`] packed into one word, so that a reader never sees half of a change.
    address: AtomicU64,
    pub(super) base: AtomicU64,
    pub(super) guarded: Mutex<Guarded>,
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

    pub(super) fn clock(&self) -> Clock<'_> {
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
    pub(super) fn update<R>(&self, change: impl FnOnce(&mut LapicState, &Clock) -> R) -> R {
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

    pub(super) fn pic_wants(&self, summary: u32) -> bool {
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

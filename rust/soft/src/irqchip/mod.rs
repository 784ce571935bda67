//! The interrupt hardware that KVM keeps inside the kernel: local APICs, IOAPIC, the two 8259s,
//! the 8254, GSI routing with MSI, and irqfd.
//!
//! # Shape
//! Every chip is a plain state machine in its own file, with time and delivery injected:
//! [`lapic`], `ioapic`, `pic`, `pit`, `routing`; `shared` wires one of each
//! together for a VM. [`IrqChip`] (`chip`) is the VMM's face of that; [`Lapic`] is a vCPU's handle on its local APIC. Two threads live here: `timers` sleeps
//! until the next deadline of the PIT or a local APIC, `irqfd` waits for eventfds. Both end when
//! the `IrqChip` is dropped.
//!
//! # For the vCPU's thread
//! * [`Lapic::attention`] is one or two atomic loads: anything at all pending. Ask it at every
//!   point where interrupts may be taken; [`Host::kick`] is called whenever it may have become
//!   true, also from the vCPU's own thread (an EOI can uncover the next interrupt), so polling a
//!   flag that `kick` sets is enough as long as a pending interrupt that was not taken (IF = 0,
//!   interrupt shadow) is asked for again when the obstacle goes.
//! * [`Lapic::take_init`], then [`Lapic::init_reset`]; [`Lapic::take_sipi`] is honoured only in
//!   wait-for-SIPI and otherwise dropped, as a processor does.
//! * [`Lapic::take_nmi`] also blocks further NMIs; call [`Lapic::nmi_done`] at IRET.
//! * [`Lapic::has_interrupt`] and [`Lapic::ack_interrupt`] for vectored ones, ExtINT included.
//!
//! # Lock order
//! routing, irqfd registry → PIC | IOAPIC → list of local APICs → one local APIC → timer queue.
//! PIC, IOAPIC and PIT are never held together, and no two local APICs are. A local APIC's
//! register write returns what it wants of others (an IPI, an EOI broadcast) and that is done after
//! its lock is released, so an IPI to self and an EOI that makes the IOAPIC inject again both
//! enter with nothing held. End-of-interrupt notifications (PIT re-injection, resampling irqfds) run
//! with nothing held but the irqfd registry.
//! [`Host`]'s methods are called with these locks held: they must not call back.
//!
//! # Left out on purpose
//! SMIs, directed EOI, CMCI, the RTC coalescing tracker, Hyper-V and Xen routes.

mod chip;
mod delivery;
mod error;
mod ioapic;
mod irqfd;
pub mod lapic;
mod pic;
mod pit;
mod routing;
mod shared;
mod timers;

pub use chip::IrqChip;
pub use error::IrqError;
pub use lapic::Lapic;

use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// What the interrupt hardware needs of the rest of the engine. All methods are called from any
/// thread, with internal locks held: they must return at once and not call back.
pub trait Host: Send + Sync {
    /// Monotonic host time in nanoseconds. The timer thread sleeps in its terms.
    fn now_ns(&self) -> u64;
    /// The time-stamp counter the guest reads on the vCPU with this id.
    fn guest_tsc(&self, vcpu: usize) -> u64;
    /// Frequency of [`Host::guest_tsc`].
    fn tsc_khz(&self) -> u64;
    /// The vCPU with this id must look at its [`Lapic`]: set its attention flag, wake it from HLT.
    fn kick(&self, vcpu: usize);
}

/// Locks, and carries on after another thread's panic: every state here is valid after any
/// statement, and a guest must not lose its interrupts because of one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

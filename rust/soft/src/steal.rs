//! Steal time: for how long a vCPU wanted to run and its thread had no processor of the host's
//! (Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME).
//!
//! The guest names 64 bytes of its memory: a counter in nanoseconds, and a version that is odd while it
//! changes. KVM adds when a vCPU is scheduled in. Nobody tells a thread of that, so the engine asks
//! the kernel's account of it when the guest takes an interrupt, which is when guests look, but not
//! more often than every few milliseconds. As in KVM the counter itself lives in guest memory: it goes on
//! where it was after the guest was saved, and others may add to it while the vCPU is out of the guest.

use crate::mem::SlotMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering::*};
use std::sync::{Mutex, PoisonError};
use std::thread::ThreadId;

/// Bit 0 switches it on; these are reserved.
const ON: u64 = 1;
const RESERVED: u64 = 0x3e;
/// `struct kvm_steal_time`.
const VERSION_AT: u64 = 8;
/// How often the kernel is asked, in ticks of the host's counter: some milliseconds.
const TICKS_BETWEEN: u64 = 1 << 24;

/// The kernel's account of one thread, and what it said last.
struct Account {
    thread: ThreadId,
    file: Option<File>,
    delay_ns: Option<u64>,
}

/// One vCPU's.
pub(crate) struct Steal {
    msr: AtomicU64,
    next: AtomicU64,
    /// Guest memory is not to change by itself: two engines run the same guest and are compared.
    pub frozen: AtomicBool,
    account: Mutex<Option<Account>>,
}

impl Steal {
    /// Switched off.
    pub fn new() -> Self {
        Self {
            msr: AtomicU64::new(0),
            next: AtomicU64::new(0),
            frozen: AtomicBool::new(false),
            account: Mutex::new(None),
        }
    }

    /// The MSR as it was written.
    pub fn msr(&self) -> u64 {
        self.msr.load(Relaxed)
    }

    /// WRMSR; `false` for reserved bits.
    pub fn set_msr(&self, value: u64) -> bool {
        if value & RESERVED != 0 {
            return false;
        }
        self.msr.store(value, Relaxed);
        self.next.store(0, Relaxed);
        true
    }

    /// For the vCPU's thread, at `now` of the host's counter: brings the guest's counter up to date, if it is time.
    pub fn look(&self, now: u64, slots: impl FnOnce() -> std::sync::Arc<SlotMap>) {
        let msr = self.msr();
        if msr & ON == 0 || now < self.next.load(Relaxed) || self.frozen.load(Relaxed) {
            return;
        }
        self.next.store(now + TICKS_BETWEEN, Relaxed);
        let waited = self.waited_ns();
        if waited > 0 {
            add(&slots(), msr & !(ON | RESERVED), waited);
        }
    }

    /// For how long this thread has waited since it was asked last.
    fn waited_ns(&self) -> u64 {
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        let thread = std::thread::current().id();
        if account.as_ref().is_none_or(|known| known.thread != thread) {
            *account = Some(Account { thread, file: File::open("/proc/thread-self/schedstat").ok(), delay_ns: None });
        }
        let Some(known) = account.as_mut() else { return 0 };
        let Some(delay) = known.file.as_ref().and_then(run_delay) else { return 0 };
        let before = known.delay_ns.replace(delay).unwrap_or(delay);
        delay.saturating_sub(before)
    }
}

/// The second number of /proc/PID/schedstat: nanoseconds runnable without running.
fn run_delay(file: &File) -> Option<u64> {
    let mut text = [0; 96];
    let length = file.read_at(&mut text, 0).ok()?;
    std::str::from_utf8(&text[..length]).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Adds to the counter at `gpa`; where that is no RAM, to nothing, as with KVM.
fn add(slots: &SlotMap, gpa: u64, ns: u64) {
    let (mut steal, mut version) = ([0; 8], [0; 4]);
    if !slots.read(gpa, &mut steal) || !slots.read(gpa + VERSION_AT, &mut version) {
        return;
    }
    let odd = u32::from_le_bytes(version) | 1;
    slots.write(gpa + VERSION_AT, &odd.to_le_bytes());
    fence(SeqCst);
    slots.write(gpa, &u64::from_le_bytes(steal).wrapping_add(ns).to_le_bytes());
    fence(SeqCst);
    slots.write(gpa + VERSION_AT, &odd.wrapping_add(1).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{zeroed_words, Slot};
    use std::sync::Arc;

    fn memory(page: &mut [u64]) -> Arc<SlotMap> {
        let host = page.as_mut_ptr() as *mut u8;
        let (dirty, code) = (Some(zeroed_words(1)), zeroed_words(1));
        Arc::new(SlotMap::new(vec![Arc::new(Slot {
            id: 0,
            gpa: 0x1000,
            size: 0x1000,
            host,
            read_only: false,
            dirty,
            code,
        })]))
    }

    #[test]
    fn test_add_goes_on_from_what_is_there_and_leaves_an_even_version() {
        let mut page = vec![0u64; 512];
        (page[8], page[9]) = (700, 6);
        let slots = memory(&mut page);
        add(&slots, 0x1040, 33);
        let mut bytes = [0; 12];
        assert!(slots.read(0x1040, &mut bytes));
        assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()), 733);
        assert_eq!(u32::from_le_bytes(bytes[8..].try_into().unwrap()), 8);
        add(&slots, 0x9000, 33);
    }

    #[test]
    fn test_reserved_bits_are_refused_and_change_nothing() {
        let steal = Steal::new();
        assert!(steal.set_msr(0x1041));
        assert!(!steal.set_msr(0x1043));
        assert_eq!(steal.msr(), 0x1041);
    }

    #[test]
    fn test_switched_off_or_asked_too_soon_nobody_looks() {
        let steal = Steal::new();
        steal.look(u64::MAX / 2, || unreachable!());
        steal.set_msr(0x1041);
        steal.next.store(100, Relaxed);
        steal.look(99, || unreachable!());
        steal.next.store(0, Relaxed);
        steal.frozen.store(true, Relaxed);
        steal.look(99, || unreachable!());
        assert_eq!(steal.next.load(Relaxed), 0);
    }

    #[test]
    fn test_waiting_counts_up_from_the_first_look_of_each_thread() {
        let steal = Steal::new();
        assert_eq!(steal.waited_ns(), 0);
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(steal.waited_ns(), 0));
        });
    }
}

//! Time: the host's and the guests' time-stamp counters, and kvmclock.
//!
//! Everything a guest reads as time comes from the host's TSC, so that all its clocks agree and
//! all its vCPUs see one line. A vCPU's TSC is the host's, scaled and offset. kvmclock
//! (Documentation/virt/kvm/x86/msr.rst, struct pvclock_vcpu_time_info) is a second line over the
//! same counter, fixed at one *master point* per VM: each vCPU publishes that point in terms of its
//! own TSC, hence all of them compute the same nanoseconds and the stable flag may be set.
//!
//! Left out on purpose: hosts whose TSCs differ between CPUs (the host's kernel would not use them
//! either), catching up with the host's NTP corrections.

use crate::mem::SlotMap;
use std::arch::x86_64::{__cpuid, _rdtsc};
use std::sync::atomic::{fence, AtomicU32, AtomicU64, Ordering::*};
use std::sync::{Mutex, MutexGuard, PoisonError};

const NS_PER_S: u64 = 1_000_000_000;
/// Fraction bits of a TSC ratio.
const RATIO_BITS: u32 = 32;
/// pvclock flag: all vCPUs' clocks are one.
const PVCLOCK_TSC_STABLE: u8 = 1;
/// pvclock flag: user space stopped the guest for a while.
const PVCLOCK_GUEST_STOPPED: u8 = 2;

/// Locks and carries on after another thread's panic; the states here are valid at any point.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The host's time-stamp counter.
#[inline]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC is in every x86-64 CPU and Linux leaves CR4.TSD clear for user space.
    unsafe { _rdtsc() }
}

fn clock_ns(id: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid pointer; the clocks asked for exist on every Linux.
    unsafe { libc::clock_gettime(id, &mut time) };
    time.tv_sec as u64 * NS_PER_S + time.tv_nsec as u64
}

/// CLOCK_MONOTONIC in nanoseconds: what timers sleep by.
pub fn monotonic_ns() -> u64 {
    clock_ns(libc::CLOCK_MONOTONIC)
}

/// CLOCK_REALTIME in nanoseconds.
pub fn realtime_ns() -> u64 {
    clock_ns(libc::CLOCK_REALTIME)
}

/// Frequency of the host's TSC in kHz: as CPUID says it exactly (leaf 0x15), as a hypervisor says
/// it (leaf 0x4000_0010), or measured. Leaf 0x16 is a nominal figure, wrong by up to a percent, and
/// a guest's clock would drift by that: it is not used.
pub fn host_tsc_khz() -> u32 {
    let highest = __cpuid(0).eax;
    if highest >= 0x15 {
        let leaf = __cpuid(0x15);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return (leaf.ecx as u64 * leaf.ebx as u64 / leaf.eax as u64 / 1000) as u32;
        }
    }
    if __cpuid(1).ecx >> 31 != 0 && __cpuid(0x4000_0000).eax >= 0x4000_0010 {
        let khz = __cpuid(0x4000_0010).eax;
        if khz != 0 {
            return khz;
        }
    }
    measure_khz()
}

/// A TSC reading and the time of that clock that belongs to it, taken as tightly as the scheduler allows.
fn pair(clock: libc::clockid_t) -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..8 {
        let before = host_tsc();
        let ns = clock_ns(clock);
        let after = host_tsc();
        if after - before < best.0 {
            best = (after - before, before + (after - before) / 2, ns);
        }
    }
    (best.1, best.2)
}

/// The host's wall-clock time and a vCPU's counter at the same instant (struct kvm_clock_pairing).
pub(crate) struct Pairing {
    realtime_ns: u64,
    tsc: u64,
}

impl Pairing {
    /// Of now.
    pub fn now(tsc: &GuestTsc) -> Self {
        let (host, realtime_ns) = pair(libc::CLOCK_REALTIME);
        Self { realtime_ns, tsc: tsc.at(host) }
    }

    /// As the guest has it: seconds, nanoseconds, the counter, no flags, room for more.
    pub fn bytes(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(&(self.realtime_ns / NS_PER_S).to_le_bytes());
        bytes[8..16].copy_from_slice(&(self.realtime_ns % NS_PER_S).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.tsc.to_le_bytes());
        bytes
    }
}

fn measure_khz() -> u32 {
    let first = pair(libc::CLOCK_MONOTONIC_RAW);
    let last = loop {
        let now = pair(libc::CLOCK_MONOTONIC_RAW);
        if now.1 - first.1 >= 10_000_000 {
            break now;
        }
        std::hint::spin_loop();
    };
    (((last.0 - first.0) as u128 * 1_000_000) / (last.1 - first.1) as u128) as u32
}

/// Multiplier and shift that turn ticks into nanoseconds as guests compute it:
/// `((ticks << shift) * multiplier) >> 32`, a negative shift going right.
pub fn time_scale(khz: u32) -> (u32, i8) {
    let hz = khz.max(1) as u128 * 1000;
    let (mut scaled, mut shift) = (hz, 0i8);
    while scaled > 2 * NS_PER_S as u128 {
        scaled >>= 1;
        shift -= 1;
    }
    while scaled <= NS_PER_S as u128 {
        scaled <<= 1;
        shift += 1;
    }
    let ns = (NS_PER_S as u128) << 32;
    // Divided by the exact frequency, not by the shifted one that has lost bits.
    let multiplier = if shift < 0 { (ns << -shift) / hz } else { (ns >> shift) / hz };
    (multiplier.min(u32::MAX as u128) as u32, shift)
}

fn ticks_to_ns(ticks: u64, (multiplier, shift): (u32, i8)) -> u64 {
    let shifted = if shift < 0 { ticks as u128 >> -shift } else { (ticks as u128) << shift };
    ((shifted * multiplier as u128) >> 32) as u64
}

/// A vCPU's time-stamp counter.
pub struct GuestTsc {
    host_khz: u32,
    khz: AtomicU32,
    /// Guest ticks per host tick, with [`RATIO_BITS`] fraction bits.
    ratio: AtomicU64,
    offset: AtomicU64,
    /// IA32_TSC_ADJUST.
    adjust: AtomicU64,
}

impl GuestTsc {
    /// A counter at the host's frequency that reads 0 when the host's reads `zero_at`.
    pub fn new(host_khz: u32, zero_at: u64) -> Self {
        Self {
            host_khz,
            khz: AtomicU32::new(host_khz),
            ratio: AtomicU64::new(1 << RATIO_BITS),
            offset: AtomicU64::new(zero_at.wrapping_neg()),
            adjust: AtomicU64::new(0),
        }
    }

    fn scaled(&self, host: u64) -> u64 {
        let ratio = self.ratio.load(Relaxed);
        if ratio == 1 << RATIO_BITS {
            return host;
        }
        ((host as u128 * ratio as u128) >> RATIO_BITS) as u64
    }

    /// The counter when the host's reads `host`.
    #[inline]
    pub fn at(&self, host: u64) -> u64 {
        self.scaled(host).wrapping_add(self.offset.load(Relaxed))
    }

    /// The counter now.
    #[inline]
    pub fn now(&self) -> u64 {
        self.at(host_tsc())
    }

    /// Frequency.
    pub fn khz(&self) -> u32 {
        self.khz.load(Relaxed)
    }

    /// The host's frequency.
    pub fn host_khz(&self) -> u32 {
        self.host_khz
    }

    /// Changes the frequency; the counter goes on from its present value.
    pub fn set_khz(&self, khz: u32) {
        let host = host_tsc();
        let before = self.at(host);
        let ratio = ((khz as u128) << RATIO_BITS) / self.host_khz as u128;
        self.khz.store(khz, Relaxed);
        self.ratio.store(ratio as u64, Relaxed);
        self.offset.store(before.wrapping_sub(self.scaled(host)), Relaxed);
    }

    /// WRMSR IA32_TSC by the guest: IA32_TSC_ADJUST moves along. SDM vol. 3, 17.17.3.
    pub fn write(&self, value: u64) {
        let delta = value.wrapping_sub(self.now());
        self.offset.fetch_add(delta, Relaxed);
        self.adjust.fetch_add(delta, Relaxed);
    }

    /// IA32_TSC_ADJUST.
    pub fn adjust(&self) -> u64 {
        self.adjust.load(Relaxed)
    }

    /// WRMSR IA32_TSC_ADJUST by the guest: the counter moves along.
    pub fn write_adjust(&self, value: u64) {
        let before = self.adjust.swap(value, Relaxed);
        self.offset.fetch_add(value.wrapping_sub(before), Relaxed);
    }

    /// IA32_TSC_ADJUST restored by user space: the counter is restored on its own.
    pub fn restore_adjust(&self, value: u64) {
        self.adjust.store(value, Relaxed);
    }
}

/// One point of a VM's kvmclock.
#[derive(Clone, Copy)]
struct MasterPoint {
    tsc: u64,
    ns: u64,
}

/// The last time user space set a TSC: vCPUs restored one after the other shall agree.
#[derive(Clone, Copy)]
struct TscWrite {
    value: u64,
    host: u64,
    offset: u64,
    khz: u32,
}

/// A VM's clock.
pub struct VmClock {
    host_khz: u32,
    scale: (u32, i8),
    born: u64,
    master: Mutex<MasterPoint>,
    last_write: Mutex<Option<TscWrite>>,
}

impl VmClock {
    /// A clock that begins now, on a host whose TSC runs at `host_khz`.
    pub fn new(host_khz: u32) -> Self {
        let born = host_tsc();
        Self {
            host_khz,
            scale: time_scale(host_khz),
            born,
            master: Mutex::new(MasterPoint { tsc: born, ns: 0 }),
            last_write: Mutex::new(None),
        }
    }

    /// A vCPU's counter: all of a VM start together.
    pub fn guest_tsc(&self) -> GuestTsc {
        GuestTsc::new(self.host_khz, self.born)
    }

    /// kvmclock when the host's TSC reads `tsc`.
    pub fn ns_at(&self, tsc: u64) -> u64 {
        let master = *lock(&self.master);
        // Another CPU may have set the master point a few ticks after `tsc` was read.
        master.ns.wrapping_add(ticks_to_ns(tsc.saturating_sub(master.tsc), self.scale))
    }

    /// KVM_SET_CLOCK. All vCPUs must publish anew.
    pub fn set_ns(&self, ns: u64) {
        *lock(&self.master) = MasterPoint { tsc: host_tsc(), ns };
    }

    /// User space sets a vCPU's counter (KVM_SET_MSRS). vCPUs are restored one by one while time
    /// goes on: a value within a second of what an earlier one's line has come to, or zero, means
    /// "the same line" and takes exactly that vCPU's offset.
    pub fn restore_tsc(&self, tsc: &GuestTsc, value: u64) {
        let host = host_tsc();
        let mut last = lock(&self.last_write);
        let mut offset = value.wrapping_sub(tsc.scaled(host));
        if let Some(write) = *last {
            let second = tsc.khz() as u64 * 1000;
            let expected = write.value.wrapping_add(tsc.scaled(host).wrapping_sub(tsc.scaled(write.host)));
            let near = value.wrapping_sub(expected).wrapping_add(second) < 2 * second;
            if write.khz == tsc.khz() && (near || value == 0) {
                offset = write.offset;
            }
        }
        tsc.offset.store(offset, Relaxed);
        *last = Some(TscWrite { value: tsc.at(host), host, offset, khz: tsc.khz() });
    }

    /// The pvclock structure's fields behind `version`, for a vCPU with this counter.
    fn published(&self, tsc: &GuestTsc, stopped: bool) -> [u8; 24] {
        let master = *lock(&self.master);
        let (multiplier, shift) = time_scale(tsc.khz());
        let flags = PVCLOCK_TSC_STABLE | if stopped { PVCLOCK_GUEST_STOPPED } else { 0 };
        let mut fields = [0; 24];
        fields[..8].copy_from_slice(&tsc.at(master.tsc).to_le_bytes());
        fields[8..16].copy_from_slice(&master.ns.to_le_bytes());
        fields[16..20].copy_from_slice(&multiplier.to_le_bytes());
        fields[20] = shift as u8;
        fields[21] = flags;
        fields
    }

    /// Publishes the clock at `gpa`; a guest address that is not RAM gets nothing, as with KVM.
    pub fn publish(&self, slots: &SlotMap, gpa: u64, tsc: &GuestTsc, stopped: bool) {
        write_versioned(slots, gpa, 8, &self.published(tsc, stopped));
    }

    /// Writes the wall-clock time at which kvmclock read zero (struct pvclock_wall_clock).
    pub fn publish_wall_clock(&self, slots: &SlotMap, gpa: u64) {
        let boot_ns = realtime_ns().wrapping_sub(self.ns_at(host_tsc()));
        let mut fields = [0; 8];
        fields[..4].copy_from_slice(&((boot_ns / NS_PER_S) as u32).to_le_bytes());
        fields[4..].copy_from_slice(&((boot_ns % NS_PER_S) as u32).to_le_bytes());
        write_versioned(slots, gpa, 4, &fields);
    }
}

/// Writes `body` at `gpa + at` under the 32-bit version at `gpa`: odd while it changes.
fn write_versioned(slots: &SlotMap, gpa: u64, at: usize, body: &[u8]) {
    let mut version = [0; 4];
    if !slots.read(gpa, &mut version) {
        return;
    }
    let odd = u32::from_le_bytes(version) | 1;
    slots.write(gpa, &odd.to_le_bytes());
    fence(SeqCst);
    slots.write(gpa + at as u64, body);
    fence(SeqCst);
    slots.write(gpa, &odd.wrapping_add(1).to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::{zeroed_words, Slot};
    use std::sync::Arc;

    #[test]
    fn test_time_scale_turns_a_second_of_ticks_into_a_second() {
        for khz in [1, 999_999, 1_000_000, 1_000_001, 2_445_431, 3_000_000, 5_700_123] {
            let ns = ticks_to_ns(khz as u64 * 1000, time_scale(khz));
            assert!(ns.abs_diff(NS_PER_S) <= 1, "{khz} kHz: {ns}");
        }
    }

    #[test]
    fn test_guest_tsc_adjust_and_write_move_together() {
        let tsc = GuestTsc::new(1_000_000, 0);
        let at = 1 << 40;
        let before = tsc.at(at);
        tsc.write_adjust(500);
        assert_eq!(tsc.at(at), before + 500);
        tsc.write_adjust(100);
        assert_eq!(tsc.at(at), before + 100);
        tsc.restore_adjust(7);
        assert_eq!(tsc.at(at), before + 100);
        let line = tsc.at(at).wrapping_sub(tsc.adjust());
        tsc.write(12345);
        assert_eq!(tsc.at(at).wrapping_sub(tsc.adjust()), line);
    }

    #[test]
    fn test_guest_tsc_scaled_runs_at_its_own_frequency_without_a_jump() {
        let tsc = GuestTsc::new(2_000_000, 0);
        let host = host_tsc();
        let before = tsc.at(host);
        tsc.set_khz(1_000_000);
        assert!(tsc.now() >= before);
        assert_eq!(tsc.at(host + 2_000_000) - tsc.at(host), 1_000_000);
    }

    #[test]
    fn test_restore_tsc_of_several_vcpus_gives_one_line() {
        let clock = VmClock::new(1_000_000);
        let (first, second, third) = (clock.guest_tsc(), clock.guest_tsc(), clock.guest_tsc());
        clock.restore_tsc(&first, 1 << 50);
        clock.restore_tsc(&second, (1 << 50) + 1000);
        clock.restore_tsc(&third, 1 << 20);
        let host = host_tsc();
        assert_eq!(first.at(host), second.at(host));
        assert!(third.at(host) < 1 << 50);
    }

    #[test]
    fn test_publish_gives_every_vcpu_the_same_nanoseconds() {
        let mut page = vec![0u64; 512];
        let slot = Slot {
            id: 0,
            gpa: 0x1000,
            size: 0x1000,
            host: page.as_mut_ptr() as *mut u8,
            read_only: false,
            dirty: Some(zeroed_words(1)),
            code: zeroed_words(1),
        };
        let slots = SlotMap::new(vec![Arc::new(slot)]);
        let clock = VmClock::new(2_345_678);
        clock.set_ns(77 * NS_PER_S);
        let (plain, moved) = (clock.guest_tsc(), clock.guest_tsc());
        moved.write(1 << 44);
        let host = host_tsc();
        let mut seen = Vec::new();
        for tsc in [&plain, &moved] {
            clock.publish(&slots, 0x1020, tsc, false);
            let mut bytes = [0; 32];
            assert!(slots.read(0x1020, &mut bytes));
            let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            let scale = (word(24) as u32, bytes[28] as i8);
            seen.push(word(16) + ticks_to_ns(tsc.at(host) - word(8), scale));
            assert_eq!(bytes[29], PVCLOCK_TSC_STABLE);
        }
        assert_eq!(seen[0], seen[1]);
        assert!(seen[0] >= 77 * NS_PER_S);
        let mut version = [0; 4];
        slots.read(0x1020, &mut version);
        assert_eq!(u32::from_le_bytes(version), 4);
        assert_eq!(slots.slots()[0].dirty.as_ref().unwrap()[0].load(Relaxed), 1);
    }

    #[test]
    fn test_host_tsc_khz_is_plausible() {
        let khz = host_tsc_khz();
        assert!((200_000..10_000_000).contains(&khz), "{khz}");
    }
}

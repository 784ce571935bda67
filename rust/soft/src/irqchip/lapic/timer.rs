//! The local APIC's timer: one-shot, periodic and TSC-deadline (Intel SDM volume 3, "APIC Timer").
//!
//! The counter runs at 1 GHz before the divider, as KVM's does. Nothing counts: the timer keeps
//! the instant at which the count reaches zero and computes the current count from it.

use super::super::Host;

/// Shortest period of a periodic timer, KVM's `min_timer_period_us`: a guest that asks for a
/// period of one count would otherwise keep a host CPU busy.
pub(crate) const MIN_PERIOD_NS: u64 = 200_000;

const DIVIDE_BITS: u32 = 0xb;

/// Clock of one vCPU: the host's time and this vCPU's time-stamp counter.
#[derive(Clone, Copy)]
pub(crate) struct Clock<'a> {
    pub host: &'a dyn Host,
    pub vcpu: u32,
}

impl Clock<'_> {
    pub(crate) fn now_ns(&self) -> u64 {
        self.host.now_ns()
    }

    /// Host time at which this vCPU's TSC reaches `deadline`; `None` if it already has.
    fn instant_of_tsc(&self, deadline: u64) -> Option<u64> {
        let remaining = deadline.checked_sub(self.host.guest_tsc(self.vcpu as usize))?;
        if remaining == 0 {
            return None;
        }
        let khz = u128::from(self.host.tsc_khz().max(1));
        let wait_ns = (u128::from(remaining) * 1_000_000).div_ceil(khz);
        Some(self.now_ns().saturating_add(u64::try_from(wait_ns).unwrap_or(u64::MAX)))
    }
}

/// Mode field (bits 18:17) of the LVT timer entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    /// Mode 3: the timer does nothing.
    Reserved,
}

impl TimerMode {
    pub(crate) fn from_lvt(lvt: u32) -> Self {
        match (lvt >> 17) & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }

    fn counts(self) -> bool {
        matches!(self, Self::OneShot | Self::Periodic)
    }
}

/// State of the timer. Its mode lives in the LVT entry and is passed in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timer {
    pub initial: u32,
    divide: u32,
    pub tsc_deadline: u64,
    /// When the count reaches zero; `None` while the timer stands still.
    expiry_ns: Option<u64>,
}

impl Timer {
    /// When the timer wants to be looked at.
    pub(crate) fn expiry_ns(&self) -> Option<u64> {
        self.expiry_ns
    }

    pub(crate) fn divide(&self) -> u32 {
        self.divide
    }

    fn divisor(&self) -> u64 {
        let exponent = (self.divide & 3) | ((self.divide & 8) >> 1);
        1 << ((exponent + 1) & 7)
    }

    fn duration_ns(&self, count: u32) -> u64 {
        u64::from(count) * self.divisor()
    }

    fn period_ns(&self) -> u64 {
        self.duration_ns(self.initial).max(MIN_PERIOD_NS)
    }

    /// Starts (or with 0 stops) the count. Ignored in TSC-deadline mode.
    pub(crate) fn write_initial(&mut self, count: u32, mode: TimerMode, clock: &Clock) {
        if !mode.counts() {
            return;
        }
        self.initial = count;
        self.expiry_ns = match (count, mode) {
            (0, _) => None,
            (_, TimerMode::Periodic) => Some(clock.now_ns().saturating_add(self.period_ns())),
            _ => Some(clock.now_ns().saturating_add(self.duration_ns(count))),
        };
    }

    /// Current count register.
    pub(crate) fn current(&self, mode: TimerMode, clock: &Clock) -> u32 {
        let Some(expiry_ns) = self.expiry_ns.filter(|_| mode.counts()) else {
            return 0;
        };
        let now_ns = clock.now_ns();
        let mut remaining_ns = expiry_ns.saturating_sub(now_ns);
        if remaining_ns == 0 && mode == TimerMode::Periodic {
            // The timer thread has not been here yet, the counter has reloaded all the same.
            let period_ns = self.period_ns();
            remaining_ns = period_ns - (now_ns - expiry_ns) % period_ns;
        }
        let count = remaining_ns / self.divisor();
        u32::try_from(count).unwrap_or(u32::MAX).min(self.initial)
    }

    /// Changes the divider; a running count keeps its value and goes on at the new pace.
    pub(crate) fn write_divide(&mut self, value: u32, clock: &Clock) {
        let old_divisor = self.divisor();
        self.divide = value & DIVIDE_BITS;
        if let Some(expiry_ns) = self.expiry_ns.filter(|_| self.tsc_deadline == 0) {
            let now_ns = clock.now_ns();
            let count = expiry_ns.saturating_sub(now_ns) / old_divisor;
            self.expiry_ns = Some(now_ns.saturating_add(count.saturating_mul(self.divisor())));
        }
    }

    /// The LVT entry changed from mode `old` to `new`: one-shot and periodic share the count,
    /// TSC-deadline shares nothing with them.
    pub(crate) fn change_mode(&mut self, old: TimerMode, new: TimerMode) {
        if old != new && !(old.counts() && new.counts()) {
            self.initial = 0;
            self.tsc_deadline = 0;
            self.expiry_ns = None;
        }
    }

    /// Writes IA32_TSC_DEADLINE. Returns true if the deadline has passed: the timer fires now.
    #[must_use]
    pub(crate) fn write_tsc_deadline(&mut self, value: u64, mode: TimerMode, clock: &Clock) -> bool {
        if mode != TimerMode::TscDeadline {
            return false;
        }
        self.tsc_deadline = value;
        self.expiry_ns = None;
        if value == 0 {
            return false;
        }
        self.expiry_ns = clock.instant_of_tsc(value);
        if self.expiry_ns.is_none() {
            self.tsc_deadline = 0;
        }
        self.expiry_ns.is_none()
    }

    /// Lets the timer act on the time. Returns true if it expired.
    #[must_use]
    pub(crate) fn expire(&mut self, mode: TimerMode, clock: &Clock) -> bool {
        let Some(expiry_ns) = self.expiry_ns else {
            return false;
        };
        let now_ns = clock.now_ns();
        if now_ns < expiry_ns {
            return false;
        }
        match mode {
            TimerMode::Periodic => {
                // Ticks the guest was too slow for are merged into one; the phase stays.
                let period_ns = self.period_ns();
                let late_ns = (now_ns - expiry_ns) % period_ns;
                self.expiry_ns = Some(now_ns.saturating_add(period_ns - late_ns));
                true
            }
            TimerMode::TscDeadline => {
                let deadline = self.tsc_deadline;
                // The guest's TSC may have been set back meanwhile: then this arms again.
                self.write_tsc_deadline(deadline, mode, clock)
            }
            TimerMode::OneShot => {
                self.expiry_ns = None;
                true
            }
            TimerMode::Reserved => {
                self.expiry_ns = None;
                false
            }
        }
    }

    /// Takes the counting registers of a saved register page: `current` is what was left.
    pub(crate) fn restore(&mut self, saved: Saved, mode: TimerMode, clock: &Clock) {
        *self = Self { divide: saved.divide & DIVIDE_BITS, ..Self::default() };
        if !mode.counts() {
            return;
        }
        self.initial = saved.initial;
        let left = saved.current.min(saved.initial);
        let wait_ns = match (mode, left) {
            _ if saved.initial == 0 => None,
            (TimerMode::Periodic, 0) => Some(self.period_ns()),
            (_, 0) => None,
            _ => Some(self.duration_ns(left)),
        };
        self.expiry_ns = wait_ns.map(|wait_ns| clock.now_ns().saturating_add(wait_ns));
    }
}

/// The timer's registers in a saved register page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Saved {
    pub initial: u32,
    pub current: u32,
    pub divide: u32,
}

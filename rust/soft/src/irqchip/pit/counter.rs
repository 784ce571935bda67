//! One counter of the 8254: all six modes, binary and BCD, latches.
//!
//! Intel's 8254 data sheet. Nothing counts: output and count are computed from the instant the
//! count was loaded. One deviation, which is KVM's: a new count in modes 2 and 3 starts a new
//! period at once instead of at the end of the running one.

use kvm_bindings::kvm_pit_channel_state;

/// Input clock of a PC's 8254.
const FREQUENCY_HZ: u128 = 1_193_182;
const NS_PER_S: u128 = 1_000_000_000;
/// What KVM calls the mode of a channel that was never programmed.
const KVM_MODE_UNSET: u8 = 0xff;

/// Which byte of a count comes next; the numbers are those of `kvm_pit_channel_state`.
pub(super) const STATE_LSB: u8 = 1;
pub(super) const STATE_MSB: u8 = 2;
/// Low byte of a two-byte access.
pub(super) const STATE_WORD0: u8 = 3;
/// High byte of a two-byte access.
pub(super) const STATE_WORD1: u8 = 4;

fn ticks_to_ns(ticks: u64) -> u64 {
    u64::try_from((u128::from(ticks) * NS_PER_S).div_ceil(FREQUENCY_HZ)).unwrap_or(u64::MAX)
}

fn ns_to_ticks(ns: u64) -> u64 {
    (u128::from(ns) * FREQUENCY_HZ / NS_PER_S) as u64
}

/// Progress of the count since it was loaded.
#[derive(Clone, Copy, Debug)]
enum Progress {
    /// No count yet since the control word, or a trigger is awaited.
    Waiting,
    /// The gate holds the count at this many ticks.
    Held(u64),
    /// Counting since this instant.
    Since(u64),
}

/// One counter.
#[derive(Clone, Debug)]
pub(super) struct Counter {
    /// Last count written, 1 to 65,536 (10,000 in BCD).
    reload: u32,
    /// Count the current run began with; differs from `reload` only while a trigger is awaited.
    running: u32,
    progress: Progress,
    /// The count written last is not in the counting element yet.
    null_count: bool,
    mode: u8,
    /// 1 low byte, 2 high byte, 3 both.
    rw_mode: u8,
    bcd: bool,
    gate: bool,
    read_state: u8,
    write_state: u8,
    write_latch: u8,
    latched_count: u16,
    /// State the latched count is read by; 0 if none is latched.
    count_latched: u8,
    latched_status: Option<u8>,
}

impl Counter {
    pub(super) fn new(gate: bool) -> Self {
        Self {
            reload: 0x1_0000,
            running: 0x1_0000,
            progress: Progress::Waiting,
            null_count: true,
            mode: 0,
            rw_mode: 3,
            bcd: false,
            gate,
            read_state: STATE_WORD0,
            write_state: STATE_WORD0,
            write_latch: 0,
            latched_count: 0,
            count_latched: 0,
            latched_status: None,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Modes in which a rise of the gate starts the count.
    fn is_triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    fn elapsed(&self, now_ns: u64) -> Option<u64> {
        match self.progress {
            Progress::Waiting => None,
            Progress::Held(ticks) => Some(ticks),
            Progress::Since(start_ns) => Some(ns_to_ticks(now_ns.saturating_sub(start_ns))),
        }
    }

    /// Level of OUT.
    pub(super) fn output(&self, now_ns: u64) -> bool {
        let Some(ticks) = self.elapsed(now_ns) else {
            return self.mode != 0;
        };
        let count = u64::from(self.running);
        match self.mode {
            0 | 1 => ticks >= count,
            2 => !self.gate || ticks % count != count - 1,
            3 => !self.gate || ticks % count < count.div_ceil(2),
            _ => ticks != count,
        }
    }

    /// The counting element, as it would be latched now.
    fn count(&self, now_ns: u64) -> u16 {
        let modulus = if self.bcd { 10_000 } else { 0x1_0000 };
        let running = u64::from(self.running);
        let value = match (self.elapsed(now_ns), self.mode) {
            (None, _) => u64::from(self.reload),
            (Some(ticks), 2) => running - ticks % running,
            (Some(ticks), 3) => {
                let high = running.div_ceil(2);
                let phase = ticks % running;
                (running & !1) - 2 * (phase % high)
            }
            // The other modes count on past zero.
            (Some(ticks), _) => running + modulus - ticks % modulus,
        };
        let value = (value % modulus) as u16;
        if self.bcd {
            to_bcd(value)
        } else {
            value
        }
    }

    /// First rise of OUT later than `after_ns`.
    pub(super) fn next_rise_ns(&self, after_ns: u64) -> Option<u64> {
        let Progress::Since(start_ns) = self.progress else {
            return None;
        };
        let count = u64::from(self.running);
        let tick = match self.mode {
            0 | 1 => count,
            2 | 3 => {
                let ticks = ns_to_ticks(after_ns.saturating_sub(start_ns));
                (ticks / count + 1) * count
            }
            _ => count + 1,
        };
        let rise_ns = start_ns.saturating_add(ticks_to_ns(tick));
        (rise_ns > after_ns).then_some(rise_ns)
    }

    /// Length of a period in the modes that repeat.
    pub(super) fn period_ns(&self) -> Option<u64> {
        self.is_periodic().then(|| ticks_to_ns(u64::from(self.running)))
    }

    /// Control word with a non-zero access field.
    pub(super) fn configure(&mut self, control: u8) {
        self.rw_mode = (control >> 4) & 3;
        self.mode = match (control >> 1) & 7 {
            mode @ 6.. => mode - 4,
            mode => mode,
        };
        self.bcd = control & 1 != 0;
        let state = if self.rw_mode == 3 { STATE_WORD0 } else { self.rw_mode };
        self.read_state = state;
        self.write_state = state;
        self.count_latched = 0;
        self.latched_status = None;
        self.progress = Progress::Waiting;
        self.null_count = true;
    }

    /// Counter latch command; a count that is latched already stays.
    pub(super) fn latch_count(&mut self, now_ns: u64) {
        if self.count_latched == 0 {
            self.latched_count = self.count(now_ns);
            self.count_latched = if self.rw_mode == 3 { STATE_WORD0 } else { self.rw_mode };
        }
    }

    /// Status latch of the read-back command.
    pub(super) fn latch_status(&mut self, now_ns: u64) {
        let status = u8::from(self.output(now_ns)) << 7
            | u8::from(self.null_count) << 6
            | self.rw_mode << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.latched_status.get_or_insert(status);
    }

    pub(super) fn read(&mut self, now_ns: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        if self.count_latched != 0 {
            let [low, high] = self.latched_count.to_le_bytes();
            let (value, next) = match self.count_latched {
                STATE_LSB => (low, 0),
                STATE_WORD0 => (low, STATE_MSB),
                _ => (high, 0),
            };
            self.count_latched = next;
            return value;
        }
        let [low, high] = self.count(now_ns).to_le_bytes();
        let (value, next) = match self.read_state {
            STATE_LSB => (low, STATE_LSB),
            STATE_WORD0 => (low, STATE_WORD1),
            STATE_WORD1 => (high, STATE_WORD0),
            _ => (high, STATE_MSB),
        };
        self.read_state = next;
        value
    }

    /// Writes a byte of the count. Returns true when the count is complete.
    pub(super) fn write(&mut self, value: u8, now_ns: u64) -> bool {
        let count = match self.write_state {
            STATE_LSB => u16::from(value),
            STATE_MSB => u16::from(value) << 8,
            STATE_WORD0 => {
                self.write_latch = value;
                self.write_state = STATE_WORD1;
                if self.mode == 0 {
                    // The first byte stops the count, so that half a count never expires.
                    self.progress = Progress::Waiting;
                }
                return false;
            }
            _ => {
                self.write_state = STATE_WORD0;
                u16::from_le_bytes([self.write_latch, value])
            }
        };
        self.load(count, now_ns);
        true
    }

    fn load(&mut self, count: u16, now_ns: u64) {
        let value = if self.bcd { from_bcd(count) } else { count.into() };
        self.reload = match (value, self.bcd) {
            (0, true) => 10_000,
            (0, false) => 0x1_0000,
            // A period of one has no low phase; the data sheet forbids it.
            (1, _) if self.is_periodic() => 2,
            _ => value,
        };
        self.null_count = true;
        if !self.is_triggered() {
            self.start(now_ns);
        }
    }

    fn start(&mut self, now_ns: u64) {
        self.running = self.reload;
        self.null_count = false;
        self.progress = if self.gate || self.is_triggered() { Progress::Since(now_ns) } else { Progress::Held(0) };
    }

    pub(super) fn gate(&self) -> bool {
        self.gate
    }

    /// Changes the gate: it holds the count in modes 0, 2, 3, 4 and triggers it in 1, 2, 3, 5.
    pub(super) fn set_gate(&mut self, gate: bool, now_ns: u64) {
        let rises = gate && !self.gate;
        let falls = !gate && self.gate;
        self.gate = gate;
        let waits_for_count = matches!(self.progress, Progress::Waiting) && !self.is_triggered();
        if waits_for_count {
            return;
        }
        match self.mode {
            1 | 5 if rises => self.start(now_ns),
            1 | 5 => (),
            2 | 3 if rises => self.start(now_ns),
            _ if falls => self.progress = Progress::Held(self.elapsed(now_ns).unwrap_or(0)),
            _ if rises => {
                let done_ns = ticks_to_ns(self.elapsed(now_ns).unwrap_or(0));
                self.progress = Progress::Since(now_ns.saturating_sub(done_ns));
            }
            _ => (),
        }
    }

    /// `struct kvm_pit_channel_state`.
    pub(super) fn state(&self) -> kvm_pit_channel_state {
        let load_time_ns = match self.progress {
            Progress::Since(start_ns) => start_ns as i64,
            _ => 0,
        };
        kvm_pit_channel_state {
            count: self.reload,
            latched_count: self.latched_count,
            count_latched: self.count_latched,
            status_latched: self.latched_status.is_some().into(),
            status: self.latched_status.unwrap_or(0),
            read_state: self.read_state,
            write_state: self.write_state,
            write_latch: self.write_latch,
            rw_mode: self.rw_mode,
            mode: self.mode,
            bcd: self.bcd.into(),
            gate: self.gate.into(),
            count_load_time: load_time_ns,
        }
    }

    /// Takes a saved channel; its count starts anew at `now_ns`, as with KVM. `None` for a
    /// state no counter can be in.
    pub(super) fn from_state(state: &kvm_pit_channel_state, now_ns: u64) -> Option<Self> {
        let bcd = state.bcd != 0;
        let limit = if bcd { 10_000 } else { 0x1_0000 };
        let valid = state.count <= limit
            && (state.mode <= 5 || state.mode == KVM_MODE_UNSET)
            && state.rw_mode <= 3
            && state.count_latched <= STATE_WORD1
            && state.read_state <= STATE_WORD1
            && state.write_state <= STATE_WORD1;
        if !valid {
            return None;
        }
        let mut counter = Self::new(state.gate != 0);
        // KVM shows a channel nobody has programmed as mode 0xff and counting from the whole range.
        counter.mode = if state.mode == KVM_MODE_UNSET { 0 } else { state.mode };
        counter.bcd = bcd;
        // A channel nobody has programmed is all zeroes there.
        counter.rw_mode = if state.rw_mode == 0 { 3 } else { state.rw_mode };
        counter.read_state = if state.read_state == 0 { STATE_WORD0 } else { state.read_state };
        counter.write_state = if state.write_state == 0 { STATE_WORD0 } else { state.write_state };
        counter.write_latch = state.write_latch;
        counter.latched_count = state.latched_count;
        counter.count_latched = state.count_latched;
        counter.latched_status = (state.status_latched != 0).then_some(state.status);
        if state.mode != KVM_MODE_UNSET && state.count != 0 && state.count_load_time != 0 {
            counter.reload = state.count.max(if counter.is_periodic() { 2 } else { 1 });
            counter.start(now_ns);
        }
        Some(counter)
    }
}

fn to_bcd(value: u16) -> u16 {
    let digit = |power: u16| value / power % 10;
    (digit(1000) << 12) | (digit(100) << 8) | (digit(10) << 4) | digit(1)
}

/// Digits above 9 count for what they are worth, cut at the largest count.
fn from_bcd(value: u16) -> u32 {
    let digit = |shift: u16| u32::from(value >> shift & 0xf);
    (digit(12) * 1000 + digit(8) * 100 + digit(4) * 10 + digit(0)).min(9999)
}

//! The 8254 interval timer at ports 0x40 to 0x43 and the speaker port 0x61.
//!
//! Channel 0 drives GSI 0, channel 2's gate and output are at port 0x61 (as on a PC, and the way
//! kernels calibrate their clocks). A tick is a pulse on the line. With re-injection (KVM's
//! default) a tick that comes before the last one was acknowledged waits instead of being lost.

mod counter;

use super::IrqError;
use counter::Counter;
use kvm_bindings::{kvm_pit_state2, KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_FLAGS_SPEAKER_DATA_ON};

/// Shortest interval between ticks, as for the local APIC's timer: a guest may ask for a
/// period of two clocks.
const MIN_PERIOD_NS: u64 = 200_000;
/// Ticks that wait for re-injection; a guest that stays away longer loses the rest.
const MAX_PENDING: u32 = 1024;

const SPEAKER_PORT: u16 = 0x61;
const CONTROL_PORT: u16 = 0x43;

/// The interval timer.
#[derive(Clone, Debug)]
pub(crate) struct Pit {
    channels: [Counter; 3],
    speaker_data: bool,
    has_speaker_port: bool,
    /// An HPET has taken over the timer's interrupt.
    hpet_legacy: bool,
    reinject: bool,
    /// Ticks not acknowledged yet, with re-injection.
    pending: u32,
    /// The last pulse was acknowledged: the next may go out.
    acknowledged: bool,
    deadline_ns: Option<u64>,
}

impl Pit {
    pub(crate) fn new(has_speaker_port: bool) -> Self {
        Self {
            channels: [Counter::new(true), Counter::new(true), Counter::new(false)],
            speaker_data: false,
            has_speaker_port,
            hpet_legacy: false,
            reinject: true,
            pending: 0,
            acknowledged: true,
            deadline_ns: None,
        }
    }

    /// Whether `port` is this chip's.
    pub(crate) fn decodes(&self, port: u16) -> bool {
        matches!(port, 0x40..=0x43) || (port == SPEAKER_PORT && self.has_speaker_port)
    }

    /// A byte read from one of its ports.
    pub(crate) fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].read(now_ns),
            SPEAKER_PORT => {
                // Bit 4 toggles with the memory refresh, every 15 µs on a PC.
                let refresh = (now_ns >> 14) as u8 & 1;
                let channel = &self.channels[2];
                u8::from(channel.gate())
                    | u8::from(self.speaker_data) << 1
                    | refresh << 4
                    | u8::from(channel.output(now_ns)) << 5
            }
            // The control register is write-only.
            _ => 0,
        }
    }

    /// A byte written to one of its ports.
    pub(crate) fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        match port {
            0x40..=0x42 => {
                let index = usize::from(port - 0x40);
                let complete = self.channels[index].write(value, now_ns);
                if index == 0 {
                    if complete {
                        self.reset_reinjection();
                    }
                    self.schedule(now_ns);
                }
            }
            CONTROL_PORT => self.write_control(value, now_ns),
            SPEAKER_PORT => {
                self.speaker_data = value & 2 != 0;
                self.channels[2].set_gate(value & 1 != 0, now_ns);
            }
            _ => (),
        }
    }

    fn write_control(&mut self, value: u8, now_ns: u64) {
        let select = usize::from(value >> 6);
        if let Some(channel) = self.channels.get_mut(select) {
            if value & 0x30 == 0 {
                channel.latch_count(now_ns);
            } else {
                channel.configure(value);
                // A latch command must leave the deadline alone: it may have passed already
                // without the tick being out.
                if select == 0 {
                    self.schedule(now_ns);
                }
            }
            return;
        }
        for (index, channel) in self.channels.iter_mut().enumerate() {
            if value & 2 << index == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                channel.latch_count(now_ns);
            }
            if value & 0x10 == 0 {
                channel.latch_status(now_ns);
            }
        }
    }

    fn schedule(&mut self, now_ns: u64) {
        let channel = &self.channels[0];
        let hurried = channel.period_ns().is_some_and(|period_ns| period_ns < MIN_PERIOD_NS);
        let after_ns = if hurried { now_ns.saturating_add(MIN_PERIOD_NS) } else { now_ns };
        self.deadline_ns = channel.next_rise_ns(after_ns).filter(|_| !self.hpet_legacy);
    }

    /// When [`Pit::run`] wants to be called.
    pub(crate) fn deadline_ns(&self) -> Option<u64> {
        self.deadline_ns
    }

    /// Lets the timer act on the time. Returns true if the line is to be pulsed.
    #[must_use]
    pub(crate) fn run(&mut self, now_ns: u64) -> bool {
        let Some(deadline_ns) = self.deadline_ns.filter(|&deadline_ns| deadline_ns <= now_ns) else {
            return false;
        };
        let missed =
            self.channels[0].period_ns().map_or(0, |period_ns| (now_ns - deadline_ns) / period_ns.max(MIN_PERIOD_NS));
        self.schedule(now_ns);
        if !self.reinject {
            return true;
        }
        let ticks = u32::try_from(missed).unwrap_or(u32::MAX).saturating_add(1);
        self.pending = self.pending.saturating_add(ticks).min(MAX_PENDING);
        std::mem::take(&mut self.acknowledged)
    }

    /// The guest ended the timer's interrupt. Returns true if the line is to be pulsed again.
    #[must_use]
    pub(crate) fn acknowledge(&mut self) -> bool {
        self.acknowledged = true;
        if !self.reinject || self.pending == 0 {
            return false;
        }
        self.pending -= 1;
        self.acknowledged = self.pending == 0;
        self.pending > 0
    }

    /// Forgets ticks that wait: the line was unmasked or the timer set anew, and a pulse into a
    /// masked pin is never acknowledged.
    pub(crate) fn reset_reinjection(&mut self) {
        self.pending = 0;
        self.acknowledged = true;
    }

    /// KVM_REINJECT_CONTROL.
    pub(crate) fn set_reinject(&mut self, reinject: bool) {
        self.reinject = reinject;
        self.reset_reinjection();
    }

    /// KVM_GET_PIT2.
    pub(crate) fn state(&self) -> kvm_pit_state2 {
        let flag = |condition: bool, bit| if condition { bit } else { 0 };
        kvm_pit_state2 {
            channels: std::array::from_fn(|index| self.channels[index].state()),
            flags: flag(self.hpet_legacy, KVM_PIT_FLAGS_HPET_LEGACY)
                | flag(self.speaker_data, KVM_PIT_FLAGS_SPEAKER_DATA_ON),
            reserved: [0; 9],
        }
    }

    /// KVM_SET_PIT2.
    pub(crate) fn set_state(&mut self, state: &kvm_pit_state2, now_ns: u64) -> Result<(), IrqError> {
        let invalid = |reason| IrqError::InvalidState { chip: "PIT", reason };
        if state.flags & !(KVM_PIT_FLAGS_HPET_LEGACY | KVM_PIT_FLAGS_SPEAKER_DATA_ON) != 0 {
            return Err(invalid("unknown flags"));
        }
        let channel = |index: usize| {
            Counter::from_state(&state.channels[index], now_ns)
                .ok_or_else(|| invalid("a channel's count, mode or access state is out of range"))
        };
        self.channels = [channel(0)?, channel(1)?, channel(2)?];
        self.hpet_legacy = state.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0;
        self.speaker_data = state.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0;
        self.reset_reinjection();
        self.schedule(now_ns);
        Ok(())
    }
}

#[cfg(test)]
mod tests;

//! When a vCPU with hardly anything to do gives its memory back: decoded blocks, translations and the tables they are
//! found by, which are made anew when its guest has something to do again.
//!
//! Looked at once a window. A guest that idles still takes its timer's interrupts, so what counts is how many
//! instructions it ran, whatever else the host is busy with. A vCPU that goes on idling rests again, for an idle guest
//! does something now and then that it does not do for long; but ever more seldom, or what little it runs would be
//! decoded for ever.

use std::time::Duration;

/// How long a vCPU is watched, in nanoseconds.
const WINDOW_NS: u64 = 1_000_000_000;
/// The longest time from one rest to the next, in nanoseconds.
const MOST_NS: u64 = 64 * WINDOW_NS;
/// Below so many instructions in a window a vCPU idles: some ten milliseconds' worth. A Linux guest without anything to
/// do runs half a million a second.
const IDLE: u64 = 3_000_000;
/// So many in a window and it has something to do.
const BUSY: u64 = 1_000_000;

/// What a vCPU's owner is to have it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Give its memory back.
    Rest,
    /// Spare none to be fast.
    Stir,
}

/// What one vCPU did lately; times are of one clock, in nanoseconds.
#[derive(Debug)]
pub(crate) struct Rest {
    began_ns: u64,
    /// Instructions retired by then.
    began: u64,
    /// When it may rest, and how much later it may again.
    due_ns: u64,
    gap_ns: u64,
}

impl Rest {
    /// Of a vCPU that has run nothing yet.
    pub fn new(now_ns: u64) -> Self {
        Self { began_ns: now_ns, began: 0, due_ns: 0, gap_ns: WINDOW_NS }
    }

    /// It has nothing to do, and ran `retired` instructions until now. What follows from that.
    pub fn halts(&mut self, now_ns: u64, retired: u64) -> Option<Turn> {
        let ran = retired.saturating_sub(self.began);
        if now_ns.saturating_sub(self.began_ns) >= WINDOW_NS {
            (self.began_ns, self.began) = (now_ns, retired);
            if self.rests(now_ns, ran) {
                return Some(Turn::Rest);
            }
        }
        (ran > BUSY).then_some(Turn::Stir)
    }

    /// How long it may sleep before it is looked at again; `None`: as long as it likes, as it rests.
    pub fn patience(&self, now_ns: u64) -> Option<Duration> {
        let left = (self.began_ns + WINDOW_NS).saturating_sub(now_ns);
        (now_ns >= self.due_ns).then(|| Duration::from_nanos(left.max(1)))
    }

    fn rests(&mut self, now_ns: u64, ran: u64) -> bool {
        if ran > IDLE {
            (self.due_ns, self.gap_ns) = (now_ns, WINDOW_NS);
            return false;
        }
        let due = now_ns >= self.due_ns;
        if due {
            self.gap_ns = (self.gap_ns * 2).min(MOST_NS);
            self.due_ns = now_ns + self.gap_ns;
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const M: u64 = 1_000_000;

    /// Halts every 100 milliseconds, having run `each` instructions; how often it rests until `end`.
    fn rests(rest: &mut Rest, (from, end): (u64, u64), retired: &mut u64, each: u64) -> usize {
        let mut halts = |at: u64| {
            *retired += each;
            rest.halts(at * MS, *retired) == Some(Turn::Rest)
        };
        (from..end).step_by(100).filter(|&at| halts(at)).count()
    }

    #[test]
    fn test_rest_of_an_idle_vcpu_comes_ever_more_seldom() {
        let (mut rest, mut retired) = (Rest::new(0), 0);

        assert_eq!(rests(&mut rest, (0, 2_000), &mut retired, M / 20), 1);
        assert_eq!(rest.patience(2_000 * MS), None);
        assert_eq!(rests(&mut rest, (2_000, 10_000), &mut retired, M / 20), 2);
        assert!(rests(&mut rest, (10_000, 3_600_000), &mut retired, M / 20) < 60);
    }

    #[test]
    fn test_rest_of_a_busy_vcpu_never_comes() {
        let (mut rest, mut retired) = (Rest::new(0), 0);

        assert_eq!(rests(&mut rest, (0, 10_000), &mut retired, M), 0);
    }

    #[test]
    fn test_rest_comes_again_after_the_vcpu_was_busy() {
        let (mut rest, mut retired) = (Rest::new(0), 0);

        assert_eq!(rests(&mut rest, (0, 5_000), &mut retired, M / 20), 2);
        assert_eq!(rests(&mut rest, (5_000, 10_000), &mut retired, M), 0);
        assert_eq!(rests(&mut rest, (10_000, 12_500), &mut retired, M / 20), 1);
    }

    #[test]
    fn test_rest_ends_as_soon_as_the_vcpu_has_something_to_do() {
        let mut rest = Rest::new(0);
        assert_eq!(rest.halts(1_000 * MS, M / 2), Some(Turn::Rest));

        assert_eq!(rest.halts(1_100 * MS, M), None);
        assert_eq!(rest.halts(1_200 * MS, 2 * M), Some(Turn::Stir));
    }

    #[test]
    fn test_rest_of_a_vcpu_that_sleeps_on_is_due_when_its_patience_ends() {
        let mut rest = Rest::new(0);
        assert_eq!(rest.halts(10 * MS, M), None);

        assert_eq!(rest.patience(10 * MS), Some(Duration::from_millis(990)));

        assert_eq!(rest.halts(1_000 * MS, M), Some(Turn::Rest));
    }
}

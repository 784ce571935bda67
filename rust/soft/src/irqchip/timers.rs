//! The timer thread: sleeps until the nearest deadline of the PIT or a local APIC.
//!
//! A deadline is a slot in a small table. Arming an earlier one than the thread sleeps for wakes
//! it; a later one or none does not, the thread then wakes once for nothing and sleeps again,
//! which is cheaper than a wake-up each time a guest moves its deadline back.
//! The owner of a slot is the judge of whether its time has come: the thread only asks.

use super::{lock, Host};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Index into the table of deadlines.
pub(crate) type Slot = usize;

/// The PIT's slot; the local APICs follow.
pub(crate) const PIT_SLOT: Slot = 0;

struct Queue {
    deadlines_ns: Vec<Option<u64>>,
    /// What the thread sleeps for; 0 while it is awake and will look at the table anyway.
    sleeping_until_ns: u64,
    stop: bool,
}

/// The table of deadlines.
pub(crate) struct Timers {
    host: Arc<dyn Host>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Timers {
    pub(crate) fn new(host: Arc<dyn Host>) -> Arc<Self> {
        Arc::new(Self {
            host,
            queue: Mutex::new(Queue { deadlines_ns: vec![None], sleeping_until_ns: 0, stop: false }),
            changed: Condvar::new(),
        })
    }

    /// Sets or clears a deadline.
    pub(crate) fn arm(&self, slot: Slot, deadline_ns: Option<u64>) {
        let mut queue = lock(&self.queue);
        if queue.deadlines_ns.len() <= slot {
            queue.deadlines_ns.resize(slot + 1, None);
        }
        queue.deadlines_ns[slot] = deadline_ns;
        if deadline_ns.is_some_and(|deadline_ns| deadline_ns < queue.sleeping_until_ns) {
            self.changed.notify_one();
        }
    }

    /// Takes the slots whose deadline has come.
    #[cfg(test)]
    pub(crate) fn take_due(&self) -> Vec<Slot> {
        self.take_due_from(&mut lock(&self.queue))
    }

    fn take_due_from(&self, queue: &mut Queue) -> Vec<Slot> {
        let now_ns = self.host.now_ns();
        let mut due = Vec::new();
        for (slot, deadline_ns) in queue.deadlines_ns.iter_mut().enumerate() {
            if deadline_ns.take_if(|deadline_ns| *deadline_ns <= now_ns).is_some() {
                due.push(slot);
            }
        }
        due
    }

    /// Sleeps until something is due and returns it; `None` when the thread shall end.
    fn wait(&self) -> Option<Vec<Slot>> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.stop {
                return None;
            }
            let due = self.take_due_from(&mut queue);
            if !due.is_empty() {
                return Some(due);
            }
            let nearest_ns = queue.deadlines_ns.iter().flatten().min().copied();
            queue.sleeping_until_ns = nearest_ns.unwrap_or(u64::MAX);
            queue = match nearest_ns {
                Some(nearest_ns) => {
                    let wait_ns = nearest_ns.saturating_sub(self.host.now_ns());
                    self.changed
                        .wait_timeout(queue, Duration::from_nanos(wait_ns))
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                None => self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
            };
            queue.sleeping_until_ns = 0;
        }
    }

    /// Tells the thread to end.
    pub(crate) fn stop(&self) {
        lock(&self.queue).stop = true;
        self.changed.notify_all();
    }

    /// Starts the thread, which calls `fire` for each slot that is due until [`Timers::stop`].
    pub(crate) fn spawn(self: &Arc<Self>, fire: impl Fn(Slot) + Send + 'static) -> std::io::Result<JoinHandle<()>> {
        let timers = Arc::clone(self);
        thread::Builder::new().name("irq-timers".into()).spawn(move || {
            // By default the kernel may let a sleep last 50 µs longer, a quarter of the shortest
            // period. SAFETY: no pointers are passed; a refusal only leaves the default.
            unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
            while let Some(due) = timers.wait() {
                due.into_iter().for_each(&fire);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::FakeHost;
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn test_take_due_returns_passed_deadlines_once() {
        let host = FakeHost::new();
        let timers = Timers::new(host.clone());
        timers.arm(0, Some(100));
        timers.arm(3, Some(50));
        timers.arm(1, Some(200));
        host.set_now(100);
        assert_eq!(timers.take_due(), [0, 3]);
        assert!(timers.take_due().is_empty());
    }

    #[test]
    fn test_thread_fires_earlier_deadline_armed_later_and_stops() {
        let host = FakeHost::new();
        let timers = Timers::new(host.clone());
        let (sender, receiver) = mpsc::channel();
        let thread = timers.spawn(move |slot| sender.send(slot).unwrap()).unwrap();
        timers.arm(1, Some(u64::MAX - 1));
        timers.arm(2, Some(0));
        assert_eq!(receiver.recv().unwrap(), 2);
        timers.stop();
        thread.join().unwrap();
    }
}

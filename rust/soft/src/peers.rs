//! What a VM's threads know of each of its vCPUs: how to make it look up, wake it, stop it.
//!
//! # Sleeping without losing a wake-up
//! A vCPU with nothing to do says `sleeping`, looks at its attention bits once more and then waits
//! on the condition variable; whoever raises a bit looks at `sleeping` afterwards. Both sides store
//! first and load second, sequentially consistent, so at least one of them sees the other; the
//! mutex closes the gap between the last look and the wait.

use crate::clock::{lock, monotonic_ns, GuestTsc, VmClock};
use crate::cpu::{attention, Shared};
use crate::irqchip;
use crate::mem::SlotMap;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// How long to wait for a vCPU to notice; only a host that does not schedule it takes that long.
const PATIENCE: Duration = Duration::from_secs(10);

/// One vCPU as others see it.
pub(crate) struct Peer {
    /// Its id, also its APIC ID.
    pub id: u32,
    /// The interpreter's side of it.
    pub shared: Arc<Shared>,
    /// Its time-stamp counter.
    pub tsc: GuestTsc,
    /// `kick` was called and no `run` has returned EINTR for it yet.
    kicked: AtomicBool,
    /// kvmclock must be published anew.
    pub clock_stale: AtomicBool,
    /// Another vCPU's hypercall ends this one's halt.
    pub unhalted: AtomicBool,
    sleeping: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
}

impl Peer {
    /// A vCPU that has not run yet.
    pub fn new(id: u32, clock: &VmClock) -> Arc<Self> {
        Arc::new(Self {
            id,
            shared: Arc::default(),
            tsc: clock.guest_tsc(),
            kicked: AtomicBool::new(false),
            clock_stale: AtomicBool::new(false),
            unhalted: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        })
    }

    /// Raises attention bits and wakes the vCPU if it sleeps.
    pub fn raise(&self, bits: u32) {
        self.shared.raise(bits);
        if self.sleeping.load(SeqCst) {
            drop(lock(&self.sleep));
            self.wake.notify_all();
        }
    }

    /// Makes `run` return EINTR: the running one or the next.
    pub fn kick(&self) {
        self.kicked.store(true, SeqCst);
        self.raise(attention::KICK);
    }

    /// Lets the vCPU's thread look at what is asked of it (`kicked` and the flags above).
    pub fn look_up(&self) {
        self.raise(attention::KICK);
    }

    /// The vCPU's thread: takes a kick. What is raised after this is seen by the interpreter.
    pub fn take_kick(&self) -> bool {
        self.shared.attention.fetch_and(!attention::KICK, SeqCst);
        self.kicked.swap(false, SeqCst)
    }

    /// Whether a kick waits.
    pub fn kick_waits(&self) -> bool {
        self.kicked.load(SeqCst)
    }

    /// The vCPU's thread is in guest code until the result is dropped.
    pub fn inside(&self) -> Inside<'_> {
        self.set_in_guest(true);
        Inside(self)
    }

    /// Whether the vCPU's thread is in guest code.
    pub fn is_inside(&self) -> bool {
        self.shared.in_guest.load(SeqCst)
    }

    /// The vCPU's thread enters guest code or leaves it. Memory may change under a vCPU that is
    /// outside; coming in, it looks at its attention bits before it touches any.
    fn set_in_guest(&self, inside: bool) {
        self.shared.in_guest.store(inside, SeqCst);
    }

    /// The vCPU's thread: sleeps until one of `bits` is raised, or as long as its `patience` lasts; whether one is. It
    /// counts as outside of the guest.
    pub fn sleep_until(&self, bits: u32, patience: Option<Duration>) -> bool {
        let raised = || self.shared.attention.load(SeqCst) & bits != 0;
        self.set_in_guest(false);
        let guard = lock(&self.sleep);
        self.sleeping.store(true, SeqCst);
        let guard = match patience {
            None => self.wake.wait_while(guard, |()| !raised()).unwrap_or_else(PoisonError::into_inner),
            Some(patience) => {
                let waited = self.wake.wait_timeout_while(guard, patience, |()| !raised());
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
        };
        self.sleeping.store(false, SeqCst);
        drop(guard);
        self.set_in_guest(true);
        raised()
    }

    /// Waits until the vCPU has acted on `bit` or is outside of the guest. `false` when it does not.
    fn acted_on(&self, bit: u32) -> bool {
        let pending = || self.shared.in_guest.load(SeqCst) && self.shared.attention.load(SeqCst) & bit != 0;
        for _ in 0..200 {
            if !pending() {
                return true;
            }
            std::hint::spin_loop();
        }
        let begun = Instant::now();
        while pending() {
            if begun.elapsed() > PATIENCE {
                return false;
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        true
    }
}

/// See [`Peer::inside`]. Dropped on a panic too, or slot changes would wait for this vCPU.
pub(crate) struct Inside<'a>(&'a Peer);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.set_in_guest(false);
    }
}

/// All vCPUs of a VM.
pub(crate) struct Peers {
    list: RwLock<Vec<Arc<Peer>>>,
    host_khz: u32,
}

impl Peers {
    /// None yet.
    pub fn new(host_khz: u32) -> Arc<Self> {
        Arc::new(Self { list: RwLock::default(), host_khz })
    }

    /// Adds one; `false` when its id is taken.
    pub fn add(&self, peer: Arc<Peer>) -> bool {
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        let free = list.iter().all(|other| other.id != peer.id);
        if free {
            list.push(peer);
        }
        free
    }

    /// Takes back what `add` added.
    pub fn remove(&self, id: u32) {
        self.list.write().unwrap_or_else(PoisonError::into_inner).retain(|peer| peer.id != id);
    }

    /// Calls `each` on every vCPU.
    pub fn for_each(&self, mut each: impl FnMut(&Peer)) {
        self.list.read().unwrap_or_else(PoisonError::into_inner).iter().for_each(|peer| each(peer));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The vCPU of that id.
    pub fn with<R>(&self, id: u32, each: impl FnOnce(&Peer) -> R) -> Option<R> {
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        let peer = match list.get(id as usize) {
            Some(peer) if peer.id == id => Some(peer),
            _ => list.iter().find(|peer| peer.id == id),
        };
        peer.map(|peer| each(peer))
    }

    /// Hands every vCPU a new slot map and waits until none uses an older one.
    pub fn publish_slots(&self, map: &Arc<SlotMap>) -> bool {
        self.for_each(|peer| {
            // Under the lock that the vCPU clears the bit under.
            let mut published = lock(&peer.shared.new_slots);
            *published = Some(map.clone());
            peer.shared.raise(attention::SLOTS);
        });
        self.all_acted_on(attention::SLOTS)
    }

    /// Makes every vCPU forget its write translations, and waits until all have.
    pub fn drop_write_translations(&self) -> bool {
        self.for_each(|peer| peer.shared.raise(attention::WRITES));
        self.all_acted_on(attention::WRITES)
    }

    fn all_acted_on(&self, bit: u32) -> bool {
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner).clone();
        list.iter().all(|peer| peer.acted_on(bit))
    }

    /// vCPU `from` stored into code: the others look for theirs anew.
    pub fn code_changed(&self, from: u32) {
        self.for_each(|peer| {
            if peer.id != from {
                peer.shared.raise(attention::CODE);
            }
        });
    }

    /// vCPU `from` found code on the page at `gpa`: every other one must stop storing to it
    /// unnoticed. One that is outside forgets all write translations when it comes in; one that is
    /// inside may have stored since, and is told the page; until it has acted on that it may go on
    /// storing, which the result says.
    pub fn code_found(&self, from: u32, gpa: u64) -> bool {
        let mut told = false;
        self.for_each(|peer| {
            if peer.id == from {
                return;
            }
            peer.shared.raise(attention::WRITES);
            if peer.shared.in_guest.load(SeqCst) {
                lock(&peer.shared.code_pages).push(gpa);
                peer.shared.raise(attention::WRITES);
                told = true;
            }
        });
        told
    }

    /// Whether every vCPU but `from` has acted on what [`Peers::code_found`] told it.
    pub fn code_noticed(&self, from: u32) -> bool {
        let mut all = true;
        self.for_each(|peer| {
            let waits = peer.shared.attention.load(SeqCst) & attention::WRITES != 0;
            all &= peer.id == from || !waits || !peer.shared.in_guest.load(SeqCst);
        });
        all
    }
}

impl irqchip::Host for Peers {
    fn now_ns(&self) -> u64 {
        monotonic_ns()
    }

    fn guest_tsc(&self, vcpu: usize) -> u64 {
        self.with(vcpu as u32, |peer| peer.tsc.now()).unwrap_or(0)
    }

    fn tsc_khz(&self) -> u64 {
        self.with(0, |peer| peer.tsc.khz()).unwrap_or(self.host_khz) as u64
    }

    fn kick(&self, vcpu: usize) {
        self.with(vcpu as u32, |peer| peer.raise(attention::IRQ | attention::EVENT));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn test_sleep_until_wakes_for_every_raise() {
        let clock = VmClock::new(1_000_000);
        let peer = Peer::new(0, &clock);
        let (sender, receiver) = channel();
        let sleeper = peer.clone();
        let thread = std::thread::spawn(move || {
            for _ in 0..2000 {
                sleeper.sleep_until(attention::IRQ, None);
                sleeper.shared.attention.fetch_and(!attention::IRQ, SeqCst);
                sender.send(()).unwrap();
            }
        });
        for _ in 0..2000 {
            peer.raise(attention::IRQ);
            receiver.recv_timeout(Duration::from_secs(20)).expect("a wake-up was lost");
        }
        thread.join().unwrap();
    }

    #[test]
    fn test_kick_is_taken_once_and_kept_until_then() {
        let peer = Peer::new(0, &VmClock::new(1_000_000));
        peer.kick();
        assert_ne!(peer.shared.attention.load(SeqCst) & attention::KICK, 0);
        assert!(peer.take_kick());
        assert!(!peer.take_kick());
        assert_eq!(peer.shared.attention.load(SeqCst) & attention::KICK, 0);
    }

    #[test]
    fn test_publish_slots_does_not_wait_for_vcpus_outside() {
        let clock = VmClock::new(1_000_000);
        let peers = Peers::new(1_000_000);
        assert!(peers.add(Peer::new(0, &clock)));
        assert!(!peers.add(Peer::new(0, &clock)));
        assert!(peers.publish_slots(&Arc::default()));
        let waiting = peers.with(0, |peer| lock(&peer.shared.new_slots).is_some());
        assert_eq!(waiting, Some(true));
    }

    #[test]
    fn test_code_found_tells_pages_only_to_vcpus_inside() {
        let clock = VmClock::new(1_000_000);
        let peers = Peers::new(1_000_000);
        (0..3).for_each(|id| assert!(peers.add(Peer::new(id, &clock))));
        peers.with(1, |peer| peer.set_in_guest(true));
        peers.code_found(0, 0x5000);
        let told = |id| peers.with(id, |peer| lock(&peer.shared.code_pages).clone()).unwrap();
        assert_eq!((told(0), told(1), told(2)), (vec![], vec![0x5000], vec![]));
        let bits = |id| peers.with(id, |peer| peer.shared.attention.load(SeqCst)).unwrap();
        assert_eq!((bits(0), bits(2)), (0, attention::WRITES));
    }
}

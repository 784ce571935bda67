//! Lockstep: the interpreter leads a guest, and the translator follows it with memory of its own,
//! instruction by instruction. Every few thousand instructions, and whenever the guest leaves the
//! engine, all registers are compared, and now and then all of memory.
//!
//! The leader lives in the world: real time, devices, interrupts. All that comes to it from there
//! passes its board and is written down (`log.rs`); the follower is given the same answers, and its
//! events at the same moments: `(instructions retired, exceptions delivered)`. So nothing need be
//! deterministic but the processor. A moment in the middle of translated code is reached exactly
//! because code made for lockstep looks, at the start of each block, whether it may still run whole
//! (`emit.rs`); the last few instructions are the interpreter's.
//!
//! `OSTLER_ENGINE=lockstep` chooses it, for one vCPU. Devices that write guest memory are beyond it
//! (kvmclock's pages are not): it is for kernels and initrds with a console.

mod log;
mod state;
#[cfg(test)]
mod tests;

use super::run::RunEnd;
use super::translate::{Budget, HOT, MEMORY};
use super::{attention, Board, Cpu, Exit, Shared, Stop, R};
use crate::mem::{Slot, SlotMap, PAGE_SIZE};
use log::{lock, Entry, Moment, Recorder, Replayer, SharedLog};
use std::sync::atomic::Ordering::*;
use std::sync::Arc;

pub(crate) use log::Peek;

/// Instructions between two comparisons of registers.
const SLICE: u64 = 2_000;
/// Instructions between two comparisons of memory.
const MEMORY_EVERY: u64 = 25_000_000;
/// How far the follower may go beyond the leader before that is a difference: more than a block.
const GRACE: u64 = 64;
/// Blocks of the leader that a report lists.
const TRAIL: usize = 40;

/// The follower's copy of a slot.
struct Mapping {
    host: *mut u8,
    size: usize,
}

// SAFETY: plain memory of this process, used by the thread that runs the vCPU.
unsafe impl Send for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `Lockstep::take_slots`, and nobody else's.
        unsafe { libc::munmap(self.host.cast(), self.size) };
    }
}

/// What was compared.
#[derive(Default)]
struct Figures {
    from: u64,
    registers: u64,
    memory: u64,
    adopted: u64,
    events: u64,
}

/// The follower and what lies between it and the leader.
pub(crate) struct Lockstep {
    follower: Box<Cpu>,
    log: SharedLog,
    mappings: Vec<Mapping>,
    slots: Option<Arc<SlotMap>>,
    /// Exceptions that the follower has delivered.
    faults: u64,
    /// The leader is within a repeated instruction.
    again: bool,
    /// Writes that the leader has handed out since the last comparison.
    sent: Vec<Exit>,
    /// The follower, too, has to execute one instruction with the values that user space supplied.
    single: bool,
    /// Where the leader's blocks of this slice began.
    trail: Vec<u64>,
    next_memory: u64,
    failed: bool,
    figures: Figures,
}

impl Lockstep {
    /// A follower, and the board for its leader; `None` where the host has no memory for code.
    pub fn new(board: Box<dyn Board>, peek: Peek) -> Option<(Box<Self>, Box<dyn Board>)> {
        let log = SharedLog::default();
        let replayer = Box::new(Replayer { log: log.clone(), irqchip: board.has_irqchip() });
        let mut follower = Cpu::new(0, Arc::default(), Arc::new(Shared::default()), replayer);
        if !follower.use_translator(HOT, Budget::share(MEMORY, 2)) {
            return None;
        }
        follower.translator.as_mut()?.counted = true;
        let lockstep = Box::new(Self {
            follower,
            log: log.clone(),
            mappings: Vec::new(),
            slots: None,
            faults: 0,
            again: false,
            sent: Vec::new(),
            single: false,
            trail: Vec::new(),
            next_memory: 0,
            failed: false,
            figures: Figures::default(),
        });
        Some((lockstep, Box::new(Recorder { inner: board, log, peek })))
    }

    /// As [`Cpu::run`], with the follower behind.
    pub fn run(&mut self, leader: &mut Cpu) -> RunEnd {
        self.begin(leader);
        lock(&self.log).on = true;
        let end = self.lead(leader);
        lock(&self.log).on = false;
        if self.failed {
            return RunEnd::Exit(Exit::Internal("the translator and the interpreter differ"));
        }
        end
    }

    /// As [`Cpu::step`].
    pub fn step(&mut self, leader: &mut Cpu) -> Option<RunEnd> {
        self.begin(leader);
        lock(&self.log).on = true;
        let end = leader.step();
        lock(&self.log).on = false;
        let theirs = self.follower.step();
        if end.is_none() {
            self.follower.io.retire();
        }
        if end != theirs {
            self.fail(leader, &format!("one instruction ends with {end:x?}, {theirs:x?}"));
        }
        end
    }

    /// User space's answer to a read.
    pub fn complete(&mut self, value: u64) {
        self.follower.io.complete(value);
    }

    /// A posted write was handed to user space.
    pub fn handed_out(&mut self, write: Exit) {
        self.sent.push(write);
    }

    /// The host wrote these bytes of guest memory while the guest was stopped.
    pub fn host_wrote(&mut self, gpa: u64, size: usize) {
        let Some(slots) = &self.slots else { return };
        let mut bytes = vec![0; size];
        if slots.read(gpa, &mut bytes) {
            self.follower.slots.write(gpa, &bytes);
        }
    }

    // ---- the leader ------------------------------------------------------------------------

    /// Whatever user space has changed since the last run is the follower's as well.
    fn begin(&mut self, leader: &mut Cpu) {
        if self.slots.as_ref().is_none_or(|slots| !Arc::ptr_eq(slots, &leader.slots)) {
            self.take_slots(leader);
        }
        let fresh = self.figures.registers == 0;
        if fresh || !self.again && !state::differences(leader, &self.follower).is_empty() {
            state::copy(leader, &mut self.follower);
            lock(&self.log).apic_base = leader.board.msr_read(0x1b).and_then(Result::ok).unwrap_or(0);
            self.figures.adopted += 1;
            if fresh {
                self.figures.from = leader.retired;
            }
        }
        self.single |= leader.io.in_progress();
    }

    /// [`Cpu::run`] in slices.
    fn lead(&mut self, leader: &mut Cpu) -> RunEnd {
        let mut single = leader.io.in_progress();
        loop {
            // There are no events between the steps of a repeated instruction.
            let hidden = if self.again { attention::IRQ | attention::EVENT } else { 0 };
            let bits = leader.shared.attention.load(Relaxed) & !hidden;
            if bits & attention::SLOTS != 0 {
                self.catch_up(leader, None, None);
            }
            if bits != 0 || leader.halted || leader.wait_sipi || leader.pending_any() {
                if let Err(end) = leader.attend(bits, &mut single) {
                    self.catch_up(leader, None, Some(end));
                    return end;
                }
            }
            if self.slots.as_ref().is_some_and(|slots| !Arc::ptr_eq(slots, &leader.slots)) {
                self.take_slots(leader);
            }
            let result = if single { leader.step_raw() } else { self.run_slice(leader) };
            let stop = result.err();
            self.again = stop == Some(Stop::Again);
            if let Some(stop) = stop {
                lock(&self.log).faults += (stop == Stop::Fault) as u64;
                if let Some(end) = leader.settle(stop) {
                    self.catch_up(leader, Some(stop), Some(end));
                    return end;
                }
            }
            if single {
                leader.io.retire();
                single = false;
            }
            if leader.retired >= self.follower.retired + SLICE {
                self.catch_up(leader, None, None);
            }
            if self.failed {
                return RunEnd::Kicked;
            }
        }
    }

    fn run_slice(&mut self, leader: &mut Cpu) -> R {
        leader.shadow = 0;
        let size = leader.code_size;
        let until = self.follower.retired + SLICE;
        loop {
            let block = leader.find_block()?;
            self.trail.push(leader.rip);
            leader.run_block(block)?;
            let attention = leader.shared.attention.load(Relaxed) != 0;
            if attention || size != leader.code_size || leader.shadow != 0 || leader.retired >= until {
                return Ok(());
            }
        }
    }

    // ---- the follower ----------------------------------------------------------------------

    /// Brings the follower to where the leader is, and compares. `stop` is what the leader's last
    /// instruction stopped with, `end` what its run ended with.
    fn catch_up(&mut self, leader: &Cpu, stop: Option<Stop>, end: Option<RunEnd>) {
        if let Some(RunEnd::Exit(write @ (Exit::Io { write: Some(_), .. } | Exit::Mmio { write: Some(_), .. }))) = end {
            self.sent.push(write);
        }
        if self.again || self.failed {
            return;
        }
        let to = Moment { retired: leader.retired, faults: lock(&self.log).faults };
        let followed = self.follow(to, stop, end).and_then(|()| self.compare(leader));
        if let Err(difference) = followed {
            self.fail(leader, &difference);
        }
        self.trail.clear();
    }

    fn follow(&mut self, to: Moment, stop: Option<Stop>, end: Option<RunEnd>) -> Result<(), String> {
        if std::mem::take(&mut self.single) {
            let result = self.follower.step_raw();
            self.settled(result)?;
            self.follower.io.retire();
        }
        while let Some((at, bits)) = self.next_event() {
            self.advance(at)?;
            match lock(&self.log).entries.pop_front() {
                Some(Entry::Attend(..)) => {}
                _ => return Err("the leader asked its board something the follower did not".to_owned()),
            }
            self.figures.events += 1;
            self.follower.shared.attention.fetch_or(bits & attention::IRQ, SeqCst);
            if let Err(ours) = self.follower.events(bits) {
                if end != Some(ours) {
                    return Err(format!("an event's delivery ends with {ours:x?}"));
                }
            }
            self.take_memory();
        }
        match stop {
            Some(Stop::Exit | Stop::ExitAfter) => self.run_to_exit(to, end)?,
            _ => self.advance(to)?,
        }
        let log = lock(&self.log);
        match (&log.error, log.entries.is_empty()) {
            (Some(error), _) => Err(error.clone()),
            (None, false) => Err("the leader asked its board something the follower did not".to_owned()),
            _ => Ok(()),
        }
    }

    fn next_event(&self) -> Option<(Moment, u32)> {
        lock(&self.log).entries.iter().find_map(|entry| match entry {
            Entry::Attend(at, bits) => Some((*at, *bits)),
            Entry::Asked(..) => None,
        })
    }

    fn moment(&self) -> Moment {
        Moment { retired: self.follower.retired, faults: self.faults }
    }

    /// Exactly to that moment.
    fn advance(&mut self, to: Moment) -> Result<(), String> {
        while self.moment() != to {
            if self.moment() > to {
                return Err(format!("the follower is at {:?}, beyond {to:?}", self.moment()));
            }
            let result = match to.retired == self.follower.retired {
                true => self.follower.step_raw(),
                false => self.leg(to.retired),
            };
            self.settled(result)?;
        }
        Ok(())
    }

    /// On until the exit that the leader had; it may come from the midst of translated code.
    fn run_to_exit(&mut self, to: Moment, end: Option<RunEnd>) -> Result<(), String> {
        while self.follower.retired < to.retired + GRACE {
            match self.leg(to.retired + GRACE) {
                Err(Stop::Exit | Stop::ExitAfter) => {
                    self.take_memory();
                    let exit = self.follower.exit.take();
                    if self.moment() != to {
                        return Err(format!("the follower exits at {:?}, the leader at {to:?}", self.moment()));
                    }
                    return match end {
                        Some(RunEnd::Exit(theirs)) if !is_write(&theirs) && exit != Some(theirs) => {
                            Err(format!("exits {theirs:x?}, {exit:x?}"))
                        }
                        _ => Ok(()),
                    };
                }
                result => self.settled(result)?,
            }
        }
        Err(format!("no exit {end:x?} of the follower at {to:?}"))
    }

    /// Runs the follower as fast as it can, at most to `limit`.
    fn leg(&mut self, limit: u64) -> R {
        let cpu = &mut *self.follower;
        let bits = cpu.shared.attention.swap(0, SeqCst);
        if bits & attention::SINGLE != 0 && cpu.single_step_wanted() {
            cpu.shared.raise(attention::SINGLE);
            return cpu.step_raw();
        }
        if cpu.code_size != super::state::CodeSize::B64 {
            return cpu.step_raw();
        }
        let before = cpu.retired;
        cpu.native_out.limit = limit;
        cpu.run_translated()?;
        if cpu.retired == before {
            return cpu.step_raw();
        }
        Ok(())
    }

    /// After the follower has run: an exception is delivered, an exit is one too many.
    fn settled(&mut self, result: R) -> Result<(), String> {
        self.take_memory();
        match result {
            Err(Stop::Fault) => {
                self.faults += 1;
                // A fault without an end is the leader's, too: it is found in the registers.
                let _ = self.follower.settle(Stop::Fault);
                Ok(())
            }
            Err(Stop::Exit | Stop::ExitAfter) => Err(format!("an exit of the follower: {:x?}", self.follower.exit)),
            _ => Ok(()),
        }
    }

    fn take_memory(&mut self) {
        for (gpa, bytes) in std::mem::take(&mut lock(&self.log).memory) {
            self.follower.slots.write(gpa, &bytes);
        }
    }

    // ---- comparison ------------------------------------------------------------------------

    fn compare(&mut self, leader: &Cpu) -> Result<(), String> {
        self.figures.registers += 1;
        let found = state::differences(leader, &self.follower);
        if !found.is_empty() {
            return Err(found.join("\n  "));
        }
        let theirs: Vec<&Exit> = self.sent.iter().chain(&leader.io.queue).collect();
        let ours: Vec<&Exit> = self.follower.io.queue.iter().collect();
        if theirs != ours {
            return Err(format!("writes: {theirs:x?}, {ours:x?}"));
        }
        self.follower.io.queue.drain(..self.sent.len());
        self.sent.clear();
        if leader.retired >= self.next_memory {
            self.next_memory = leader.retired + MEMORY_EVERY;
            self.compare_memory()?;
        }
        Ok(())
    }

    fn compare_memory(&mut self) -> Result<(), String> {
        self.figures.memory += 1;
        let Some(slots) = &self.slots else { return Ok(()) };
        for (one, other) in slots.slots().iter().zip(self.follower.slots.slots()) {
            for page in (0..one.size).step_by(PAGE_SIZE as usize) {
                // SAFETY: both are mapped for the slot's size; the guest is stopped.
                let [a, b] = [one.host, other.host]
                    .map(|host| unsafe { std::slice::from_raw_parts(host.add(page as usize), PAGE_SIZE as usize) });
                if a != b {
                    let at = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(0) & !7;
                    let gpa = one.gpa + page + at as u64;
                    return Err(format!("memory at {gpa:#x}: {:02x?}, {:02x?}", &a[at..at + 8], &b[at..at + 8]));
                }
            }
        }
        Ok(())
    }

    #[cold]
    fn fail(&mut self, leader: &Cpu, difference: &str) {
        self.failed = true;
        let from = self.trail.len().saturating_sub(TRAIL);
        eprintln!(
            "lockstep: a difference after {} instructions; the interpreter has, the translator has:\n  {difference}\n\
             at {:#x}, {:#x}; the latest exceptions {:x?}, {:x?}\n\
             blocks of the interpreter since they were last the same: {:x?}",
            leader.retired - self.figures.from,
            leader.rip,
            self.follower.rip,
            leader.fault,
            self.follower.fault,
            &self.trail[from..]
        );
    }

    // ---- memory ----------------------------------------------------------------------------

    /// Copies of the leader's slots, contents included.
    fn take_slots(&mut self, leader: &Cpu) {
        let mut mappings = Vec::new();
        let mut copies = Vec::new();
        for slot in leader.slots.slots() {
            let size = slot.size as usize;
            let (rw, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a new anonymous mapping.
            let host = unsafe { libc::mmap(std::ptr::null_mut(), size, rw, flags, -1, 0) };
            if host == libc::MAP_FAILED {
                self.fail(leader, "no memory for the follower's copy of the guest's");
                return;
            }
            let host = host as *mut u8;
            mappings.push(Mapping { host, size });
            // SAFETY: both are mapped for the slot's size.
            unsafe { std::ptr::copy_nonoverlapping(slot.host, host, size) };
            let code = crate::mem::zeroed_words(size / PAGE_SIZE as usize);
            let (id, gpa, read_only) = (slot.id, slot.gpa, slot.read_only);
            copies.push(Arc::new(Slot { id, gpa, size: slot.size, host, read_only, dirty: None, code }));
        }
        self.follower.set_slots(Arc::new(SlotMap::new(copies)));
        self.slots = Some(leader.slots.clone());
        // The old ones may go only now.
        self.mappings = mappings;
    }
}

fn is_write(exit: &Exit) -> bool {
    matches!(exit, Exit::Io { write: Some(_), .. } | Exit::Mmio { write: Some(_), .. })
}

impl Drop for Lockstep {
    fn drop(&mut self) {
        let Figures { from, registers, memory, adopted, events } = self.figures;
        eprintln!(
            "lockstep: {} differences over {} instructions: {registers} comparisons of registers, {memory} of memory, \
             {events} events, {adopted} times user space set the registers",
            self.failed as u32,
            self.follower.retired - from
        );
    }
}

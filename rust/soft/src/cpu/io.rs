//! Port and MMIO accesses that leave the engine.
//!
//! Writes are posted: the instruction completes and the write is queued; user space sees it as an
//! exit before anything later leaves the engine. Reads stop the instruction ([`Stop::Exit`]); when
//! user space has supplied the value, the instruction is executed again from its start and finds
//! the value here. So an instruction with several reads is executed several times; since nothing
//! was changed before it completed, that is invisible.

use super::{attention, Cpu, Exit, Stop, R};
use std::collections::VecDeque;
use std::sync::atomic::Ordering::*;

/// The accesses of the instruction in progress.
#[derive(Default)]
pub struct Io {
    /// Values that user space has supplied for this instruction's reads, in order.
    done: Vec<u64>,
    /// How many of them this execution has used.
    used: usize,
    /// Writes to hand to user space.
    pub queue: VecDeque<Exit>,
}

impl Io {
    /// User space's answer to the read exit.
    pub fn complete(&mut self, value: u64) {
        self.done.push(value);
        self.used = 0;
    }

    /// The instruction is to be executed again with the values known so far.
    pub fn in_progress(&self) -> bool {
        !self.done.is_empty()
    }

    /// The instruction completed or faulted: its values are spent.
    pub fn retire(&mut self) {
        self.done.clear();
        self.used = 0;
    }

    /// One iteration of a repeated instruction is done and its registers say so: executing the instruction again
    /// starts behind it, so its values must not be taken for those of the next.
    #[inline(always)]
    pub fn retire_iteration(&mut self) {
        if self.in_progress() {
            self.retire();
        }
    }

    fn next(&mut self) -> Option<u64> {
        let value = self.done.get(self.used).copied();
        self.used += value.is_some() as usize;
        value
    }
}

impl Cpu {
    /// Reads `size` (1-8) bytes at a guest-physical address that is no RAM.
    #[cold]
    pub fn mmio_read(&mut self, gpa: u64, size: u8) -> R<u64> {
        if let Some(value) = self.board.mmio_read(gpa, size) {
            return Ok(value);
        }
        self.read_exit(Exit::Mmio { gpa, size, write: None })
    }

    /// Writes to a guest-physical address that is no RAM (or read-only).
    #[cold]
    pub fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) {
        if !self.board.mmio_write(gpa, size, value) {
            self.io.queue.push_back(Exit::Mmio { gpa, size, write: Some(value) });
            self.shared.attention.fetch_or(attention::QUEUED, Relaxed);
        }
    }

    /// IN.
    pub fn port_read(&mut self, port: u16, size: u8) -> R<u32> {
        if let Some(value) = self.board.pio_read(port, size) {
            return Ok(value);
        }
        self.read_exit(Exit::Io { port, size, write: None }).map(|value| value as u32)
    }

    /// OUT: `Ok(true)` when user space must see it: the instruction then ends with
    /// [`Stop::ExitAfter`] or, for OUTS, [`Stop::Again`] once its registers are updated.
    pub fn port_write(&mut self, port: u16, size: u8, value: u32) -> bool {
        if self.board.pio_write(port, size, value) {
            return false;
        }
        self.io.queue.push_back(Exit::Io { port, size, write: Some(value) });
        self.shared.attention.fetch_or(attention::QUEUED, Relaxed);
        true
    }

    fn read_exit(&mut self, exit: Exit) -> R<u64> {
        if let Some(value) = self.io.next() {
            return Ok(value);
        }
        self.exit = Some(exit);
        Err(Stop::Exit)
    }
}

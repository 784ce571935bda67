//! Accesses to guest memory from outside of an instruction: clocks, requests, tests.

use super::{note_store, Slot, SlotMap, PAGE_SIZE};
use std::sync::Arc;

impl SlotMap {
    /// The parts of `[gpa, gpa + size)` that lie in one page each; `None` when some is no RAM.
    fn pieces(&self, gpa: u64, size: usize) -> Option<Vec<(&Arc<Slot>, u64, usize)>> {
        let mut pieces = Vec::new();
        let mut at = gpa;
        let end = gpa.checked_add(size as u64)?;
        while at < end {
            let length = (PAGE_SIZE - at % PAGE_SIZE).min(end - at);
            pieces.push((self.find(at)?, at, length as usize));
            at += length;
        }
        Some(pieces)
    }

    /// Reads guest memory; `false` (and nothing read) when some of it is no RAM.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> bool {
        let Some(pieces) = self.pieces(gpa, into.len()) else { return false };
        let mut rest = into;
        for (slot, at, length) in pieces {
            let (part, tail) = rest.split_at_mut(length);
            // SAFETY: the piece lies within the slot, which user space keeps mapped.
            unsafe {
                let host = slot.host.add((at - slot.gpa) as usize);
                std::ptr::copy_nonoverlapping(host, part.as_mut_ptr(), length);
            }
            rest = tail;
        }
        true
    }

    /// Writes guest memory, dirty log and code notes included; `false` (and nothing written) when
    /// some of it is no RAM or read-only.
    pub fn write(&self, gpa: u64, from: &[u8]) -> bool {
        let Some(pieces) = self.pieces(gpa, from.len()) else { return false };
        if pieces.iter().any(|(slot, ..)| slot.read_only) {
            return false;
        }
        let mut rest = from;
        for (slot, at, length) in pieces {
            let (part, tail) = rest.split_at(length);
            slot.mark_dirty(at);
            // SAFETY: as read(); the slot is writable.
            unsafe {
                let host = slot.host.add((at - slot.gpa) as usize);
                std::ptr::copy_nonoverlapping(part.as_ptr(), host, length);
            }
            note_store(slot.code_word(at), at % PAGE_SIZE, length as u64);
            rest = tail;
        }
        true
    }

    /// The host changed `[gpa, gpa + size)`: code decoded from there is stale.
    pub fn invalidate(&self, gpa: u64, size: u64) -> bool {
        let mut any = false;
        let end = gpa.saturating_add(size);
        for slot in self.slots() {
            let (mut at, last) = (gpa.max(slot.gpa), end.min(slot.gpa + slot.size));
            while at < last {
                let length = (PAGE_SIZE - at % PAGE_SIZE).min(last - at);
                any |= note_store(slot.code_word(at), at % PAGE_SIZE, length);
                at += length;
            }
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::super::{granules, zeroed_words};
    use super::*;
    use std::sync::atomic::Ordering::*;

    fn map(memory: &mut [u64], read_only: bool) -> SlotMap {
        let size = memory.len() as u64 * 8;
        let slot = Slot {
            id: 0,
            gpa: 0x1_0000,
            size,
            host: memory.as_mut_ptr() as *mut u8,
            read_only,
            dirty: Some(zeroed_words(1)),
            code: zeroed_words((size / PAGE_SIZE) as usize),
        };
        SlotMap::new(vec![Arc::new(slot)])
    }

    #[test]
    fn test_write_across_pages_is_logged_in_both_and_read_back() {
        let mut memory = vec![0; 1024];
        let map = map(&mut memory, false);
        assert!(map.write(0x1_0ffe, &[1, 2, 3, 4]));
        let mut back = [0; 4];
        assert!(map.read(0x1_0ffe, &mut back));
        assert_eq!(back, [1, 2, 3, 4]);
        assert_eq!(map.slots()[0].dirty.as_ref().unwrap()[0].load(Relaxed), 3);
    }

    #[test]
    fn test_write_outside_or_read_only_changes_nothing() {
        let mut memory = vec![0; 512];
        assert!(!map(&mut memory, false).write(0x1_0ffe, &[1, 2, 3, 4]));
        assert!(!map(&mut memory, true).write(0x1_0000, &[1]));
        assert!(!map(&mut memory, false).read(u64::MAX, &mut [0; 2]));
        assert_eq!(memory[511], 0);
    }

    #[test]
    fn test_invalidate_bumps_the_generation_of_code_in_range_only() {
        let mut memory = vec![0; 1024];
        let map = map(&mut memory, false);
        let words = &map.slots()[0].code;
        words[0].store(granules(0, 16), Relaxed);
        words[1].store(granules(0, 16), Relaxed);
        map.invalidate(0x1_1000, u64::MAX);
        assert_eq!(words[0].load(Relaxed) >> 32, 0);
        assert_eq!(words[1].load(Relaxed), 1 << 32);
    }
}

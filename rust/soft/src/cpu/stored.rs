//! Stores that no write translation lets through: they may be to code.
//!
//! Such a store counts twice. Before it, so that the block it is part of ends there; and once its bytes are in
//! memory, because another vCPU may have decoded the old ones in between, under the generation that the first
//! count began. That vCPU says first that there is code and reads afterwards; here the bytes come first and the
//! look at what is said of the page afterwards. So at least one of the two sees the other.

use super::Cpu;
use crate::mem::note_store;
use std::sync::atomic::{fence, AtomicU64, Ordering::SeqCst};

/// A store whose bytes are not in memory yet, or not counted since.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unsettled {
    /// The page's code word; null: a write translation let the store through, or all is settled.
    word: *const AtomicU64,
    offset: u64,
    size: u64,
}

impl Unsettled {
    /// Nothing to be counted.
    pub const NONE: Self = Self { word: std::ptr::null(), offset: 0, size: 0 };

    /// A store of `size` bytes at page offset `offset`.
    pub fn new(word: &AtomicU64, offset: u64, size: u64) -> Self {
        Self { word, offset, size }
    }
}

impl Cpu {
    /// The store that was prepared last is in memory.
    #[inline(always)]
    pub(crate) fn settle_store(&mut self) {
        if !self.unsettled.word.is_null() {
            let store = std::mem::replace(&mut self.unsettled, Unsettled::NONE);
            self.settle_earlier_store(store);
        }
    }

    /// A store that [`Cpu::settle_store`] does not know any more, as another was prepared since, is in memory.
    #[inline(never)]
    pub(crate) fn settle_earlier_store(&mut self, store: Unsettled) {
        fence(SeqCst);
        // SAFETY: the word belongs to a slot of the map this vCPU holds, within one instruction.
        let word = unsafe { store.word.as_ref() };
        if word.is_some_and(|word| note_store(word, store.offset, store.size)) {
            self.code_changed();
            self.board.code_changed();
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::cpu::state::seg;
    use crate::cpu::testing::Bench;
    use crate::mem::granules;
    use std::sync::atomic::Ordering::SeqCst;

    const PAGE: u64 = 0x2_0000;

    /// A vCPU that has found code at page offset `offset`, as this one's memory shows it; gives the page's generation.
    fn decoded(bench: &Bench, offset: u64) -> u64 {
        let word = bench.cpu.slots.find(PAGE).map(|slot| slot.code_word(PAGE));
        word.map_or(0, |word| word.fetch_or(granules(offset, 16), SeqCst) >> 32)
    }

    /// There is code on the page, behind what the tests store to: no write translation lets their stores through.
    fn bench() -> Bench {
        let bench = Bench::new(1 << 20).long_mode(0x1_0000, false);
        decoded(&bench, 0x800);
        bench
    }

    #[test]
    fn test_code_decoded_while_a_bulk_store_is_under_way_is_stale_after_it() {
        let mut bench = bench();
        let host = bench.cpu.bulk_write_ptr(PAGE, 64, seg::ES).unwrap().unwrap();
        let between = decoded(&bench, 0);
        // SAFETY: 64 bytes of the bench's memory.
        unsafe { std::ptr::write_bytes(host, 0x90, 64) };
        bench.cpu.settle_store();
        assert_eq!(decoded(&bench, 0), between + 1);
    }

    #[test]
    fn test_code_decoded_while_a_locked_store_is_under_way_is_stale_after_it() {
        let mut bench = bench();
        let mut between = 0;
        let slots = bench.cpu.slots.clone();
        let word = slots.find(PAGE).unwrap().code_word(PAGE);
        let change = |old: u32, _: &mut u16| {
            between = word.fetch_or(granules(0, 16), SeqCst) >> 32;
            old + 1
        };
        bench.cpu.atomic_rmw(PAGE, seg::DS, change).unwrap();
        assert_eq!(decoded(&bench, 0), between + 1);
    }

    #[test]
    fn test_store_beside_code_leaves_it_alone() {
        let mut bench = bench();
        let before = decoded(&bench, 0x400);
        bench.cpu.wr(PAGE, 1u64, seg::DS).unwrap();
        assert_eq!(decoded(&bench, 0x400), before);
    }
}

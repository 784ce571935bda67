//! Guest-physical memory: the slots user space registered, their dirty logs, and which of their
//! pages hold decoded code.
//!
//! A [`SlotMap`] is immutable; changing a slot publishes a new one (`vm.rs` makes every vCPU
//! notice). Each page carries one `AtomicU64`: the low half is a bitmap of its 128-byte granules
//! that hold decoded instructions, the high half a generation that a store into such a granule
//! increments. A decoded block is valid while its page's generation is the one it was made under:
//! this is how self- and cross-modifying code is noticed without any lock (engine brief, pitfalls
//! 4 and 5: by physical address, at 128-byte grain).

mod copy;

use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::Arc;

/// Bytes per page.
pub const PAGE_SIZE: u64 = 4096;
/// log2 of a code granule.
const GRANULE_SHIFT: u64 = 7;

/// One memory slot (`kvm_userspace_memory_region`).
pub struct Slot {
    /// The slot's number.
    pub id: u32,
    /// First guest-physical address, page aligned.
    pub gpa: u64,
    /// Bytes, a multiple of the page size.
    pub size: u64,
    /// Host address of the first byte. User space keeps it mapped while the slot exists.
    pub host: *mut u8,
    /// Guest writes leave as MMIO exits (`KVM_MEM_READONLY`).
    pub read_only: bool,
    /// One bit per page, present with `KVM_MEM_LOG_DIRTY_PAGES`.
    pub dirty: Option<Arc<[AtomicU64]>>,
    /// One word per page: code granules and generation. Kept across flag changes of a slot.
    pub code: Arc<[AtomicU64]>,
}

// SAFETY: `host` is plain guest memory, shared between vCPU threads by design; all accesses go
// through volatile or atomic operations.
unsafe impl Send for Slot {}
// SAFETY: as above.
unsafe impl Sync for Slot {}

/// A zeroed shared array of atomics; the allocator hands out untouched zero pages for large ones.
pub fn zeroed_words(count: usize) -> Arc<[AtomicU64]> {
    let words: Arc<[std::mem::MaybeUninit<AtomicU64>]> = Arc::new_zeroed_slice(count);
    // SAFETY: an all-zero AtomicU64 is valid.
    unsafe { words.assume_init() }
}

impl Slot {
    /// Words of a dirty bitmap for this slot.
    pub fn bitmap_words(size: u64) -> usize {
        (size / PAGE_SIZE).div_ceil(64) as usize
    }

    /// Records a write to `gpa`'s page in the dirty log.
    #[inline]
    pub fn mark_dirty(&self, gpa: u64) {
        if let Some(log) = &self.dirty {
            let page = (gpa - self.gpa) / PAGE_SIZE;
            let bit = 1u64 << (page % 64);
            let word = &log[(page / 64) as usize];
            if word.load(Relaxed) & bit == 0 {
                word.fetch_or(bit, AcqRel);
            }
        }
    }

    /// The code word of `gpa`'s page.
    #[inline]
    pub fn code_word(&self, gpa: u64) -> &AtomicU64 {
        &self.code[((gpa - self.gpa) / PAGE_SIZE) as usize]
    }
}

/// The bitmap of code granules that `[offset, offset + size)` of a page touches.
#[inline]
pub fn granules(offset: u64, size: u64) -> u64 {
    let first = (offset & 0xfff) >> GRANULE_SHIFT;
    let last = (((offset & 0xfff) + size.max(1) - 1) >> GRANULE_SHIFT).min(31);
    (u64::MAX >> (63 - last)) & (u64::MAX << first) & 0xffff_ffff
}

/// Notes a store of `size` bytes at page offset `offset`: if it meets decoded code, the page's
/// generation changes and all its blocks are stale. Returns whether it did.
#[inline]
pub fn note_store(word: &AtomicU64, offset: u64, size: u64) -> bool {
    let mut now = word.load(Acquire);
    loop {
        if now & granules(offset, size) == 0 {
            return false;
        }
        let next = ((now >> 32) + 1) << 32;
        match word.compare_exchange_weak(now, next, AcqRel, Acquire) {
            Ok(_) => return true,
            Err(seen) => now = seen,
        }
    }
}

/// All slots of a VM at one moment, ordered by address.
#[derive(Default)]
pub struct SlotMap {
    slots: Vec<Arc<Slot>>,
}

impl SlotMap {
    /// A map of these slots; they must not overlap.
    pub fn new(mut slots: Vec<Arc<Slot>>) -> Self {
        slots.sort_by_key(|slot| slot.gpa);
        Self { slots }
    }

    /// The slots by ascending address.
    pub fn slots(&self) -> &[Arc<Slot>] {
        &self.slots
    }

    /// The slot that holds `gpa`.
    #[inline]
    pub fn find(&self, gpa: u64) -> Option<&Arc<Slot>> {
        self.slots.iter().find(|slot| gpa.wrapping_sub(slot.gpa) < slot.size)
    }

    /// The host address of `gpa`, when it is RAM.
    #[inline]
    pub fn host(&self, gpa: u64) -> Option<*mut u8> {
        let slot = self.find(gpa)?;
        // SAFETY: gpa lies within the slot, so the offset is within its mapping.
        Some(unsafe { slot.host.add((gpa - slot.gpa) as usize) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_granules_cover_exactly_the_touched_bytes() {
        assert_eq!(granules(0, 1), 1);
        assert_eq!(granules(127, 1), 1);
        assert_eq!(granules(127, 2), 3);
        assert_eq!(granules(4095, 1), 1 << 31);
        assert_eq!(granules(0, 4096), 0xffff_ffff);
        assert_eq!(granules(4090, 100), 1 << 31);
    }

    #[test]
    fn test_note_store_bumps_generation_only_on_code() {
        let word = AtomicU64::new(granules(0x100, 4));
        assert!(!note_store(&word, 0x800, 8));
        assert!(note_store(&word, 0x102, 1));
        assert_eq!(word.load(Relaxed), 1 << 32);
    }
}

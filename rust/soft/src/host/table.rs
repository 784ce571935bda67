//! Tables that take memory only where they were written: a host mapping that reads as zeroes until then, and again
//! after [`Table::reset`]. An entry of zeroes must be a good value of its type.

use std::alloc::{handle_alloc_error, Layout};
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

/// `count` entries that do not move. For types that any bytes of zero are a value of.
pub(crate) struct Table<T: Copy> {
    start: NonNull<T>,
    count: usize,
}

// SAFETY: the mapping is plain memory owned by this value.
unsafe impl<T: Copy + Send> Send for Table<T> {}

impl<T: Copy> Table<T> {
    /// All zeroes; `None` where the host has no memory.
    ///
    /// # Safety
    /// Zeroes are a valid `T`.
    pub unsafe fn new(count: usize) -> Option<Self> {
        // SAFETY: the caller's promise.
        unsafe { Self::map(count, 0) }
    }

    /// The same, below 2 GiB, where code finds it by a displacement alone.
    ///
    /// # Safety
    /// Zeroes are a valid `T`.
    pub unsafe fn low(count: usize) -> Option<Self> {
        // SAFETY: the caller's promise.
        unsafe { Self::map(count, libc::MAP_32BIT) }
    }

    /// As [`Table::new`]; where the host has no memory, the process ends as by its allocator.
    ///
    /// # Safety
    /// Zeroes are a valid `T`.
    pub unsafe fn always(count: usize) -> Self {
        // SAFETY: the caller's promise.
        let made = unsafe { Self::new(count) };
        made.unwrap_or_else(|| handle_alloc_error(Layout::array::<T>(count).unwrap_or(Layout::new::<T>())))
    }

    unsafe fn map(count: usize, where_to: i32) -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | where_to;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address the kernel chooses replaces nothing.
        let start = unsafe { libc::mmap(ptr::null_mut(), count * size_of::<T>(), protection, flags, -1, 0) };
        let start = NonNull::new(start.cast::<T>()).filter(|_| start != libc::MAP_FAILED)?;
        // Pages of the host's, not 2 MiB of them, for an entry.
        // SAFETY: the mapping is this value's own.
        unsafe { libc::madvise(start.as_ptr().cast(), count * size_of::<T>(), libc::MADV_NOHUGEPAGE) };
        Some(Self { start, count })
    }

    /// All zeroes again; the memory goes back to the host.
    pub fn reset(&mut self) {
        let size = self.count * size_of::<T>();
        // SAFETY: the mapping is this value's own, private and anonymous: its pages read as zeroes from here on.
        if unsafe { libc::madvise(self.start.as_ptr().cast(), size, libc::MADV_DONTNEED) } != 0 {
            // SAFETY: as above.
            unsafe { ptr::write_bytes(self.start.as_ptr(), 0, self.count) };
        }
    }
}

impl<T: Copy> Deref for Table<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: the mapping has so many, and whoever made it vouched for zeroes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl<T: Copy> DerefMut for Table<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.count) }
    }
}

impl<T: Copy> Drop for Table<T> {
    fn drop(&mut self) {
        // SAFETY: as in `reset`; nobody has a reference any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * size_of::<T>()) };
    }
}

/// Gives the host back what the process has freed.
pub(crate) fn give_back() {
    // SAFETY: no memory in use is touched.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_table_reset_reads_as_zeroes_and_stays_where_it_is() {
        // SAFETY: zero is a u64.
        let mut table = unsafe { Table::<u64>::new(5000) }.expect("memory");
        let before = table.as_ptr();
        table[0] = 1;
        table[4999] = 2;

        table.reset();

        assert!(table.iter().all(|&entry| entry == 0));
        assert_eq!((table.len(), table.as_ptr()), (5000, before));
    }
}

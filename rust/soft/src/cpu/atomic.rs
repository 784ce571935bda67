//! Locked read-modify-write accesses.
//!
//! Within a cache line they are the host's own LOCK CMPXCHG, so they are atomic against every
//! vCPU thread and against devices. Accesses that cross a line or a page are rare; they take a
//! lock of the process and are atomic among themselves only (Linux makes none).

use super::access::{load, store, Int};
use super::{Cpu, R};
use std::arch::asm;
use std::sync::Mutex;

static SPLIT: Mutex<()> = Mutex::new(());

macro_rules! cmpxchg {
    ($name:ident, $t:ty, $class:ident, $m:literal, $acc:tt) => {
        #[inline(always)]
        unsafe fn $name(at: *mut u8, old: $t, new: $t) -> ($t, bool) {
            let seen: $t;
            let ok: u8;
            // SAFETY: the caller vouches for the bytes.
            unsafe {
                asm!(concat!("lock cmpxchg [{p}], {n:", $m, "}"), "sete {ok}",
                     p = in(reg) at, n = in($class) new, ok = out(reg_byte) ok,
                     inout($acc) old => seen, options(nostack));
            }
            (seen, ok != 0)
        }
    };
}
cmpxchg!(cmpxchg16, u16, reg, "x", "ax");
cmpxchg!(cmpxchg32, u32, reg, "e", "eax");
cmpxchg!(cmpxchg64, u64, reg, "r", "rax");

#[inline(always)]
unsafe fn cmpxchg8(at: *mut u8, old: u8, new: u8) -> (u8, bool) {
    let seen: u8;
    let ok: u8;
    // SAFETY: the caller vouches for the byte.
    unsafe {
        asm!("lock cmpxchg [{p}], {n}", "sete {ok}", p = in(reg) at, n = in(reg_byte) new,
             ok = out(reg_byte) ok, inout("al") old => seen, options(nostack));
    }
    (seen, ok != 0)
}

/// Compare-and-exchange of 1, 2, 4 or 8 bytes at any alignment within a cache line.
///
/// # Safety
/// `at` points to `T::SIZE` writable bytes of guest memory.
#[inline(always)]
pub unsafe fn compare_exchange<T: Int>(at: *mut u8, old: T, new: T) -> Result<T, T> {
    let (old, new) = (old.to_u64(), new.to_u64());
    // SAFETY: as this function's contract.
    let (seen, ok) = unsafe {
        match T::SIZE {
            1 => widen(cmpxchg8(at, old as u8, new as u8)),
            2 => widen(cmpxchg16(at, old as u16, new as u16)),
            4 => widen(cmpxchg32(at, old as u32, new as u32)),
            _ => cmpxchg64(at, old, new),
        }
    };
    if ok {
        Ok(T::from_u64(seen))
    } else {
        Err(T::from_u64(seen))
    }
}

#[inline(always)]
fn widen<T: Into<u64>>((seen, ok): (T, bool)) -> (u64, bool) {
    (seen.into(), ok)
}

impl Cpu {
    /// Atomic read-modify-write with flags: gives the old value. `change` may run several times.
    #[inline(always)]
    pub fn atomic_rmw<T: Int>(
        &mut self,
        linear: u64,
        segment: usize,
        mut change: impl FnMut(T, &mut u16) -> T,
    ) -> R<T> {
        let before = self.flags;
        let host = self.atomic_ptr(linear, T::SIZE as u64, segment)?;
        let Some(host) = host.filter(|&host| host as usize & 63 <= 64 - T::SIZE) else {
            return self.split_rmw(linear, segment, change);
        };
        // SAFETY: atomic_ptr() vouches for the bytes.
        let mut old = unsafe { load::<T>(host) };
        loop {
            let mut flags = before;
            let new = change(old, &mut flags);
            // SAFETY: as above.
            match unsafe { compare_exchange(host, old, new) } {
                Ok(_) => {
                    self.settle_store();
                    self.flags = flags;
                    return Ok(old);
                }
                Err(seen) => old = seen,
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn split_rmw<T: Int>(&mut self, linear: u64, segment: usize, mut change: impl FnMut(T, &mut u16) -> T) -> R<T> {
        self.probe_write(linear, T::SIZE as u64, segment)?;
        let guard = SPLIT.lock();
        let old = T::from_u64(self.rd_slow(linear, T::SIZE, segment)?);
        let mut flags = self.flags;
        let new = change(old, &mut flags);
        self.wr_slow(linear, new.to_u64(), T::SIZE, segment)?;
        drop(guard);
        self.flags = flags;
        Ok(old)
    }

    /// CMPXCHG16B's or CMPXCHG8B's memory part: gives the old value and whether it was exchanged.
    pub fn atomic_pair<T: Int>(&mut self, linear: u64, segment: usize, old: [T; 2], new: [T; 2]) -> R<([T; 2], bool)> {
        let size = 2 * T::SIZE as u64;
        match self.atomic_ptr(linear, size, segment)? {
            Some(host) if T::SIZE == 8 && host as usize & 15 == 0 => {
                let (seen, ok) =
                    // SAFETY: 16 aligned bytes, vouched for by atomic_ptr().
                    unsafe { cmpxchg16b(host, [old[0].to_u64(), old[1].to_u64()], [new[0].to_u64(), new[1].to_u64()]) };
                self.settle_store();
                Ok((seen.map(T::from_u64), ok))
            }
            Some(host) if T::SIZE == 4 && host as usize & 63 <= 56 => {
                let join = |pair: [T; 2]| pair[0].to_u64() | pair[1].to_u64() << 32;
                // SAFETY: 8 bytes, vouched for by atomic_ptr().
                let (seen, ok) = unsafe { cmpxchg64(host, join(old), join(new)) };
                self.settle_store();
                Ok(([T::from_u64(seen), T::from_u64(seen >> 32)], ok))
            }
            place => self.split_pair(place, linear, segment, old, new),
        }
    }

    #[cold]
    fn split_pair<T: Int>(
        &mut self,
        place: Option<*mut u8>,
        linear: u64,
        segment: usize,
        old: [T; 2],
        new: [T; 2],
    ) -> R<([T; 2], bool)> {
        let _guard = SPLIT.lock();
        let half = T::SIZE as u64;
        let seen = match place {
            // SAFETY: atomic_ptr() vouches for both halves.
            Some(host) => unsafe { [load::<T>(host), load::<T>(host.add(T::SIZE))] },
            None => [self.rd::<T>(linear, segment)?, self.rd::<T>(linear.wrapping_add(half), segment)?],
        };
        let ok = seen == old;
        let value = if ok { new } else { seen };
        match place {
            // SAFETY: as above.
            Some(host) => unsafe {
                store(host, value[0]);
                store(host.add(T::SIZE), value[1]);
                self.settle_store();
            },
            None => {
                self.wr(linear, value[0], segment)?;
                self.wr(linear.wrapping_add(half), value[1], segment)?;
            }
        }
        Ok((seen, ok))
    }
}

unsafe fn cmpxchg16b(at: *mut u8, old: [u64; 2], new: [u64; 2]) -> ([u64; 2], bool) {
    let (low, high, ok): (u64, u64, u8);
    // SAFETY: the caller vouches for 16 aligned bytes; RBX is saved around, as LLVM reserves it.
    unsafe {
        asm!("xchg {b}, rbx", "lock cmpxchg16b [{p}]", "sete {ok}", "mov rbx, {b}",
             b = inout(reg) new[0] => _, p = in(reg) at, ok = out(reg_byte) ok, in("rcx") new[1],
             inout("rax") old[0] => low, inout("rdx") old[1] => high, options(nostack));
    }
    ([low, high], ok != 0)
}

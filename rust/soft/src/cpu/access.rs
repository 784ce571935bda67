//! Guest memory accesses of instruction handlers, by linear address.
//!
//! Fast paths compare one tag; slow paths walk, split page-crossing accesses, reach MMIO, keep the
//! dirty log and notice stores to code. A store that crosses a page checks both pages first, so
//! that a fault leaves nothing half written (pitfall 8).

use super::mmu::canonical;
use super::op::Op;
use super::stored::Unsettled;
use super::walk::Page;
use super::{vector, Cpu, R};
use crate::mem::{note_store, PAGE_SIZE};

/// An operand type: u8, u16, u32, u64.
pub trait Int: Copy + Eq + Ord + 'static {
    /// Bytes.
    const SIZE: usize;
    /// Bits.
    const BITS: u32;
    /// Truncates.
    fn from_u64(value: u64) -> Self;
    /// Zero-extends.
    fn to_u64(self) -> u64;
    /// Sign-extends.
    fn to_i64(self) -> i64;
}

macro_rules! int {
    ($unsigned:ty, $signed:ty) => {
        impl Int for $unsigned {
            const SIZE: usize = std::mem::size_of::<$unsigned>();
            const BITS: u32 = <$unsigned>::BITS;
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $unsigned
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn to_i64(self) -> i64 {
                self as $signed as i64
            }
        }
    };
}
int!(u8, i8);
int!(u16, i16);
int!(u32, i32);
int!(u64, i64);

/// Guest memory has no alignment; volatile keeps each access one access.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub(crate) struct Unaligned<T>(pub(crate) T);

#[inline(always)]
pub(crate) unsafe fn load<T: Int>(host: *const u8) -> T {
    // SAFETY: the caller vouches for SIZE readable bytes.
    unsafe { std::ptr::read_volatile(host as *const Unaligned<T>).0 }
}

#[inline(always)]
pub(crate) unsafe fn store<T: Int>(host: *mut u8, value: T) {
    // SAFETY: the caller vouches for SIZE writable bytes.
    unsafe { std::ptr::write_volatile(host as *mut Unaligned<T>, Unaligned(value)) }
}

/// Where one page's part of an access lies.
#[derive(Clone, Copy)]
enum Place {
    Ram(*mut u8),
    Mmio(u64),
}

impl Cpu {
    /// Loads from a linear address; `segment` decides between #GP and #SS when it is not canonical.
    #[inline(always)]
    pub fn rd<T: Int>(&mut self, linear: u64, segment: usize) -> R<T> {
        let tag = self.tag(linear, T::SIZE as u64);
        let entry = self.entry(linear);
        if entry.r == tag {
            let host = (linear as usize).wrapping_add(entry.addend) as *const u8;
            // SAFETY: the tag matched: the bytes lie in one page of a live slot.
            return Ok(unsafe { load(host) });
        }
        self.rd_slow(linear, T::SIZE, segment).map(T::from_u64)
    }

    /// Stores to a linear address.
    #[inline(always)]
    pub fn wr<T: Int>(&mut self, linear: u64, value: T, segment: usize) -> R {
        let tag = self.tag(linear, T::SIZE as u64);
        let entry = self.entry(linear);
        if entry.w == tag {
            let host = (linear as usize).wrapping_add(entry.addend) as *mut u8;
            // SAFETY: as rd().
            unsafe { store(host, value) };
            return Ok(());
        }
        self.wr_slow(linear, value.to_u64(), T::SIZE, segment)
    }

    /// The memory operand of `op`.
    #[inline(always)]
    pub fn rd_op<T: Int>(&mut self, op: &Op) -> R<T> {
        let linear = self.lin(op, T::SIZE as u64, false)?;
        self.rd(linear, op.seg())
    }

    /// Stores to the memory operand of `op`.
    #[inline(always)]
    pub fn wr_op<T: Int>(&mut self, op: &Op, value: T) -> R {
        let linear = self.lin(op, T::SIZE as u64, true)?;
        self.wr(linear, value, op.seg())
    }

    /// Read-modify-write, not atomic: `change` gets the old value and gives the new one; it runs
    /// only when neither access can fault any more.
    #[inline(always)]
    pub fn rmw<T: Int>(&mut self, linear: u64, segment: usize, change: impl FnOnce(&mut Self, T) -> T) -> R {
        let tag = self.tag(linear, T::SIZE as u64);
        let entry = self.entry(linear);
        if entry.w == tag {
            let host = (linear as usize).wrapping_add(entry.addend) as *mut u8;
            // SAFETY: as rd(); a page with a write tag is readable.
            unsafe {
                let new = change(self, load(host));
                store(host, new);
            }
            return Ok(());
        }
        self.probe_write(linear, T::SIZE as u64, segment)?;
        let old = T::from_u64(self.rd_slow(linear, T::SIZE, segment)?);
        let new = change(self, old);
        self.wr_slow(linear, new.to_u64(), T::SIZE, segment)
    }

    /// A host pointer for an atomic access of `size` bytes, when they lie in one page of RAM; the
    /// store is recorded (dirty log, code) in advance, and [`Cpu::settle_store`] is to follow. `None`: MMIO or
    /// crossing, checked writable.
    pub fn atomic_ptr(&mut self, linear: u64, size: u64, segment: usize) -> R<Option<*mut u8>> {
        let tag = self.tag(linear, size);
        let entry = self.entry(linear);
        if entry.w == tag {
            return Ok(Some((linear as usize).wrapping_add(entry.addend) as *mut u8));
        }
        self.check_canonical(linear, size, segment)?;
        self.check_alignment(linear, size)?;
        if (linear & 0xfff) + size > PAGE_SIZE {
            self.probe_write(linear, size, segment)?;
            return Ok(None);
        }
        match self.place(linear, size, true)? {
            Place::Ram(host) => Ok(Some(host)),
            Place::Mmio(_) => Ok(None),
        }
    }

    #[inline(always)]
    fn check_canonical(&mut self, linear: u64, size: u64, segment: usize) -> R {
        let whole = canonical(linear) && canonical(linear.wrapping_add(size - 1));
        if !self.legacy && !whole {
            return Err(self.address_fault(segment));
        }
        Ok(())
    }

    /// #AC when alignment checking is on. The fast path is off then: see `place`.
    fn check_alignment(&mut self, linear: u64, size: u64) -> R {
        if self.alignment_checked() && size.is_power_of_two() && size <= 8 && linear & (size - 1) != 0 {
            return Err(self.raise(vector::AC, Some(0)));
        }
        Ok(())
    }

    /// Loads through the slow path; the result is zero-extended.
    #[cold]
    #[inline(never)]
    pub(crate) fn rd_slow(&mut self, linear: u64, size: usize, segment: usize) -> R<u64> {
        let mut bytes = [0u8; 8];
        self.rd_bytes(linear, &mut bytes[..size], segment)?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn wr_slow(&mut self, linear: u64, value: u64, size: usize, segment: usize) -> R {
        self.wr_bytes(linear, &value.to_le_bytes()[..size], segment)
    }

    /// Loads any number of bytes (at most a page).
    pub fn rd_bytes(&mut self, linear: u64, into: &mut [u8], segment: usize) -> R {
        let size = into.len() as u64;
        self.check_canonical(linear, size, segment)?;
        self.check_alignment(linear, size)?;
        let first = (PAGE_SIZE - (linear & 0xfff)).min(size) as usize;
        let (head, tail) = into.split_at_mut(first);
        let place = self.place(linear, first as u64, false)?;
        let rest = match tail.is_empty() {
            true => None,
            false => Some(self.place(self.wrap(linear.wrapping_add(first as u64)), tail.len() as u64, false)?),
        };
        self.copy_in(place, head)?;
        match rest {
            Some(place) => self.copy_in(place, tail),
            None => Ok(()),
        }
    }

    /// Stores any number of bytes (at most a page); all or nothing.
    pub fn wr_bytes(&mut self, linear: u64, from: &[u8], segment: usize) -> R {
        let size = from.len() as u64;
        self.check_canonical(linear, size, segment)?;
        self.check_alignment(linear, size)?;
        let first = (PAGE_SIZE - (linear & 0xfff)).min(size) as usize;
        let (head, tail) = from.split_at(first);
        if tail.is_empty() {
            let place = self.place(linear, size, true)?;
            self.copy_out(place, head);
            self.settle_store();
            return Ok(());
        }
        let next = self.wrap(linear.wrapping_add(first as u64));
        self.probe(linear, true)?;
        let rest = self.place(next, tail.len() as u64, true)?;
        let behind = self.unsettled;
        let place = self.place(linear, first as u64, true)?;
        self.copy_out(place, head);
        self.copy_out(rest, tail);
        self.settle_store();
        self.settle_earlier_store(behind);
        Ok(())
    }

    /// Addresses wrap at 4 GiB outside of 64-bit mode.
    #[inline]
    fn wrap(&self, linear: u64) -> u64 {
        if self.lma() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// Checks that the pages of `[linear, linear + size)` can be written, changing nothing but A/D.
    pub fn probe_write(&mut self, linear: u64, size: u64, segment: usize) -> R {
        self.check_canonical(linear, size, segment)?;
        self.check_alignment(linear, size)?;
        self.probe(linear, true)?;
        let last = self.wrap(linear.wrapping_add(size - 1));
        if last & !0xfff != linear & !0xfff {
            self.probe(last & !0xfff, true)?;
        }
        Ok(())
    }

    fn probe(&mut self, linear: u64, write: bool) -> R {
        let access = self.access_now(write);
        self.walk(linear, access).map(|_| ())
    }

    /// Translates one page's part and fills the TLB.
    fn place(&mut self, linear: u64, size: u64, write: bool) -> R<Place> {
        self.counters.tlb_misses += 1;
        self.unsettled = Unsettled::NONE;
        if self.trace.watching {
            self.data_breakpoint(linear, size, write);
        }
        let access = self.access_now(write);
        let page = self.walk(linear, access)?;
        // SAFETY: nothing here replaces the map; a clone would have all vCPUs fight for its count.
        let slots = unsafe { &*std::sync::Arc::as_ptr(&self.slots) };
        let Some(slot) = slots.find(page.gpa) else {
            return Ok(Place::Mmio(page.gpa));
        };
        if write && slot.read_only {
            return Ok(Place::Mmio(page.gpa));
        }
        if write {
            slot.mark_dirty(page.gpa);
            if note_store(slot.code_word(page.gpa), page.gpa & 0xfff, size) {
                self.code_changed();
                self.board.code_changed();
            }
        }
        // SAFETY: gpa lies within the slot.
        let host = unsafe { slot.host.add((page.gpa - slot.gpa) as usize) };
        let host_page = (host as usize & !0xfff) as *mut u8;
        let logged = write || slot.dirty.is_none();
        let writable = page.writable && logged && Self::store_cacheable(slot, page.gpa);
        let cached = !self.uncached();
        if cached {
            self.install(linear, host_page, Page { writable, ..page });
        }
        if write && !(cached && writable) {
            self.unsettled = Unsettled::new(slot.code_word(page.gpa), page.gpa & 0xfff, size);
        }
        Ok(Place::Ram(host))
    }

    fn copy_in(&mut self, place: Place, into: &mut [u8]) -> R {
        match place {
            Place::Ram(host) => {
                // SAFETY: place() vouches for the bytes within one page. Sizes of 1, 2, 4, 8 are single accesses.
                unsafe {
                    match into.len() {
                        1 => into[0] = load::<u8>(host),
                        2 => into.copy_from_slice(&load::<u16>(host).to_le_bytes()),
                        4 => into.copy_from_slice(&load::<u32>(host).to_le_bytes()),
                        8 => into.copy_from_slice(&load::<u64>(host).to_le_bytes()),
                        n => std::ptr::copy_nonoverlapping(host, into.as_mut_ptr(), n),
                    }
                }
            }
            Place::Mmio(gpa) => {
                for (index, chunk) in into.chunks_mut(8).enumerate() {
                    let value = self.mmio_read(gpa + 8 * index as u64, chunk.len() as u8)?;
                    chunk.copy_from_slice(&value.to_le_bytes()[..chunk.len()]);
                }
            }
        }
        Ok(())
    }

    fn copy_out(&mut self, place: Place, from: &[u8]) {
        match place {
            Place::Ram(host) => {
                // SAFETY: as copy_in().
                unsafe {
                    match *from {
                        [a] => store(host, a),
                        [a, b] => store(host, u16::from_le_bytes([a, b])),
                        [a, b, c, d] => store(host, u32::from_le_bytes([a, b, c, d])),
                        [a, b, c, d, e, f, g, h] => store(host, u64::from_le_bytes([a, b, c, d, e, f, g, h])),
                        _ => std::ptr::copy_nonoverlapping(from.as_ptr(), host, from.len()),
                    }
                }
            }
            Place::Mmio(gpa) => {
                for (index, chunk) in from.chunks(8).enumerate() {
                    let mut value = [0; 8];
                    value[..chunk.len()].copy_from_slice(chunk);
                    self.mmio_write(gpa + 8 * index as u64, chunk.len() as u8, u64::from_le_bytes(value));
                }
            }
        }
    }

    /// The host page behind `linear` for a bulk read (`rep`), when it is RAM; TLB filled.
    pub fn bulk_read_ptr(&mut self, linear: u64, segment: usize) -> R<Option<*const u8>> {
        self.check_canonical(linear, 1, segment)?;
        if self.uncached() {
            return Ok(None);
        }
        let (asid, entry) = (self.asid, self.entry(linear));
        if entry.r == (linear & !0xfff) | asid {
            return Ok(Some((linear as usize).wrapping_add(entry.addend) as *const u8));
        }
        match self.place(linear, 1, false)? {
            Place::Ram(host) => Ok(Some(host)),
            Place::Mmio(_) => Ok(None),
        }
    }

    /// The host address for a bulk write of `size` bytes within `linear`'s page, recorded as stored;
    /// [`Cpu::settle_store`] is to follow.
    pub fn bulk_write_ptr(&mut self, linear: u64, size: u64, segment: usize) -> R<Option<*mut u8>> {
        self.check_canonical(linear, 1, segment)?;
        if self.uncached() {
            return Ok(None);
        }
        let (asid, entry) = (self.asid, self.entry(linear));
        if entry.w == (linear & !0xfff) | asid {
            return Ok(Some((linear as usize).wrapping_add(entry.addend) as *mut u8));
        }
        match self.place(linear, size, true)? {
            Place::Ram(host) => Ok(Some(host)),
            Place::Mmio(_) => Ok(None),
        }
    }
}

//! The guest's stack, and the pages instructions are fetched from.

use super::access::Int;
use super::mmu::Mode;
use super::state::{seg, CodeSize};
use super::walk::{Access, Page};
use super::{Cpu, R};

impl Cpu {
    // ---- stack --------------------------------------------------------------------------

    /// Width of the stack pointer in bytes: 8, 4 or 2.
    #[inline]
    pub fn stack_width(&self) -> u64 {
        match (self.code_size, self.segs[seg::SS].db) {
            (CodeSize::B64, _) => 8,
            (_, true) => 4,
            _ => 2,
        }
    }

    /// The mask of the stack pointer.
    #[inline]
    pub fn stack_mask(&self) -> u64 {
        match self.stack_width() {
            8 => u64::MAX,
            4 => 0xffff_ffff,
            _ => 0xffff,
        }
    }

    /// RSP under the stack's width.
    #[inline(always)]
    pub fn sp(&self) -> u64 {
        if self.legacy {
            self.regs[4] & self.stack_mask()
        } else {
            self.regs[4]
        }
    }

    /// Sets RSP under the stack's width: a 16-bit stack keeps the upper bits, a 32-bit one clears them.
    #[inline(always)]
    pub fn set_sp(&mut self, value: u64) {
        if !self.legacy {
            self.regs[4] = value;
        } else if self.stack_width() == 2 {
            self.regs[4] = self.regs[4] & !0xffff | value & 0xffff;
        } else {
            self.regs[4] = value & 0xffff_ffff;
        }
    }

    /// Loads from the stack at an absolute stack offset.
    #[inline(always)]
    pub fn rd_stack<T: Int>(&mut self, sp: u64) -> R<T> {
        if self.legacy {
            let linear = self.linear(seg::SS, sp & self.stack_mask(), T::SIZE as u64, false)?;
            return self.rd(linear, seg::SS);
        }
        self.rd(sp, seg::SS)
    }

    /// Stores to the stack at an absolute stack offset.
    #[inline(always)]
    pub fn wr_stack<T: Int>(&mut self, sp: u64, value: T) -> R {
        if self.legacy {
            let linear = self.linear(seg::SS, sp & self.stack_mask(), T::SIZE as u64, true)?;
            return self.wr(linear, value, seg::SS);
        }
        self.wr(sp, value, seg::SS)
    }

    /// PUSH: nothing changes when the store faults.
    #[inline(always)]
    pub fn push<T: Int>(&mut self, value: T) -> R {
        let sp = self.sp().wrapping_sub(T::SIZE as u64);
        self.wr_stack(sp, value)?;
        self.set_sp(sp);
        Ok(())
    }

    /// POP: RSP is raised once the load succeeded; the caller restores it if its own store faults.
    #[inline(always)]
    pub fn pop<T: Int>(&mut self) -> R<T> {
        let sp = self.sp();
        let value = self.rd_stack(sp)?;
        self.set_sp(sp.wrapping_add(T::SIZE as u64));
        Ok(value)
    }

    // ---- instruction fetch --------------------------------------------------------------

    /// The host address of an instruction's first byte, through the execute tag; `None` when it is
    /// not RAM.
    pub fn fetch_page(&mut self, linear: u64) -> R<Option<*const u8>> {
        let tag = self.tag(linear, 1);
        let entry = self.entry(linear);
        if entry.x == tag {
            return Ok(Some((linear as usize).wrapping_add(entry.addend) as *const u8));
        }
        self.fetch_walk(linear).map(|(_, host)| host)
    }

    /// Translates an instruction address for fetching; gives its guest-physical address and the
    /// host address when it is RAM.
    #[inline(never)]
    pub(crate) fn fetch_walk(&mut self, linear: u64) -> R<(u64, Option<*const u8>)> {
        let access =
            Access { exec: true, user: self.tlb.mode == Mode::User, smap: self.tlb.mode == Mode::Smap, write: false };
        self.counters.tlb_misses += 1;
        let page = self.walk(linear, access)?;
        let Some(slot) = self.slots.find(page.gpa) else {
            return Ok((page.gpa, None));
        };
        // SAFETY: gpa lies within the slot.
        let host = unsafe { slot.host.add((page.gpa - slot.gpa) as usize) };
        let old = *self.entry(linear);
        let keep_write = old.w == (linear & !0xfff) | self.asid;
        if !self.uncached() {
            let page = Page { writable: keep_write, executable: true, ..page };
            self.install(linear, (host as usize & !0xfff) as *mut u8, page);
        }
        Ok((page.gpa, Some(host)))
    }
}

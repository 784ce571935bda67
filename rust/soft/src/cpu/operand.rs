//! Operands of instruction handlers: registers by byte offset, effective and linear addresses with
//! the segment checks of legacy modes. SDM vol. 1, 3.7; vol. 3, 5.3-5.5.

use super::access::{Int, Unaligned};
use super::op::{Op, ADDR16, ADDR32, SLOW};
use super::state::seg;
use super::{vector, Cpu, Stop, R};

impl Cpu {
    // ---- registers ----------------------------------------------------------------------

    /// Reads the register at a byte offset of the register file.
    #[inline(always)]
    pub fn reg<T: Int>(&self, offset: u8) -> T {
        debug_assert!((offset as usize) + T::SIZE <= 18 * 8);
        // SAFETY: bound operations hold offsets within the register file.
        unsafe { *((self.regs.as_ptr() as *const u8).add(offset as usize) as *const Unaligned<T>) }.0
    }

    /// Writes it; a 32-bit write clears the upper half, narrower ones keep the rest.
    #[inline(always)]
    pub fn set_reg<T: Int>(&mut self, offset: u8, value: T) {
        debug_assert!((offset as usize) + T::SIZE <= 16 * 8);
        // SAFETY: as reg(); a 32-bit register's offset is a multiple of 8.
        unsafe {
            let at = (self.regs.as_mut_ptr() as *mut u8).add(offset as usize);
            if T::SIZE == 4 {
                *(at as *mut u64) = value.to_u64();
            } else {
                *(at as *mut Unaligned<T>) = Unaligned(value);
            }
        }
    }

    // ---- addresses ----------------------------------------------------------------------

    /// The effective address (offset in the segment), before masking.
    #[inline(always)]
    pub fn effective(&self, op: &Op) -> u64 {
        // SAFETY: bound operations hold register slots below 18.
        unsafe {
            let base = *self.regs.get_unchecked(op.base as usize);
            let index = *self.regs.get_unchecked(op.index as usize);
            base.wrapping_add(index << (op.scale_seg & 3)).wrapping_add(op.disp as u64)
        }
    }

    /// The effective address masked to the address size (LEA).
    #[inline(always)]
    pub fn effective_masked(&self, op: &Op) -> u64 {
        let address = self.effective(op);
        if op.has(ADDR32) {
            address & 0xffff_ffff
        } else if op.has(ADDR16) {
            address & 0xffff
        } else {
            address
        }
    }

    /// The linear address of the memory operand of `size` bytes, segment checks done.
    #[inline(always)]
    pub fn lin(&mut self, op: &Op, size: u64, write: bool) -> R<u64> {
        if op.has(SLOW) {
            return self.lin_slow(op, size, write);
        }
        // SAFETY: segment numbers are below 8.
        Ok(self.effective(op).wrapping_add(unsafe { *self.seg_base.get_unchecked(op.seg()) }))
    }

    #[cold]
    #[inline(never)]
    fn lin_slow(&mut self, op: &Op, size: u64, write: bool) -> R<u64> {
        self.linear(op.seg(), self.effective_masked(op), size, write)
    }

    /// The linear address of `offset` in a segment, with the limit, type and null checks of legacy
    /// modes. Stops with #SS(0) for the stack segment, #GP(0) else. SDM vol. 3, 5.3-5.5.
    pub fn linear(&mut self, segment: usize, offset: u64, size: u64, write: bool) -> R<u64> {
        if !self.legacy {
            return Ok(offset.wrapping_add(self.seg_base[segment]));
        }
        let s = self.segs[segment];
        let offset = offset & 0xffff_ffff;
        let last = offset + (size - 1);
        let data = s.kind & 8 == 0;
        let expand_down = data && s.kind & 4 != 0;
        let in_limit = if expand_down {
            let top = if s.db { 0xffff_ffff } else { 0xffff };
            offset > s.limit as u64 && last <= top
        } else {
            last <= s.limit as u64
        };
        let typed = !self.protected() || (if write { data && s.kind & 2 != 0 } else { data || s.kind & 2 != 0 });
        if s.unusable || !in_limit || !typed {
            return Err(self.address_fault(segment));
        }
        Ok((s.base + offset) & 0xffff_ffff)
    }

    /// #SS(0) or #GP(0).
    #[cold]
    pub fn address_fault(&mut self, segment: usize) -> Stop {
        self.raise(if segment == seg::SS { vector::SS } else { vector::GP }, Some(0))
    }
}

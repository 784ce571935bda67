//! Descriptors and the loading of segment registers.
//!
//! SDM vol. 3, 3.4-3.5 and 5; vol. 2, MOV, LLDT, LTR. The checks stand in the manual's order,
//! because a guest sees which of them fails first.

use super::access::Int;
use super::mmu::canonical;
use super::state::{rflags, seg, Segment};
use super::{vector, Cpu, R};

/// The error code that names a selector.
#[inline]
pub fn selector_error(selector: u16) -> u32 {
    selector as u32 & 0xfffc
}

/// System descriptor types (S = 0).
#[allow(missing_docs)]
pub mod system {
    pub const TSS16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const CALL16: u8 = 4;
    pub const TASK: u8 = 5;
    pub const INT16: u8 = 6;
    pub const TRAP16: u8 = 7;
    pub const TSS32: u8 = 9;
    pub const TSS32_BUSY: u8 = 11;
    pub const CALL32: u8 = 12;
    pub const INT32: u8 = 14;
    pub const TRAP32: u8 = 15;
    /// The bit that makes an available TSS a busy one.
    pub const BUSY: u8 = 2;
}

/// The first eight bytes of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor(pub u64);

#[allow(missing_docs)]
impl Descriptor {
    pub fn kind(self) -> u8 {
        (self.0 >> 40) as u8 & 15
    }
    pub fn s(self) -> bool {
        self.bit(44)
    }
    pub fn dpl(self) -> u8 {
        (self.0 >> 45) as u8 & 3
    }
    pub fn present(self) -> bool {
        self.bit(47)
    }
    pub fn l(self) -> bool {
        self.bit(53)
    }
    pub fn db(self) -> bool {
        self.bit(54)
    }
    fn bit(self, index: u32) -> bool {
        self.0 >> index & 1 != 0
    }
    pub fn code(self) -> bool {
        self.s() && self.kind() & 8 != 0
    }
    pub fn conforming(self) -> bool {
        self.code() && self.kind() & 4 != 0
    }
    pub fn readable(self) -> bool {
        self.s() && (self.kind() & 8 == 0 || self.kind() & 2 != 0)
    }
    pub fn writable(self) -> bool {
        self.s() && self.kind() & 10 == 2
    }
    pub fn base(self) -> u64 {
        (self.0 >> 16) & 0xff_ffff | (self.0 >> 56) << 24
    }
    /// In bytes, the granularity applied.
    pub fn limit(self) -> u32 {
        let raw = (self.0 & 0xffff | (self.0 >> 32) & 0xf_0000) as u32;
        if self.bit(55) {
            raw << 12 | 0xfff
        } else {
            raw
        }
    }
    /// A gate's target selector.
    pub fn gate_selector(self) -> u16 {
        (self.0 >> 16) as u16
    }
    /// A gate's offset, its upper half in `high` for the 16-byte form.
    pub fn gate_offset(self, high: u64) -> u64 {
        let low = self.0 & 0xffff;
        if self.kind() & 8 == 0 {
            return low;
        }
        low | (self.0 >> 32) & 0xffff_0000 | high << 32
    }
    /// The segment register this makes. A code or data segment's accessed bit counts as set.
    pub fn segment(self, selector: u16) -> Segment {
        Segment {
            base: self.base(),
            limit: self.limit(),
            selector,
            kind: self.kind() | self.s() as u8,
            present: true,
            dpl: self.dpl(),
            db: self.db(),
            s: self.s(),
            l: self.l(),
            g: self.bit(55),
            avl: self.bit(52),
            unusable: false,
        }
    }
}

/// A segment register after a null selector was loaded; `dpl` matters for SS only.
pub fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment { selector, dpl, unusable: true, ..Segment::default() }
}

/// A segment register in virtual-8086 mode. SDM vol. 3, 22.2.
pub fn vm86_segment(selector: u16) -> Segment {
    Segment {
        base: (selector as u64) << 4,
        limit: 0xffff,
        selector,
        kind: 3,
        present: true,
        dpl: 3,
        s: true,
        ..Segment::default()
    }
}

impl Cpu {
    /// Virtual-8086 mode.
    #[inline]
    pub fn vm86(&self) -> bool {
        self.sys_flags as u64 & rflags::VM != 0
    }

    /// Addresses in descriptor tables and TSSs wrap at 4 GiB outside of long mode.
    #[inline]
    pub fn table_linear(&self, base: u64, offset: u64) -> u64 {
        let linear = base.wrapping_add(offset);
        if self.lma() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// Reads a descriptor table or TSS with supervisor rights.
    #[inline]
    pub fn rd_system<T: Int>(&mut self, linear: u64) -> R<T> {
        self.as_supervisor(|cpu| cpu.rd(linear, seg::DS))
    }

    /// Where a selector's descriptor of `bytes` bytes lies; `None` beyond the table's limit.
    fn descriptor_linear(&self, selector: u16, bytes: u32) -> Option<u64> {
        let (base, limit) = match selector & 4 {
            0 => (self.gdtr.base, self.gdtr.limit as u32),
            _ if self.ldtr.unusable => return None,
            _ => (self.ldtr.base, self.ldtr.limit),
        };
        let at = (selector & 0xfff8) as u32;
        (at + bytes - 1 <= limit).then(|| self.table_linear(base, at as u64))
    }

    /// Reads the descriptor of a selector that is not null, or `None` beyond the table's limit.
    pub fn try_descriptor(&mut self, selector: u16) -> R<Option<Descriptor>> {
        match self.descriptor_linear(selector, 8) {
            Some(linear) => self.rd_system(linear).map(|raw| Some(Descriptor(raw))),
            None => Ok(None),
        }
    }

    /// Reads a descriptor; beyond the table's limit it stops with `vector`(selector + `ext`).
    pub fn descriptor(&mut self, selector: u16, vector: u8, ext: u32) -> R<Descriptor> {
        match self.try_descriptor(selector)? {
            Some(descriptor) => Ok(descriptor),
            None => Err(self.raise(vector, Some(selector_error(selector) | ext))),
        }
    }

    /// The upper half of a 16-byte system descriptor; its type field must be zero.
    pub fn descriptor_high(&mut self, selector: u16) -> R<u64> {
        let Some(linear) = self.descriptor_linear(selector, 16) else {
            return Err(self.gp(selector_error(selector)));
        };
        let high: u64 = self.rd_system(linear.wrapping_add(8))?;
        if high >> 40 & 0x1f != 0 {
            return Err(self.gp(selector_error(selector)));
        }
        Ok(high)
    }

    /// Sets the accessed bit in memory, where it is not set yet.
    pub fn mark_accessed(&mut self, selector: u16, descriptor: Descriptor) -> R {
        if descriptor.kind() & 1 == 0 {
            self.change_descriptor_type(selector, 1, 0)?;
        }
        Ok(())
    }

    /// Sets and clears bits of a descriptor's type field in memory, atomically.
    pub fn change_descriptor_type(&mut self, selector: u16, set: u8, clear: u8) -> R {
        let Some(linear) = self.descriptor_linear(selector, 8) else {
            return Err(self.gp(selector_error(selector)));
        };
        let at = linear.wrapping_add(5);
        self.as_supervisor(|cpu| cpu.atomic_rmw::<u8>(at, seg::DS, |old, _| old & !clear | set)).map(|_| ())
    }

    /// Replaces a data or stack segment register.
    #[inline]
    pub fn set_segment(&mut self, index: usize, segment: Segment) {
        let flat = !self.legacy && index < seg::FS;
        self.seg_base[index] = if flat { 0 } else { segment.base };
        self.segs[index] = segment;
    }

    /// Loads ES, SS, DS, FS or GS as MOV does.
    pub fn load_segment(&mut self, index: usize, selector: u16) -> R {
        let segment = if self.protected() {
            self.fetch_segment(index, selector)?
        } else if self.vm86() {
            vm86_segment(selector)
        } else {
            self.real_segment(index, selector)
        };
        self.set_segment(index, segment);
        Ok(())
    }

    /// Real mode changes selector and base only: limit and attributes stay ("unreal mode").
    pub fn real_segment(&self, index: usize, selector: u16) -> Segment {
        let old = self.segs[index];
        let limit = if old.unusable { 0xffff } else { old.limit };
        let kind = if old.unusable { 3 } else { old.kind };
        Segment { base: (selector as u64) << 4, selector, limit, kind, present: true, s: true, unusable: false, ..old }
    }

    /// The checks of a data or stack segment load in protected mode; SDM vol. 2, MOV.
    fn fetch_segment(&mut self, index: usize, selector: u16) -> R<Segment> {
        if index == seg::SS {
            return self.fetch_stack_segment(selector);
        }
        if selector & 0xfffc == 0 {
            return Ok(null_segment(selector, 0));
        }
        let error = selector_error(selector);
        let d = self.descriptor(selector, vector::GP, 0)?;
        let privileged = !d.conforming() && d.dpl() < self.cpl.max(selector as u8 & 3);
        if !d.readable() || privileged {
            return Err(self.gp(error));
        }
        if !d.present() {
            return Err(self.raise(vector::NP, Some(error)));
        }
        self.mark_accessed(selector, d)?;
        Ok(d.segment(selector))
    }

    fn fetch_stack_segment(&mut self, selector: u16) -> R<Segment> {
        let rpl = selector as u8 & 3;
        if selector & 0xfffc == 0 {
            if self.legacy || self.cpl == 3 || rpl != self.cpl {
                return Err(self.gp(0));
            }
            return Ok(null_segment(selector, self.cpl));
        }
        self.stack_descriptor(selector, self.cpl, vector::GP, 0)
    }

    /// Reads and checks a stack segment for privilege `cpl`; failures are `vector`(selector + ext).
    pub fn stack_descriptor(&mut self, selector: u16, cpl: u8, vector: u8, ext: u32) -> R<Segment> {
        let error = Some(selector_error(selector) | ext);
        let d = self.descriptor(selector, vector, ext)?;
        if selector as u8 & 3 != cpl || !d.writable() || d.dpl() != cpl {
            return Err(self.raise(vector, error));
        }
        if !d.present() {
            return Err(self.raise(vector::SS, error));
        }
        self.mark_accessed(selector, d)?;
        Ok(d.segment(selector))
    }

    /// LLDT's work, for CPL 0 in protected mode.
    pub fn load_ldtr(&mut self, selector: u16) -> R {
        if selector & 0xfffc == 0 {
            self.ldtr = null_segment(selector, 0);
            return Ok(());
        }
        self.ldtr = self.system_segment(selector, |kind, _| kind == system::LDT)?;
        Ok(())
    }

    /// LTR's work, for CPL 0 in protected mode.
    pub fn load_tr(&mut self, selector: u16) -> R {
        if selector & 0xfffc == 0 {
            return Err(self.gp(0));
        }
        let available = |kind, long: bool| kind == system::TSS32 || kind == system::TSS16 && !long;
        let mut segment = self.system_segment(selector, available)?;
        self.change_descriptor_type(selector, system::BUSY, 0)?;
        segment.kind |= system::BUSY;
        self.tr = segment;
        Ok(())
    }

    fn system_segment(&mut self, selector: u16, fits: impl Fn(u8, bool) -> bool) -> R<Segment> {
        let error = selector_error(selector);
        if selector & 4 != 0 {
            return Err(self.gp(error));
        }
        let d = self.descriptor(selector, vector::GP, 0)?;
        if d.s() || !fits(d.kind(), self.lma()) {
            return Err(self.gp(error));
        }
        if !d.present() {
            return Err(self.raise(vector::NP, Some(error)));
        }
        let mut segment = d.segment(selector);
        if self.lma() {
            segment.base |= self.descriptor_high(selector)? << 32;
            if !canonical(segment.base) {
                return Err(self.gp(error));
            }
        }
        Ok(segment)
    }
}

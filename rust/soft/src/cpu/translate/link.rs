//! Link: how control goes from one piece of code to the next.
//!
//! Within a page a direct branch is a jump from piece to piece, patched once its target exists. All
//! pieces so linked come from one page at one generation: they are stale together, and control gets
//! into a page only by ways that look at its generation, so nothing is ever unlinked. Backward jumps
//! look at the attention word, so control cannot stay for ever.
//!
//! Between pages, and for indirect branches, there is the jump table: by linear address and context,
//! with the generation that the code was made under.

use std::sync::atomic::AtomicU64;

/// Entries of the jump table.
pub const JUMPS: usize = 32768;

/// An entry of the jump table.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Jump {
    pub(crate) linear: u64,
    pub(crate) code: *const u8,
    pub(crate) word: *const AtomicU64,
    pub(crate) context: u32,
    pub(crate) generation: u32,
}

impl Jump {
    /// Leads nowhere: no code begins at this address, which is not canonical.
    pub(crate) const NONE: Self = Self {
        linear: 1 << 63 | 1,
        code: std::ptr::null(),
        word: std::ptr::null(),
        context: u32::MAX,
        generation: u32::MAX,
    };
}

/// Offsets in an entry.
#[allow(missing_docs)]
pub mod jump {
    use super::Jump;
    use std::mem::{offset_of, size_of};
    pub const LINEAR: usize = offset_of!(Jump, linear);
    pub const CODE: usize = offset_of!(Jump, code);
    pub const WORD: usize = offset_of!(Jump, word);
    pub const CONTEXT: usize = offset_of!(Jump, context);
    pub const GENERATION: usize = offset_of!(Jump, generation);
    /// log2 of an entry's size.
    pub const SHIFT: u8 = size_of::<Jump>().trailing_zeros() as u8;
    const _: () = assert!(size_of::<Jump>().is_power_of_two());
}

/// The slot of a linear address.
#[inline]
pub fn index(linear: u64) -> usize {
    (linear as u32 ^ (linear as u32) >> 12) as usize & (JUMPS - 1)
}

/// A way out of a piece of code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// To `target`, an offset in the page; the displacement at `at` is to be patched.
    Link {
        /// Offset in the region.
        at: u32,
        /// Page offset.
        target: u16,
        /// The host page the code is from: mappings change, and the target must be on the same.
        page: usize,
        /// The flags are in RFLAGS there.
        flags_in_host: bool,
    },
    /// An indirect branch that began at page offset `from` and added `popped` to RSP.
    Indirect {
        /// Page offset.
        from: u16,
        /// Bytes.
        popped: u32,
    },
}

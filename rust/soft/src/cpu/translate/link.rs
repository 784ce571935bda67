//! Link: how control goes from one piece of code to the next.
//!
//! Within a page a direct branch is a jump from piece to piece, patched once its target exists. All
//! pieces so linked come from one page at one generation: they are stale together, and control gets
//! into a page only by ways that look at its generation, so nothing is ever unlinked. Backward jumps
//! look at the attention word, so control cannot stay for ever.
//!
//! Between pages, and for indirect branches, there is the jump table: by linear address and context,
//! with the generation that the code was made under. A direct branch to another page keeps what it
//! last found there in a [`Site`] of its own. A call leaves a [`Return`] for the RET that matches: it
//! leads into the calling page without a look at its generation, so these go when code changes.

use crate::host::table::Table;
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

/// What a branch to another page found: it holds for the page and context it was found from.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Site {
    from: u64,
    context: u32,
    generation: u32,
    word: *const AtomicU64,
    to: u64,
    code: *const u8,
}

impl Site {
    /// Nothing yet: this is no page's address.
    pub const NONE: Self =
        Self { from: 1, context: 0, generation: 0, word: std::ptr::null(), to: 0, code: std::ptr::null() };
}

/// Offsets in a site.
#[allow(missing_docs)]
pub mod site {
    use super::Site;
    use std::mem::offset_of;
    pub const FROM: i32 = offset_of!(Site, from) as i32;
    pub const CONTEXT: i32 = offset_of!(Site, context) as i32;
    pub const GENERATION: i32 = offset_of!(Site, generation) as i32;
    pub const WORD: i32 = offset_of!(Site, word) as i32;
    pub const TO: i32 = offset_of!(Site, to) as i32;
    pub const CODE: i32 = offset_of!(Site, code) as i32;
}

/// Sites that do not move.
#[derive(Default)]
pub struct Sites {
    chunks: Vec<Vec<Site>>,
}

impl Sites {
    const CHUNK: usize = 1024;

    /// One more.
    pub fn add(&mut self) -> *mut Site {
        if self.chunks.last().is_none_or(|chunk| chunk.len() == Self::CHUNK) {
            self.chunks.push(Vec::with_capacity(Self::CHUNK));
        }
        let last = self.chunks.len() - 1;
        let chunk = &mut self.chunks[last];
        chunk.push(Site::NONE);
        // Within its capacity a chunk stays where it is.
        let at = chunk.len() - 1;
        &raw mut chunk[at]
    }

    /// All find nothing.
    pub fn forget(&mut self) {
        self.chunks.iter_mut().flatten().for_each(|site| *site = Site::NONE);
    }
}

/// Entries of the ring of returns.
pub const RETURNS: usize = 32;

/// Where a call comes back to.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Return {
    linear: u64,
    code: *const u8,
    context: u32,
    _pad: [u32; 3],
}

impl Return {
    /// Matches no RET.
    pub const NONE: Self = Self { linear: Jump::NONE.linear, code: std::ptr::null(), context: 0, _pad: [0; 3] };
}

/// Offsets in a return.
#[allow(missing_docs)]
pub mod back {
    use super::{Return, RETURNS};
    use std::mem::{offset_of, size_of};
    pub const LINEAR: i32 = offset_of!(Return, linear) as i32;
    pub const CODE: i32 = offset_of!(Return, code) as i32;
    pub const CONTEXT: i32 = offset_of!(Return, context) as i32;
    pub const SIZE: i32 = size_of::<Return>() as i32;
    /// Of an offset in the ring.
    pub const MASK: i32 = (RETURNS as i32 * SIZE) - 1;
    const _: () = assert!((MASK + 1) & MASK == 0);
}

/// The slot of a linear address.
#[inline]
pub fn index(linear: u64) -> usize {
    (linear as u32 ^ (linear as u32) >> 12) as usize & (JUMPS - 1)
}

/// An empty jump table; `None` where the host has no memory for it. Zeroes lead nowhere: they say address 0, and that
/// is looked for in its own slot only, which says otherwise.
pub(crate) fn no_jumps() -> Option<Table<Jump>> {
    // SAFETY: an entry is integers and pointers that are not followed before its address matches.
    let mut jumps = unsafe { Table::new(JUMPS) }?;
    jumps[index(0)] = Jump::NONE;
    Some(jumps)
}

/// Empties it.
pub(crate) fn forget(jumps: &mut Table<Jump>) {
    jumps.reset();
    jumps[index(0)] = Jump::NONE;
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

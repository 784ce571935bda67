//! XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR and XRSTORS images (SDM volume 1, chapter 13).
//!
//! Writing fills a buffer and says which parts of it the instruction writes: the interpreter copies
//! only those to guest memory. XSTATE_BV's in-use bits are computed from the values, so a component
//! that holds its initial values always counts as unused. Left out on purpose: XSAVEOPT's and
//! XSAVES's *modified* optimisation (writing what did not change is always allowed).

use std::ops::Range;

use super::fpstate::{array, mxcsr_is_valid, FpState, FCW_INIT, MXCSR_INIT, XMM, YMM_HIGH};
use super::fxsave::{load_x87, load_xmm, save_mxcsr, save_x87, save_xmm, BadImage, Format};

/// XCR0 bit of the x87 component.
pub const X87: u64 = 1 << 0;
/// XCR0 bit of XMM registers and MXCSR.
pub const SSE: u64 = 1 << 1;
/// XCR0 bit of the upper halves of YMM registers.
pub const AVX: u64 = 1 << 2;

/// Components this state can hold; a guest's XCR0 is a subset with [`X87`] set.
pub const COMPONENTS: u64 = X87 | SSE | AVX;
/// Bytes of the legacy region and the header: where extended components start.
pub const EXTENDED: usize = 576;
const XSTATE_BV: usize = 512;
const XCOMP_BV: usize = 520;
/// XCOMP_BV: the image is in compacted format.
const COMPACTED: u64 = 1 << 63;
/// Number, offset in the standard format, bytes. None of them wants 64-byte alignment when compacted.
const LAYOUT: [(u32, usize, usize); 1] = [(2, YMM_HIGH, 256)];

/// Which instruction writes the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Save {
    /// XSAVE: every requested component.
    Plain,
    /// XSAVEOPT: components in use.
    Optimized,
    /// XSAVEC and XSAVES: components in use, compacted format.
    Compacted,
}

/// Which instruction reads the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restore {
    /// XRSTOR: standard or compacted format.
    User,
    /// XRSTORS: compacted format only.
    Supervisor,
}

/// Parts of an image that an instruction wrote, in ascending order.
#[derive(Clone, Debug, Default)]
pub struct Written {
    list: [Range<usize>; 8],
    length: usize,
}

impl Written {
    fn push(&mut self, range: Range<usize>) {
        self.list[self.length] = range;
        self.length += 1;
    }

    /// The parts as byte offsets.
    pub fn parts(&self) -> &[Range<usize>] {
        &self.list[..self.length]
    }
}

/// Whether XSETBV may load `value` into XCR0, on a CPU that has `supported` components.
pub fn xcr0_is_valid(value: u64, supported: u64) -> bool {
    value & X87 != 0 && value & !supported == 0 && (value & AVX == 0 || value & SSE != 0)
}

/// Bytes of an image with `components` (CPUID leaf 0xD and the interpreter's access check).
pub fn area_bytes(components: u64, compacted: bool) -> usize {
    let parts = extended_parts(components, compacted);
    parts.map(|(_, _, at, bytes)| at + bytes).max().unwrap_or(EXTENDED)
}

/// Extended components as (bit, offset in `FpState`, offset in the image, bytes).
fn extended_parts(components: u64, compacted: bool) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let wanted = LAYOUT.into_iter().filter(move |(number, ..)| components >> number & 1 != 0);
    wanted.scan(EXTENDED, move |next, (number, standard, bytes)| {
        let at = if compacted { *next } else { standard };
        *next += bytes;
        Some((1 << number, standard, at, bytes))
    })
}

/// Components whose values are not the initial ones. MXCSR does not count.
pub fn in_use(state: &FpState) -> u64 {
    let bytes = state.bytes();
    let zero = |range: Range<usize>| bytes[range].iter().all(|&byte| byte == 0);
    let x87 = state.fcw() != FCW_INIT || !zero(2..24) || !zero(32..160);
    let sse = !zero(XMM..XMM + 256);
    let avx = !zero(YMM_HIGH..YMM_HIGH + 256);
    [(x87, X87), (sse, SSE), (avx, AVX)].iter().map(|(used, bit)| if *used { *bit } else { 0 }).sum()
}

/// Writes `requested` components (EDX:EAX masked by XCR0, and IA32_XSS for XSAVES) to `image`, which
/// is at least [`area_bytes`] long and holds guest memory's header at 512 to 519.
pub fn xsave(state: &FpState, image: &mut [u8], requested: u64, format: Format, save: Save) -> Written {
    let requested = requested & COMPONENTS;
    let used = in_use(state);
    let saved = match save {
        Save::Plain => requested,
        Save::Optimized => requested & used,
        Save::Compacted if state.mxcsr() != MXCSR_INIT => requested & (used | SSE),
        Save::Compacted => requested & used,
    };
    let compacted = save == Save::Compacted;
    let with_mxcsr = if compacted { saved & SSE } else { requested & (SSE | AVX) };

    let mut written = Written::default();
    save_legacy(state, image, saved, with_mxcsr != 0, format, &mut written);
    if compacted {
        image[XSTATE_BV..XCOMP_BV].copy_from_slice(&saved.to_le_bytes());
        image[XCOMP_BV..XCOMP_BV + 8].copy_from_slice(&(requested | COMPACTED).to_le_bytes());
        written.push(XSTATE_BV..XCOMP_BV + 8);
    } else {
        let old = header(image, XSTATE_BV);
        let new = old & !requested | used & requested;
        image[XSTATE_BV..XCOMP_BV].copy_from_slice(&new.to_le_bytes());
        written.push(XSTATE_BV..XCOMP_BV);
    }
    for (bit, from, at, bytes) in extended_parts(requested, compacted) {
        if saved & bit != 0 {
            let bytes = register_bytes(bytes, format);
            image[at..at + bytes].copy_from_slice(&state.bytes()[from..from + bytes]);
            written.push(at..at + bytes);
        }
    }
    written
}

fn save_legacy(state: &FpState, image: &mut [u8], saved: u64, with_mxcsr: bool, format: Format, written: &mut Written) {
    if saved & X87 != 0 {
        save_x87(state, image, format);
        written.push(0..24);
    }
    if with_mxcsr {
        save_mxcsr(state, image);
        written.push(24..32);
    }
    if saved & X87 != 0 {
        // The six bytes above each register are written too, as zeros.
        written.push(32..160);
    }
    if saved & SSE != 0 {
        save_xmm(state, image, format);
        written.push(XMM..XMM + format.xmm_bytes());
    }
}

/// Outside 64-bit mode only eight registers take part.
fn register_bytes(bytes: usize, format: Format) -> usize {
    if format.sixteen_registers {
        bytes
    } else {
        bytes / 2
    }
}

fn header(image: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(&image[at..at + 8]))
}

/// Bytes of the image that a restore may read, judged by its header (bytes 512 to 575 of the image).
pub fn restore_bytes(image_header: &[u8], requested: u64) -> usize {
    let compaction = header(image_header, XCOMP_BV - XSTATE_BV);
    if compaction & COMPACTED != 0 {
        area_bytes(compaction & COMPONENTS, true)
    } else {
        area_bytes(requested & COMPONENTS, false)
    }
}

/// Loads `requested` components (EDX:EAX masked by `enabled`); `enabled` is XCR0, for XRSTORS with
/// IA32_XSS. All or nothing. `image` is at least [`restore_bytes`] long.
pub fn xrstor(
    state: &mut FpState,
    image: &[u8],
    requested: u64,
    enabled: u64,
    format: Format,
    restore: Restore,
) -> Result<(), BadImage> {
    let (present, compaction) = (header(image, XSTATE_BV), header(image, XCOMP_BV));
    let compacted = compaction & COMPACTED != 0;
    check_header(image, enabled, restore)?;
    let requested = requested & enabled & COMPONENTS;
    let loaded = requested & present;
    let from_memory = if compacted { loaded & SSE } else { requested & (SSE | AVX) };
    let mxcsr = u32::from_le_bytes(array(&image[24..28]));
    if from_memory != 0 && !mxcsr_is_valid(mxcsr) {
        return Err(BadImage);
    }

    let initial = FpState::initial();
    let source = |bit| if loaded & bit != 0 { image } else { &initial.bytes()[..] };
    if requested & X87 != 0 {
        load_x87(state, source(X87), format);
    }
    if from_memory != 0 {
        state.set_mxcsr(mxcsr);
    } else if requested & SSE != 0 {
        state.set_mxcsr(MXCSR_INIT);
    }
    if requested & SSE != 0 {
        load_xmm(state, source(SSE), format);
    }
    let layout = if compacted { compaction } else { requested };
    for (bit, to, at, bytes) in extended_parts(layout, compacted) {
        let (bytes, at) = (register_bytes(bytes, format), if loaded & bit != 0 { at } else { to });
        if requested & bit != 0 {
            state.bytes_mut()[to..to + bytes].copy_from_slice(&source(bit)[at..at + bytes]);
        }
    }
    Ok(())
}

fn check_header(image: &[u8], enabled: u64, restore: Restore) -> Result<(), BadImage> {
    let (present, compaction) = (header(image, XSTATE_BV), header(image, XCOMP_BV));
    let valid = if compaction & COMPACTED != 0 {
        let reserved = image[XCOMP_BV + 8..EXTENDED].iter().all(|&byte| byte == 0);
        let components = compaction & !COMPACTED;
        reserved && components & !enabled == 0 && present & !components == 0
    } else {
        restore == Restore::User && present & !enabled == 0 && compaction == 0 && header(image, XCOMP_BV + 8) == 0
    };
    valid.then_some(()).ok_or(BadImage)
}

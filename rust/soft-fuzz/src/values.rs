//! Values worth computing with: boundaries, NaNs, denormals, infinities, pointers, and noise.

use crate::layout::*;
use crate::rng::Rng;
use ostler_soft::host::vex::host_has_all;

const INTEGERS: [u64; 24] = [
    0,
    1,
    2,
    7,
    8,
    0x1f,
    0x20,
    0x3f,
    0x40,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_8000_0000,
    0xffff_ffff_ffff_ffff,
];

const SINGLES: [u32; 20] = [
    0,
    0x8000_0000, // -0
    0x3f80_0000, // 1
    0xbf80_0000,
    0x3f00_0000, // 0.5
    0x4b00_0000, // 2^23
    0x4f00_0000, // 2^31
    0xcf00_0000,
    0x5f00_0000, // 2^63
    0x7f80_0000, // infinity
    0xff80_0000,
    0x7fc0_0000, // quiet NaN
    0xffc1_2345,
    0x7f80_0001, // signalling NaN
    0xffa0_0000,
    0x0000_0001, // denormal
    0x807f_ffff,
    0x0080_0000, // least normal
    0x7f7f_ffff, // greatest
    0x4049_0fdb,
];

const DOUBLES: [u64; 20] = [
    0,
    0x8000_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x3fe0_0000_0000_0000,
    0x4330_0000_0000_0000, // 2^52
    0x41e0_0000_0000_0000, // 2^31
    0xc1e0_0000_0020_0000,
    0x43e0_0000_0000_0000, // 2^63
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xfff8_1234_5678_9abc,
    0x7ff0_0000_0000_0001,
    0xfff4_0000_0000_0000,
    0x0000_0000_0000_0001,
    0x800f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0x4009_21fb_5444_2d18,
];

/// Sign and exponent, significand.
const EXTENDED: [(u16, u64); 18] = [
    (0, 0),
    (0x8000, 0),
    (0x3fff, 1 << 63),
    (0xbfff, 1 << 63),
    (0x3ffe, 1 << 63),
    (0x403e, 1 << 63), // 2^63
    (0x401e, 1 << 63), // 2^31
    (0x7fff, 1 << 63), // infinity
    (0xffff, 1 << 63),
    (0x7fff, 3 << 62), // quiet NaN
    (0xffff, 3 << 62),
    (0x7fff, 0xa << 60), // signalling NaN
    (0, 1),              // denormal
    (0, 1 << 63),        // pseudo-denormal
    (0x3fff, 1 << 62),   // unnormal: an invalid operand
    (0x7fff, 1),         // pseudo-NaN
    (0x7ffe, u64::MAX),
    (0x0001, 1 << 63),
];

/// An integer, often at a boundary.
pub fn integer(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0..=2 => rng.pick(&INTEGERS),
        3 => rng.pick(&INTEGERS).wrapping_add(rng.below(5)).wrapping_sub(2),
        4 => rng.below(256),
        5 => rng.u64() >> rng.below(64),
        _ => rng.u64(),
    }
}

/// A single-precision value's bits.
pub fn single(rng: &mut Rng) -> u32 {
    match rng.below(4) {
        0 => rng.pick(&SINGLES),
        // Near 1, so that sums and products neither vanish nor overflow.
        1 | 2 => (rng.u64() as u32 & 0x87ff_ffff) | 0x3800_0000,
        _ => rng.u64() as u32,
    }
}

/// A double-precision value's bits.
pub fn double(rng: &mut Rng) -> u64 {
    match rng.below(4) {
        0 => rng.pick(&DOUBLES),
        1 | 2 => (rng.u64() & 0x807f_ffff_ffff_ffff) | 0x3f80_0000_0000_0000 | (rng.below(16) << 52),
        _ => rng.u64(),
    }
}

/// An 80-bit value.
pub fn extended(rng: &mut Rng) -> [u8; 10] {
    let (exponent, significand) = match rng.below(8) {
        0 | 1 => rng.pick(&EXTENDED),
        2 => (0xffff, integer(rng)), // what MMX leaves
        3 => (rng.u64() as u16, rng.u64()),
        4 => ((rng.u64() as u16 & 0x8000) | (0x3fff + rng.below(64) as u16), rng.u64() | 1 << 63),
        _ => ((rng.u64() as u16 & 0x8000) | (0x3ff0 + rng.below(32) as u16), rng.u64() | 1 << 63),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&exponent.to_le_bytes());
    bytes
}

/// A pointer into the data area with room around it; mostly aligned to 64 bytes.
pub fn pointer(rng: &mut Rng) -> u64 {
    let aligned = DATA + 0x800 + (rng.below(0x1000) & !63);
    match rng.below(16) {
        0..=11 => aligned,
        12 => aligned + rng.below(64),
        13 => DATA + 0x1000 - rng.below(20),
        14 => DATA + 0x2000 - rng.below(20),
        _ => aligned + 8,
    }
}

/// A pointer that leads somewhere bad: unmapped, read only, not canonical, another area's end.
pub fn bad_pointer(rng: &mut Rng) -> u64 {
    match rng.below(9) {
        0 => READ_ONLY + rng.below(READ_ONLY_BYTES as u64),
        1 => DATA + DATA_BYTES as u64 - rng.below(20),
        2 => DATA + DATA_BYTES as u64 + rng.below(0x1000),
        3 => DATA.wrapping_sub(rng.below(24)),
        4 => 0x0000_8000_0000_0000 + (rng.u64() >> 20),
        5 => 0x0000_7fff_ffff_ffff - rng.below(24),
        6 => 0u64.wrapping_sub(rng.below(32)),
        7 => CODE + rng.below(CODE_BYTES as u64),
        _ => rng.u64(),
    }
}

/// A pointer into the stack area, room on both sides.
pub fn stack_pointer(rng: &mut Rng) -> u64 {
    let middle = STACK + STACK_BYTES as u64 / 2;
    match rng.below(16) {
        0 => middle + rng.below(64),
        1 => STACK + STACK_BYTES as u64 - 8 * rng.below(4),
        2 => STACK + 8 * rng.below(4),
        _ => middle - 0x400 + (rng.below(0x800) & !15),
    }
}

/// What memory is filled with, eight bytes at a time.
pub fn memory_word(rng: &mut Rng) -> u64 {
    match rng.below(10) {
        0..=1 => integer(rng),
        2 => pointer(rng),
        3..=4 => double(rng),
        5..=6 => single(rng) as u64 | (single(rng) as u64) << 32,
        7 => {
            // Words and bytes at their boundaries, for packed integers.
            let unit = rng.pick(&[0x80u64, 0x7f, 0xff, 0x00, 0x01]);
            rng.u64() & 0xff00_ff00_00ff_00ff | unit << 8 | unit << 16 | unit << 40 | unit << 48
        }
        _ => rng.u64(),
    }
}

/// An MXCSR: mostly with all exceptions masked.
pub fn mxcsr(rng: &mut Rng) -> u32 {
    let mut value = 0x1f80;
    if rng.percent(50) {
        value |= (rng.below(4) as u32) << 13;
    }
    if rng.percent(25) {
        value |= rng.u64() as u32 & 0x803f;
    }
    if rng.percent(15) {
        value |= 0x40;
    }
    if rng.percent(15) {
        value &= !(rng.u64() as u32 & 0x1f80);
    }
    value
}

/// An x87 control word: mostly with all exceptions masked.
pub fn control_word(rng: &mut Rng) -> u16 {
    let mut value = 0x037f;
    if rng.percent(40) {
        value = 0x007f | (rng.u64() as u16 & 0x0f00);
    }
    if rng.percent(12) {
        value &= !(rng.u64() as u16 & 0x3f);
    }
    value
}

/// The legacy region of a valid FXSAVE or XSAVE image.
pub fn put_fx(image: &mut [u8], rng: &mut Rng) {
    let fcw = control_word(rng);
    let mut fsw = rng.u64() as u16 & 0x7f7f;
    if rng.percent(80) {
        fsw &= 0x7800;
    }
    // The summary bits follow from flags and masks, as FXRSTOR makes them.
    if fsw & !fcw & 0x3f != 0 {
        fsw |= 0x8080;
    }
    image[fx::FCW..fx::FCW + 2].copy_from_slice(&fcw.to_le_bytes());
    image[fx::FSW..fx::FSW + 2].copy_from_slice(&fsw.to_le_bytes());
    image[fx::FTW] = if rng.percent(60) { 0xff } else { rng.u64() as u8 };
    image[fx::MXCSR..fx::MXCSR + 4].copy_from_slice(&mxcsr(rng).to_le_bytes());
    for slot in 0..8 {
        let at = fx::ST + 16 * slot;
        image[at..at + 10].copy_from_slice(&extended(rng));
    }
    for chunk in image[fx::XMM..fx::END].chunks_exact_mut(8) {
        chunk.copy_from_slice(&memory_word(rng).to_le_bytes());
    }
}

/// Images for the instructions that load state, at their offsets from [`XSAVE_IMAGES`].
pub fn put_images(area: &mut [u8], seed: u64) {
    let mut rng = Rng::new(seed ^ 0x1ace);
    let (standard, rest) = area.split_at_mut(0x400);
    let (compacted, rest) = rest.split_at_mut(0x400);
    let all = if host_has_all() { 7 } else { 3 };
    for (image, layout) in [(standard, 0), (compacted, 1 << 63 | all)] {
        image.fill(0);
        put_fx(image, &mut rng);
        for chunk in image[YMM_OFFSET..YMM_OFFSET + YMM_BYTES].chunks_exact_mut(8) {
            chunk.copy_from_slice(&memory_word(&mut rng).to_le_bytes());
        }
        let present = if rng.percent(70) { all } else { rng.below(all + 1) };
        image[512..520].copy_from_slice(&present.to_le_bytes());
        image[520..528].copy_from_slice(&layout.to_le_bytes());
    }
    let fnsave = &mut rest[..128];
    fnsave[..2].copy_from_slice(&control_word(&mut rng).to_le_bytes());
    fnsave[4..6].copy_from_slice(&((rng.below(8) as u16) << 11).to_le_bytes());
    fnsave[8..10].copy_from_slice(&(rng.u64() as u16).to_le_bytes());
    for slot in 0..8 {
        fnsave[28 + 10 * slot..38 + 10 * slot].copy_from_slice(&extended(&mut rng));
    }
    let words = &mut rest[(CONTROL_WORDS - FNSAVE_IMAGE) as usize..];
    for chunk in words[..64].chunks_exact_mut(4) {
        chunk.copy_from_slice(&mxcsr(&mut rng).to_le_bytes());
    }
    for chunk in words[64..128].chunks_exact_mut(2) {
        chunk.copy_from_slice(&control_word(&mut rng).to_le_bytes());
    }
}

/// What the generator expects of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Leads into the data area.
    Pointer,
    /// Leads into the stack area.
    Stack,
    /// A small number: an index or a count.
    Small,
    /// Anything.
    Value,
}

/// Registers to start from; general registers as `kinds` says.
pub fn initial_state(rng: &mut Rng, kinds: &[Kind; 16], bits: u32) -> State {
    let mut state = State::default();
    for (register, kind) in state.gpr.iter_mut().zip(kinds) {
        *register = match kind {
            Kind::Pointer if rng.percent(1) => bad_pointer(rng),
            Kind::Pointer => pointer(rng),
            Kind::Stack => stack_pointer(rng),
            Kind::Small => rng.below(24).wrapping_sub(if rng.percent(20) { 8 } else { 0 }),
            Kind::Value if rng.percent(20) => double(rng),
            Kind::Value => integer(rng),
        };
    }
    let flags = rng.u64() & 0x8d5;
    let direction = if rng.percent(12) { 0x400 } else { 0 };
    state.rflags = 0x202 | flags | direction;
    state.fs = pointer(rng) & !63;
    state.gs = pointer(rng) & !63;
    put_fx(&mut state.fx, rng);
    if host_has_all() {
        for chunk in state.ymm.chunks_exact_mut(8) {
            chunk.copy_from_slice(&memory_word(rng).to_le_bytes());
        }
    }
    if bits == 32 {
        state.normalise(32);
    }
    state
}

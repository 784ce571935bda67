//! The address space both executors give to a sequence, and what a sequence starts from.
//!
//! All areas lie below 2 GiB, so that absolute 32-bit displacements and sign-extended immediates
//! reach them. Between them nothing is mapped: running off an area is a page fault on both sides.

use crate::rng::Rng;
use iced_x86::{Decoder, DecoderOptions, Instruction};

/// Where sequences are placed: read and execute only, [`CODE_BYTES`] long.
pub const CODE: u64 = 0x1000_0000;
/// Bytes of the code area.
pub const CODE_BYTES: usize = 0x4000;
/// Code that may be written to, for programs that change themselves.
pub const PATCH: u64 = 0x1800_0000;
/// Bytes of it.
pub const PATCH_BYTES: usize = 0x4000;
/// Read-write data: pointers lead here.
pub const DATA: u64 = 0x2000_0000;
/// Bytes of the data area.
pub const DATA_BYTES: usize = 0x3000;
/// A page that can be read only.
pub const READ_ONLY: u64 = 0x2001_0000;
/// Bytes of the read-only area.
pub const READ_ONLY_BYTES: usize = 0x1000;
/// The stack.
pub const STACK: u64 = 0x3000_0000;
/// Bytes of the stack area.
pub const STACK_BYTES: usize = 0x2000;
/// Page with the native executor's own state; not mapped in the interpreter's address space.
pub const CONTEXT: u64 = 0x5bad_c000;
/// Where the native executor keeps the address that the jump at a sequence's end takes.
pub const EXIT_POINTER: u64 = CONTEXT + 696;

/// End of the code area's part for sequences; behind it are the [`stubs`].
pub const STUBS: u64 = CODE + CODE_BYTES as u64 - 64;
/// Where the native executor keeps the far pointer to a 32-bit sequence.
pub const FAR_POINTER: u64 = CONTEXT + 776;
/// Linux's code segments for user programs, by bits.
pub const CS32: u16 = 0x23;
/// See [`CS32`].
pub const CS64: u16 = 0x33;

/// 64-bit code at [`STUBS`]: the way out of 32-bit sequences, and, 16 bytes further, the way in.
pub fn stubs() -> Vec<u8> {
    let mut bytes = vec![0xff, 0x24, 0x25];
    bytes.extend_from_slice(&(EXIT_POINTER as u32).to_le_bytes());
    bytes.resize(16, 0xcc);
    bytes.extend_from_slice(&[0xff, 0x2c, 0x25]);
    bytes.extend_from_slice(&(FAR_POINTER as u32).to_le_bytes());
    bytes
}

/// Offset in the data area of two valid XSAVE images (standard, compacted), 0x400 bytes each.
pub const XSAVE_IMAGES: u64 = 0x2000;
/// Offset in the data area of a valid FNSAVE image.
pub const FNSAVE_IMAGE: u64 = 0x2800;
/// Offset in the data area of valid MXCSR values, then of x87 control words.
pub const CONTROL_WORDS: u64 = 0x2900;

/// Offset in the data area of the image that only XSAVEOPT writes to on purpose.
pub const XSAVEOPT_IMAGE: u64 = 0x2c00;

/// Bytes of the YMM registers' upper halves.
pub const YMM_BYTES: usize = 256;

/// Where they are in an XSAVE image of either format: no component comes before them.
pub const YMM_OFFSET: usize = 576;

/// Byte offsets in an FXSAVE image.
pub mod fx {
    /// Control word.
    pub const FCW: usize = 0;
    /// Status word.
    pub const FSW: usize = 2;
    /// Abridged tag word.
    pub const FTW: usize = 4;
    /// MXCSR.
    pub const MXCSR: usize = 24;
    /// First ST slot.
    pub const ST: usize = 32;
    /// First XMM register.
    pub const XMM: usize = 160;
    /// End of the registers.
    pub const END: usize = 416;
}

/// Registers of a sequence's start or end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    /// GPRs in encoding order.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub rflags: u64,
    /// RIP.
    pub rip: u64,
    /// FS base.
    pub fs: u64,
    /// GS base.
    pub gs: u64,
    /// An FXSAVE64 image up to the last XMM register.
    pub fx: [u8; fx::END],
    /// The upper halves of the YMM registers; zeros where the host has none.
    pub ymm: [u8; YMM_BYTES],
}

impl Default for State {
    fn default() -> Self {
        let mut state =
            Self { gpr: [0; 16], rflags: 0x202, rip: 0, fs: 0, gs: 0, fx: [0; fx::END], ymm: [0; YMM_BYTES] };
        state.put(fx::FCW, &0x037f_u16.to_le_bytes());
        state.put(fx::MXCSR, &0x1f80_u32.to_le_bytes());
        state
    }
}

impl State {
    /// Replaces bytes of the FXSAVE image.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.fx[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Clears what no instruction defines: reserved bytes of the image (MXCSR_MASK among them), and
    /// RF, which only tells how the state was captured; for 32-bit code also the upper halves.
    pub fn normalise(&mut self, bits: u32) {
        if bits == 32 {
            self.gpr[8..].fill(0);
            self.gpr.iter_mut().for_each(|register| *register &= 0xffff_ffff);
            (self.fs, self.gs) = (0, 0);
        }
        self.rflags &= !(1 << 16);
        self.fx[5] = 0;
        self.fx[28..32].fill(0);
        for slot in 0..8 {
            self.fx[fx::ST + slot * 16 + 10..fx::ST + slot * 16 + 16].fill(0);
        }
    }
}

/// The writable areas.
#[derive(Clone, PartialEq, Eq)]
pub struct Memory {
    /// The data area.
    pub data: Box<[u8; DATA_BYTES]>,
    /// The stack area.
    pub stack: Box<[u8; STACK_BYTES]>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { data: Box::new([0; DATA_BYTES]), stack: Box::new([0; STACK_BYTES]) }
    }
}

impl Memory {
    /// The contents that go with a seed; 0 gives zeroes (but for the images).
    pub fn filled(seed: u64) -> Self {
        let mut memory = Self::default();
        if seed != 0 {
            let mut rng = Rng::new(seed);
            for chunk in memory.data.chunks_exact_mut(8).chain(memory.stack.chunks_exact_mut(8)) {
                chunk.copy_from_slice(&crate::values::memory_word(&mut rng).to_le_bytes());
            }
        }
        crate::values::put_images(&mut memory.data[XSAVE_IMAGES as usize..], seed);
        memory
    }

    /// Writes into an area; addresses outside are ignored.
    pub fn poke(&mut self, address: u64, bytes: &[u8]) {
        for (index, &byte) in bytes.iter().enumerate() {
            let at = address.wrapping_add(index as u64);
            if let Some(place) = self.data.get_mut(at.wrapping_sub(DATA) as usize) {
                *place = byte;
            } else if let Some(place) = self.stack.get_mut(at.wrapping_sub(STACK) as usize) {
                *place = byte;
            }
        }
    }

    /// Both areas with their addresses.
    pub fn areas(&self) -> [(u64, &[u8]); 2] {
        [(DATA, &self.data[..]), (STACK, &self.stack[..])]
    }
}

/// The contents of the read-only page.
pub fn read_only_page() -> [u8; READ_ONLY_BYTES] {
    let mut page = [0; READ_ONLY_BYTES];
    let mut rng = Rng::new(0x0e0d);
    for chunk in page.chunks_exact_mut(8) {
        chunk.copy_from_slice(&crate::values::memory_word(&mut rng).to_le_bytes());
    }
    page
}

/// How an execution ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At the end of the sequence.
    Done,
    /// By an exception.
    Fault {
        /// Its vector.
        vector: u8,
        /// Its error code, zero without one.
        error: u32,
        /// The address of a page fault, else zero.
        address: u64,
    },
    /// It took too long.
    Limit,
    /// It left the safe path (an instruction that the host must not execute, or code between the
    /// sequence's instructions): not comparable.
    Unsafe,
    /// The interpreter gave up: always a mismatch.
    Broken(&'static str),
}

impl End {
    /// An exception. Whether a page fault beyond the areas says that there is a page is dropped: the
    /// kernel claims so for its own half, and it has pages of its own at the top of the lower half.
    pub fn fault(vector: u8, error: u32, address: u64) -> Self {
        let foreign = vector == 14 && !(CODE - 0x1000..STACK + 0x10_0000).contains(&address);
        Self::Fault { vector, error: if foreign { error & !1 } else { error }, address }
    }
}

/// What an execution left behind.
#[derive(Clone)]
pub struct Outcome {
    /// Why it ended.
    pub end: End,
    /// Registers.
    pub state: State,
    /// Memory.
    pub memory: Memory,
    /// The code at its end, where it could be changed.
    pub code: Vec<u8>,
}

impl Default for Outcome {
    fn default() -> Self {
        Self { end: End::Done, state: State::default(), memory: Memory::default(), code: Vec::new() }
    }
}

/// A program with what it starts from.
#[derive(Clone)]
pub struct Case {
    /// 64, or 32 for compatibility mode.
    pub bits: u32,
    /// The bytes, without the jump at the end.
    pub code: Vec<u8>,
    /// Offsets in `code` where its instructions begin.
    pub starts: Vec<usize>,
    /// Registers at the start; `rip` is where the code is placed.
    pub state: State,
    /// Seed of the memory's contents.
    pub fill: u64,
    /// Changes to it.
    pub pokes: Vec<(u64, Vec<u8>)>,
}

impl Case {
    /// Address behind the last instruction.
    pub fn end(&self) -> u64 {
        self.state.rip + self.code.len() as u64
    }

    /// Whether it may change itself.
    pub fn changes(&self) -> bool {
        self.state.rip >= PATCH
    }

    /// The memory at the start.
    pub fn memory(&self) -> Memory {
        let mut memory = Memory::filled(self.fill);
        for (address, bytes) in &self.pokes {
            memory.poke(*address, bytes);
        }
        memory
    }

    /// The decoded instructions.
    pub fn instructions(&self) -> Vec<Instruction> {
        let decode = |&start: &usize| {
            let rip = self.state.rip + start as u64;
            Decoder::with_ip(self.bits, &self.code[start..], rip, DecoderOptions::NONE).decode()
        };
        self.starts.iter().map(decode).collect()
    }

    /// The code followed by the jump out, `jmp qword ptr [EXIT_POINTER]` or `jmp CS64:STUBS`: natively
    /// it leads back to the executor, for the interpreter it is a fault of a known kind.
    pub fn image(&self) -> Vec<u8> {
        let mut image = self.code.clone();
        if self.bits == 32 {
            image.push(0xea);
            image.extend_from_slice(&(STUBS as u32).to_le_bytes());
            image.extend_from_slice(&CS64.to_le_bytes());
            return image;
        }
        image.extend_from_slice(&[0xff, 0x24, 0x25]);
        image.extend_from_slice(&(EXIT_POINTER as u32).to_le_bytes());
        image
    }
}

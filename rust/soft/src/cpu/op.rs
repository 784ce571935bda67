//! A decoded instruction: 32 bytes that hold its handler and everything the handler needs.

use super::{Cpu, R};

/// Executes one operation.
///
/// # Safety
/// The operation must have been bound for this handler (its register offsets are in range).
pub type Handler = unsafe fn(&mut Cpu, &Op) -> R;

/// The effective address needs [`Cpu::lin_slow`]: not 64-bit mode, or a 32-bit address size.
pub const SLOW: u8 = 1;
/// 16-bit address size (with SLOW).
pub const ADDR16: u8 = 2;
/// 32-bit address size (with SLOW).
pub const ADDR32: u8 = 4;
/// LOCK prefix.
pub const LOCK: u8 = 8;
/// REP/REPE prefix.
pub const REP: u8 = 16;
/// REPNE prefix.
pub const REPNE: u8 = 32;
/// 16-bit operand size (where a handler needs to know: far transfers, stack).
pub const OP16: u8 = 64;
/// 64-bit operand size.
pub const OP64: u8 = 128;

/// One decoded operation.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Op {
    /// What executes it.
    pub f: Handler,
    /// Immediate; for near branches the target, for far ones offset and selector, relative to the block's base.
    pub imm: u64,
    /// Displacement of the memory operand (RIP-relative: to the block's base).
    pub disp: i64,
    /// Base register's slot.
    pub base: u8,
    /// Index register's slot.
    pub index: u8,
    /// Low 2 bits: log2 of the index scale; next 3: segment number.
    pub scale_seg: u8,
    /// Byte offset of the destination register in the register file, or a free parameter.
    pub dst: u8,
    /// Byte offset of the source register, or a free parameter.
    pub src: u8,
    /// Flag bits above.
    pub flags: u8,
    /// Offset of the next instruction from the block's base.
    pub end: u8,
    /// This instruction's length.
    pub len: u8,
}

const _: () = assert!(std::mem::size_of::<Op>() == 32);

impl Op {
    /// The segment register's number of the memory operand.
    #[inline(always)]
    pub fn seg(&self) -> usize {
        (self.scale_seg >> 2) as usize & 7
    }

    /// Whether a flag is set.
    #[inline(always)]
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

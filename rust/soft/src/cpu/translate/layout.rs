//! Where translated code finds things: which guest register lives in which host register, and the
//! fields of [`Cpu`] it addresses.
//!
//! RBP points 128 bytes into the `Cpu`, so that its first 256 bytes take one-byte displacements.
//! RAX, RCX and R11 are scratch: RAX because LAHF needs it, RCX because JECXZ, the only test that
//! leaves the flags alone, does. RSP is the host's own stack.

use crate::cpu::state::{seg, Msrs, Segment};
use crate::cpu::Cpu;
use std::mem::{offset_of, size_of};
use std::sync::atomic::AtomicU32;

/// Host registers by encoding number.
#[allow(missing_docs)]
pub mod host {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R8: u8 = 8;
    pub const R9: u8 = 9;
    pub const R10: u8 = 10;
    pub const R11: u8 = 11;
    pub const R12: u8 = 12;
    pub const R13: u8 = 13;
    pub const R14: u8 = 14;
    pub const R15: u8 = 15;
}
use host::*;

/// Where the guest's RAX, RSP and so on are, for instructions that imply them.
pub const GUEST_RAX: u8 = R8;
/// See [`GUEST_RAX`].
pub const GUEST_RCX: u8 = R9;
/// See [`GUEST_RAX`].
pub const GUEST_RSP: u8 = R15;
/// See [`GUEST_RAX`].
pub const GUEST_RBP: u8 = R10;

/// A guest register's home while translated code runs: a host register, or else its slot in
/// `Cpu::regs`. As many as possible keep their number, RDX above all, which MUL and DIV imply.
pub const HOME: [Option<u8>; 16] = [
    Some(GUEST_RAX),
    Some(GUEST_RCX),
    Some(RDX),
    Some(RBX),
    Some(GUEST_RSP),
    Some(GUEST_RBP),
    Some(RSI),
    Some(RDI),
    None,
    None,
    None,
    None,
    Some(R12),
    Some(R13),
    Some(R14),
    None,
];

/// Fields that belong to translated code.
#[repr(C)]
pub(crate) struct Native {
    /// Zero while the guest's XMM registers are in the host's.
    pub xmm_closed: u8,
    /// Zero while the guest's MXCSR is in force, too.
    pub mxcsr_closed: u8,
    /// Zero while the upper halves of the YMM registers are there, too.
    pub ymm_closed: u8,
    /// A store changed code: leave after this instruction.
    pub left: u8,
    _pad: [u8; 2],
    /// What decides which code a linear address holds, see `Cpu::context`; low 32 bits.
    pub context: u32,
    _pad2: u32,
    /// Linear address of the page in which translated code runs.
    pub page: u64,
    /// The attention word.
    pub attention: *const AtomicU32,
    /// The page of the latest stack access, by linear address, when it may be written to; it is
    /// forgotten whenever the TLB forgets something.
    pub stack_page: u64,
    /// Host address minus linear address there.
    pub stack_addend: u64,
}

/// More of them, which are used less.
#[repr(C)]
pub(crate) struct Out {
    /// The jump table, see `link.rs`.
    pub jumps: *mut super::link::Jump,
    /// The operation that called out.
    pub op: u64,
    /// Where it stands: page offset of its block, index in it << 16.
    pub at: u32,
    /// The exit taken.
    pub exit: u32,
    /// The stop of the operation that called out, plus one.
    pub stop: u32,
    /// Code made for lockstep does not go beyond this many instructions retired.
    pub limit: u64,
    /// An event waits for IF to be set: setting it is the handlers' business.
    pub held: u8,
    _pad: [u8; 3],
    /// The latest entry of `returns`, as an offset in bytes.
    pub top: u32,
    /// The site that missed, see `link.rs`.
    pub site: *mut super::link::Site,
    /// Where the latest calls come back to.
    pub returns: [super::link::Return; super::link::RETURNS],
}

impl Out {
    pub fn new() -> Self {
        Self {
            jumps: std::ptr::null_mut(),
            op: 0,
            at: 0,
            exit: 0,
            stop: 0,
            limit: u64::MAX,
            held: 1,
            _pad: [0; 3],
            top: 0,
            site: std::ptr::null_mut(),
            returns: [super::link::Return::NONE; super::link::RETURNS],
        }
    }
}

impl Native {
    pub fn new(attention: &AtomicU32) -> Self {
        Self {
            xmm_closed: 1,
            mxcsr_closed: 1,
            ymm_closed: 1,
            left: 0,
            _pad: [0; 2],
            context: 0,
            _pad2: 0,
            page: 0,
            attention,
            stack_page: crate::cpu::mmu::INVALID,
            stack_addend: 0,
        }
    }
}

/// What RBP is ahead of the `Cpu`.
pub const BIAS: usize = 128;

const fn at(offset: usize) -> i32 {
    offset as i32 - BIAS as i32
}

/// Displacements from RBP.
#[allow(missing_docs)]
pub mod field {
    use super::*;
    pub const TLB: i32 = at(offset_of!(Cpu, tlb_now));
    pub const ASID: i32 = at(offset_of!(Cpu, asid));
    pub const RETIRED: i32 = at(offset_of!(Cpu, retired));
    pub const FLAGS: i32 = at(offset_of!(Cpu, flags));
    pub const SYS_FLAGS: i32 = at(offset_of!(Cpu, sys_flags));
    pub const RIP: i32 = at(offset_of!(Cpu, rip));
    pub const CR0: i32 = at(offset_of!(Cpu, cr0));
    pub const CR4: i32 = at(offset_of!(Cpu, cr4));
    pub const XCR0: i32 = at(offset_of!(Cpu, xcr0));
    pub const FP: i32 = at(offset_of!(Cpu, fp));
    pub const RIP_BASE: i32 = register(17);
    const NATIVE: usize = offset_of!(Cpu, native);
    pub const XMM_CLOSED: i32 = at(NATIVE + offset_of!(Native, xmm_closed));
    pub const MXCSR_CLOSED: i32 = at(NATIVE + offset_of!(Native, mxcsr_closed));
    pub const YMM_CLOSED: i32 = at(NATIVE + offset_of!(Native, ymm_closed));
    pub const LEFT: i32 = at(NATIVE + offset_of!(Native, left));
    pub const CONTEXT: i32 = at(NATIVE + offset_of!(Native, context));
    pub const PAGE: i32 = at(NATIVE + offset_of!(Native, page));
    pub const ATTENTION: i32 = at(NATIVE + offset_of!(Native, attention));
    pub const STACK_PAGE: i32 = at(NATIVE + offset_of!(Native, stack_page));
    pub const STACK_ADDEND: i32 = at(NATIVE + offset_of!(Native, stack_addend));
    const OUT: usize = offset_of!(Cpu, native_out);
    pub const JUMPS: i32 = at(OUT + offset_of!(Out, jumps));
    pub const OP: i32 = at(OUT + offset_of!(Out, op));
    pub const AT: i32 = at(OUT + offset_of!(Out, at));
    pub const EXIT: i32 = at(OUT + offset_of!(Out, exit));
    pub const STOP: i32 = at(OUT + offset_of!(Out, stop));
    pub const LIMIT: i32 = at(OUT + offset_of!(Out, limit));
    pub const HELD: i32 = at(OUT + offset_of!(Out, held));
    pub const TOP: i32 = at(OUT + offset_of!(Out, top));
    pub const SITE: i32 = at(OUT + offset_of!(Out, site));
    pub const RETURNS: i32 = at(OUT + offset_of!(Out, returns));
    pub const CPL: i32 = at(offset_of!(Cpu, cpl));
    pub const SHADOW: i32 = at(offset_of!(Cpu, shadow));
    pub const CODE_SIZE: i32 = at(offset_of!(Cpu, code_size));
    pub const KERNEL_GS_BASE: i32 = at(offset_of!(Cpu, msr) + offset_of!(Msrs, kernel_gs_base));
    /// The base in GS's descriptor, which `seg_base` follows.
    pub const GS_BASE: i32 = at(offset_of!(Cpu, segs) + seg::GS * size_of::<Segment>() + offset_of!(Segment, base));

    /// A guest register's slot.
    pub const fn register(index: usize) -> i32 {
        at(offset_of!(Cpu, regs)) + 8 * index as i32
    }

    /// A segment's base.
    pub const fn seg_base(index: usize) -> i32 {
        at(offset_of!(Cpu, seg_base)) + 8 * index as i32
    }
}

const _: () = assert!(field::STACK_ADDEND < 128);
// They are looked at together.
const _: () = assert!(field::MXCSR_CLOSED == field::XMM_CLOSED + 1 && field::YMM_CLOSED == field::XMM_CLOSED + 2);

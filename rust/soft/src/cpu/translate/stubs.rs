//! The fixed pieces at the start of a code region: ways in and out, calls of handlers. `lookups.rs` and `doors.rs`
//! have the others.
//!
//! Translated code runs with RSP aligned to 16 bytes, so that a stub it calls may call Rust after
//! moving RSP by 8. At every call-out the flags are in the `Cpu`.

use super::asm::{cc, cell, group, Asm, Label, Rm};
use super::layout::{field, host::*, BIAS, HOME};
use crate::cpu::state::CodeSize;
use crate::host::fpstate::MXCSR_INIT;

/// Why translated code came back.
#[allow(missing_docs)]
pub mod reason {
    /// By a direct exit that may be linked; its number is in `Native::exit`.
    pub const LINK: u32 = 1;
    /// `Cpu::rip` is where to go on.
    pub const NEXT: u32 = 2;
    /// As NEXT, after an indirect branch: `Native::exit` says how to take it back.
    pub const INDIRECT: u32 = 3;
    /// A handler stopped: `Native::op`, `at`, `stop`.
    pub const STOP: u32 = 4;
    /// As NEXT, and the block there is due for a trace.
    pub const HOT: u32 = 5;
}

/// Offsets in the region.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct Stubs {
    /// `extern "sysv64" fn(rbp, code) -> reason`.
    pub enter: usize,
    /// Calls a handler as an instruction of its own; vectors are closed afterwards.
    pub call: usize,
    /// The same, then leaves.
    pub call_and_leave: usize,
    /// Calls a handler in place of an instruction whose fast path missed: vectors as before.
    pub miss: usize,
    /// The same; afterwards the flags are in RFLAGS.
    pub miss_with_flags: usize,
    /// ECX: number of a linkable exit; flags in RFLAGS, or in the `Cpu`.
    pub link_host: usize,
    pub link: usize,
    /// R11: where to go.
    pub next: usize,
    /// The same: the block there is hot.
    pub hot: usize,
    pub direct_host: usize,
    pub direct: usize,
    pub indirect: usize,
    /// By write and log2 of size. R11: a linear address of the stack, at which the stack page was not met: it
    /// becomes the host address, and its page the stack page if it may be, and ZF is set, or the access missed.
    /// Changes RAX and RCX.
    pub stack: [[usize; 4]; 2],
    /// By write and log2 of size. R11: a linear address; it becomes the host's and ZF is set, or the access
    /// missed. Changes RAX and RCX.
    pub access: [[usize; 6]; 2],
    /// By write. After a look-up that did not meet its page: it is put back in front where it was displaced, R11
    /// becomes the host's address and ZF is set, or the access missed. Changes RAX.
    pub second: [usize; 2],
    /// R11: where to go, `Out::site`: whose branch it is.
    pub far: usize,
    /// By number of `vector::open::DOORS`; ECX is zero where it is open now.
    pub open: [usize; 4],
}

/// Calls an operation: zero, or the stop's number plus one.
pub type CallOut = unsafe extern "sysv64" fn(*mut crate::cpu::Cpu, *const crate::cpu::op::Op) -> u32;

const SAVED: [u8; 6] = [RBX, RBP, R12, R13, R14, R15];

pub(super) struct Builder {
    pub asm: Asm,
    /// Stores registers, closes vectors, returns with the reason in EAX.
    pub leave: Label,
    /// The same, registers being stored.
    leave_stored: Label,
    pub close: Label,
    /// On to R11.
    pub direct: Label,
    pub open: [Label; 4],
}

/// The code of the stubs, to be put at the region's start.
pub fn build(call_out: CallOut) -> (Vec<u8>, Stubs) {
    let mut asm = Asm::new(0);
    let [leave, leave_stored, close, direct] = std::array::from_fn(|_| asm.label());
    let open = std::array::from_fn(|_| asm.label());
    let mut b = Builder { asm, leave, leave_stored, close, direct, open };
    let mut stubs = Stubs::default();
    // Data first: the host's MXCSR.
    b.asm.bytes(&MXCSR_INIT.to_le_bytes());
    b.align();
    stubs.enter = b.enter();
    stubs.call = b.call(call_out, Kind::Call);
    stubs.call_and_leave = b.call(call_out, Kind::Leave);
    stubs.miss = b.call(call_out, Kind::Miss);
    stubs.miss_with_flags = b.call(call_out, Kind::MissWithFlags);
    (stubs.link_host, stubs.link) = b.link();
    stubs.next = b.next(reason::NEXT);
    stubs.hot = b.next(reason::HOT);
    (stubs.direct_host, stubs.direct) = b.look_up(reason::NEXT);
    (_, stubs.indirect) = b.look_up(reason::INDIRECT);
    stubs.far = b.far();
    stubs.second = [false, true].map(|write| b.second(write));
    stubs.access =
        [false, true].map(|write| [1, 2, 4, 8, 16, 32].map(|size| b.access(stubs.second[write as usize], size, write)));
    let stack = b.stack();
    stubs.stack = [false, true]
        .map(|write| [1, 2, 4, 8].map(|size| b.stack_access([stack, stubs.second[write as usize]], size, write)));
    b.leaving();
    b.closing();
    stubs.open = b.opening();
    b.asm.finish();
    (b.asm.code, stubs)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Call,
    Leave,
    Miss,
    MissWithFlags,
}

fn homes() -> impl Iterator<Item = (u8, Rm)> {
    HOME.iter().enumerate().filter_map(|(guest, home)| home.map(|h| (h, cell(field::register(guest)))))
}

impl Builder {
    pub(super) fn align(&mut self) -> usize {
        while !self.asm.here().is_multiple_of(32) {
            self.asm.bytes(&[0xcc]);
        }
        self.asm.here()
    }

    pub(super) fn push(&mut self, reg: u8) {
        self.asm.bytes(&[0x40 | reg >> 3, 0x50 | reg & 7]);
    }

    pub(super) fn pop(&mut self, reg: u8) {
        self.asm.bytes(&[0x40 | reg >> 3, 0x58 | reg & 7]);
    }

    pub(super) fn ret(&mut self) {
        self.asm.bytes(&[0xc3]);
    }

    fn call_label(&mut self, label: Label) {
        // CALL has the same displacement as JMP.
        let at = self.asm.code.len();
        self.asm.jump(label);
        self.asm.code[at] = 0xe8;
    }

    fn store_registers(&mut self) {
        homes().for_each(|(host, slot)| self.asm.store(slot, host));
    }

    fn load_registers(&mut self) {
        homes().for_each(|(host, slot)| self.asm.load(host, slot));
    }

    fn move_stack(&mut self, by: i32) {
        self.asm.lea(true, RSP, Some(RSP), None, by);
    }

    fn enter(&mut self) -> usize {
        let start = self.align();
        SAVED.iter().for_each(|&reg| self.push(reg));
        self.move_stack(-8);
        self.asm.store(Rm::Reg(RBP), RDI);
        self.asm.store(Rm::Reg(RAX), RSI);
        self.load_registers();
        self.asm.bytes(&[0xff, 0xe0]); // jmp rax
        start
    }

    fn leaving(&mut self) {
        self.align();
        self.asm.place(self.leave);
        self.store_registers();
        self.asm.place(self.leave_stored);
        // Closing needs RAX.
        self.asm.store32(Rm::Reg(RBX), RAX);
        let closed = self.asm.label();
        self.asm.cmp_byte(cell(field::XMM_CLOSED), 0);
        self.asm.jump_if(cc::NE, closed);
        self.call_label(self.close);
        self.asm.place(closed);
        self.asm.store32(Rm::Reg(RAX), RBX);
        self.move_stack(8);
        SAVED.iter().rev().for_each(|&reg| self.pop(reg));
        self.ret();
    }

    /// In: RCX the operation, EAX the block's page offset and the operation's index << 16.
    fn call(&mut self, call_out: CallOut, kind: Kind) -> usize {
        let start = self.align();
        let (stopped, left, closed, final_stop) =
            (self.asm.label(), self.asm.label(), self.asm.label(), self.asm.label());
        self.asm.store32(cell(field::AT), RAX);
        self.asm.load_short(2, RAX, Rm::Reg(RAX));
        self.asm.alu(true, group::ADD, RAX, cell(field::PAGE));
        self.asm.store(cell(field::RIP_BASE), RAX);
        self.asm.store(cell(field::OP), RCX);
        self.store_registers();
        self.move_stack(-8);
        // All closed bytes at once, to know after the call what was open.
        self.asm.load32(RBX, cell(field::XMM_CLOSED));
        self.asm.cmp_byte(cell(field::XMM_CLOSED), 0);
        self.asm.jump_if(cc::NE, closed);
        self.call_label(self.close);
        self.asm.place(closed);
        self.asm.lea(true, RDI, Some(RBP), None, -(BIAS as i32));
        self.asm.load(RSI, cell(field::OP));
        self.asm.load_imm64(RAX, call_out as usize as u64);
        self.asm.bytes(&[0xff, 0xd0]); // call rax
        self.asm.alu(false, group::OR, RAX, Rm::Reg(RAX));
        self.asm.jump_if(cc::NE, stopped);
        if kind == Kind::Leave {
            self.asm.jump(left);
        } else {
            self.asm.cmp_byte(cell(field::LEFT), 0);
            self.asm.jump_if(cc::NE, left);
        }
        if matches!(kind, Kind::Miss | Kind::MissWithFlags) {
            self.reopen(left);
        }
        self.load_registers();
        // See `near.rs`.
        self.asm.store_imm(8, Rm::Reg(R11), -1);
        self.move_stack(8);
        if kind == Kind::MissWithFlags {
            self.asm.load_flags(field::FLAGS);
        }
        self.ret();
        self.asm.place(left);
        self.asm.load_imm(RAX, crate::cpu::Stop::Leave as u32 + 1);
        self.asm.jump(final_stop);
        self.asm.place(stopped);
        self.branched(final_stop);
        self.asm.place(final_stop);
        self.asm.store32(cell(field::STOP), RAX);
        // The return address goes, too.
        self.move_stack(16);
        self.asm.load_imm(RAX, reason::STOP);
        self.asm.jump(self.leave_stored);
        start
    }

    /// A handler branched: on to where, without the loop in between, if it is 64-bit code still and interrupts
    /// are not held off.
    fn branched(&mut self, otherwise: Label) {
        self.asm.alu_imm(false, group::CMP, Rm::Reg(RAX), crate::cpu::Stop::Branch as i32 + 1);
        self.asm.jump_if(cc::NE, otherwise);
        self.asm.cmp_byte(cell(field::SHADOW), 0);
        self.asm.jump_if(cc::NE, otherwise);
        self.asm.cmp_byte(cell(field::CODE_SIZE), CodeSize::B64 as u8);
        self.asm.jump_if(cc::NE, otherwise);
        self.load_registers();
        self.asm.load(R11, cell(field::RIP));
        // The return address goes, too.
        self.move_stack(16);
        self.asm.jump(self.direct);
    }

    /// Opens what EBX says was open; RBX is loaded anew afterwards.
    fn reopen(&mut self, failed: Label) {
        for door in 0..3 {
            let was_closed = self.asm.label();
            self.asm.modrm(&[], false, false, &[0xf7], 0, Rm::Reg(RBX)); // test ebx, mask
            self.asm.bytes(&(0xff_u32 << (8 * door)).to_le_bytes());
            self.asm.jump_if(cc::NE, was_closed);
            self.call_label(self.open[door]);
            self.asm.alu(false, group::OR, RCX, Rm::Reg(RCX));
            self.asm.jump_if(cc::NE, failed);
            self.asm.place(was_closed);
        }
    }

    fn link(&mut self) -> (usize, usize) {
        let host = self.align();
        self.asm.save_flags(field::FLAGS);
        let start = self.asm.here();
        self.asm.store32(cell(field::EXIT), RCX);
        self.asm.load_imm(RAX, reason::LINK);
        self.asm.jump(self.leave);
        (host, start)
    }

    fn next(&mut self, reason: u32) -> usize {
        let start = self.align();
        self.asm.store(cell(field::RIP), R11);
        self.asm.load_imm(RAX, reason);
        self.asm.jump(self.leave);
        start
    }
}

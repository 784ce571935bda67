//! The fixed pieces at the start of a code region: ways in and out, calls of handlers, the jump
//! table's look-up, and the doors of the vector registers.
//!
//! Translated code runs with RSP aligned to 16 bytes, so that a stub it calls may call Rust after
//! moving RSP by 8. At every call-out the flags are in the `Cpu`.

use super::asm::{cc, cell, group, Asm, Label, Rm, Vex};
use super::layout::{field, host::*, BIAS, HOME};
use super::link::{jump, JUMPS};
use super::vector::open;
use crate::cpu::state::{cr0, cr4};
use crate::host::fpstate::{MXCSR, MXCSR_INIT, XMM, YMM_HIGH};
use crate::host::xsave::{AVX, SSE};

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
    pub direct_host: usize,
    pub direct: usize,
    pub indirect: usize,
    /// R11: a linear address of the stack. Where its page may be written to, it becomes the stack
    /// page, R11 the host address, and ZF is set. Changes RAX and RCX.
    pub stack: usize,
    /// By number of `vector::open::DOORS`; ECX is zero where it is open now.
    pub open: [usize; 4],
}

/// Calls an operation: zero, or the stop's number plus one.
pub type CallOut = unsafe extern "sysv64" fn(*mut crate::cpu::Cpu, *const crate::cpu::op::Op) -> u32;

const SAVED: [u8; 6] = [RBX, RBP, R12, R13, R14, R15];

struct Builder {
    asm: Asm,
    /// Stores registers, closes vectors, returns with the reason in EAX.
    leave: Label,
    /// The same, registers being stored.
    leave_stored: Label,
    close: Label,
    open: [Label; 4],
}

/// The code of the stubs, to be put at the region's start.
pub fn build(call_out: CallOut) -> (Vec<u8>, Stubs) {
    let mut asm = Asm::new(0);
    let [leave, leave_stored, close] = std::array::from_fn(|_| asm.label());
    let open = std::array::from_fn(|_| asm.label());
    let mut b = Builder { asm, leave, leave_stored, close, open };
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
    stubs.next = b.next();
    (stubs.direct_host, stubs.direct) = b.look_up(reason::NEXT);
    (_, stubs.indirect) = b.look_up(reason::INDIRECT);
    stubs.stack = b.stack();
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
    fn align(&mut self) -> usize {
        while !self.asm.here().is_multiple_of(32) {
            self.asm.bytes(&[0xcc]);
        }
        self.asm.here()
    }

    fn push(&mut self, reg: u8) {
        self.asm.bytes(&[0x40 | reg >> 3, 0x50 | reg & 7]);
    }

    fn pop(&mut self, reg: u8) {
        self.asm.bytes(&[0x40 | reg >> 3, 0x58 | reg & 7]);
    }

    fn ret(&mut self) {
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
        let (stopped, left, closed) = (self.asm.label(), self.asm.label(), self.asm.label());
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
        self.move_stack(8);
        if kind == Kind::MissWithFlags {
            self.asm.load_flags(field::FLAGS);
        }
        self.ret();
        self.asm.place(left);
        self.asm.load_imm(RAX, crate::cpu::Stop::Leave as u32 + 1);
        self.asm.place(stopped);
        self.asm.store32(cell(field::STOP), RAX);
        // The return address goes, too.
        self.move_stack(16);
        self.asm.load_imm(RAX, reason::STOP);
        self.asm.jump(self.leave_stored);
        start
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

    fn next(&mut self) -> usize {
        let start = self.align();
        self.asm.store(cell(field::RIP), R11);
        self.asm.load_imm(RAX, reason::NEXT);
        self.asm.jump(self.leave);
        start
    }

    /// R11 is a linear address: on to its code, if the jump table has it and nobody wants attention.
    fn look_up(&mut self, missed: u32) -> (usize, usize) {
        let host = self.align();
        self.asm.save_flags(field::FLAGS);
        let start = self.asm.here();
        let miss = self.asm.label();
        let entry = |offset: usize| Rm::Mem(RAX, offset as i32);
        self.asm.load(RCX, cell(field::ATTENTION));
        self.asm.alu_imm(false, group::CMP, Rm::Mem(RCX, 0), 0);
        self.asm.jump_if(cc::NE, miss);
        self.asm.load32(RAX, Rm::Reg(R11));
        self.asm.shift(false, 5, RAX, 12);
        self.asm.alu(false, group::XOR, RAX, Rm::Reg(R11));
        self.asm.alu_imm(false, group::AND, Rm::Reg(RAX), JUMPS as i32 - 1);
        self.asm.shift(false, 4, RAX, jump::SHIFT);
        self.asm.alu(true, group::ADD, RAX, cell(field::JUMPS));
        self.asm.alu(true, group::CMP, R11, entry(jump::LINEAR));
        self.asm.jump_if(cc::NE, miss);
        self.asm.load32(RCX, cell(field::CONTEXT));
        self.asm.alu(false, group::CMP, RCX, entry(jump::CONTEXT));
        self.asm.jump_if(cc::NE, miss);
        self.asm.load(RCX, entry(jump::WORD));
        self.asm.load32(RCX, Rm::Mem(RCX, 4));
        self.asm.alu(false, group::CMP, RCX, entry(jump::GENERATION));
        self.asm.jump_if(cc::NE, miss);
        self.asm.alu_imm(true, group::AND, Rm::Reg(R11), -4096);
        self.asm.store(cell(field::PAGE), R11);
        self.asm.modrm(&[], false, false, &[0xff], 4, entry(jump::CODE)); // jmp [entry.code]
        self.asm.place(miss);
        self.asm.store(cell(field::RIP), R11);
        self.asm.load_imm(RAX, missed);
        self.asm.jump(self.leave);
        (host, start)
    }

    fn stack(&mut self) -> usize {
        let start = self.align();
        let no = self.asm.label();
        super::memory::find_entry(&mut self.asm);
        self.asm.load(RAX, Rm::Reg(R11));
        self.asm.alu_imm(true, group::AND, Rm::Reg(RAX), -4096);
        self.asm.alu(true, group::OR, RAX, cell(field::ASID));
        self.asm.alu(true, group::CMP, RAX, Rm::Mem(RCX, super::memory::WRITE_TAG));
        self.asm.jump_if(cc::NE, no);
        self.asm.load(RCX, Rm::Mem(RCX, super::memory::ADDEND));
        self.asm.store(cell(field::STACK_ADDEND), RCX);
        self.asm.load(RAX, Rm::Reg(R11));
        self.asm.alu_imm(true, group::AND, Rm::Reg(RAX), -4096);
        self.asm.store(cell(field::STACK_PAGE), RAX);
        self.asm.alu(true, group::ADD, R11, Rm::Reg(RCX));
        self.asm.alu(false, group::XOR, RAX, Rm::Reg(RAX));
        self.asm.place(no);
        self.ret();
        start
    }

    /// Vector registers to the `Cpu`, the host's MXCSR back. Changes RAX.
    fn closing(&mut self) {
        self.align();
        self.asm.place(self.close);
        self.asm.load(RAX, cell(field::FP));
        for index in 0..16 {
            // movaps [rax + XMM + 16 * index], xmm
            self.asm.modrm(&[], false, false, &[0x0f, 0x29], index, Rm::Mem(RAX, (XMM + 16 * index as usize) as i32));
        }
        self.close_ymm();
        let done = self.asm.label();
        self.asm.cmp_byte(cell(field::MXCSR_CLOSED), 0);
        self.asm.jump_if(cc::NE, done);
        self.asm.modrm(&[], false, false, &[0x0f, 0xae], 3, Rm::Mem(RAX, MXCSR as i32)); // stmxcsr
        self.asm.bytes(&[0x0f, 0xae, 0x15]); // ldmxcsr [rip + displacement]: the region's first word
        let displacement = -(self.asm.here() as i32 + 4);
        self.asm.bytes(&displacement.to_le_bytes());
        self.asm.place(done);
        self.asm.modrm(&[0x66], false, false, &[0xc7], 0, cell(field::XMM_CLOSED));
        self.asm.bytes(&[1, 1]);
        self.ret();
    }

    /// RAX is the vector state's address. Upper halves left in use would slow down SSE instructions.
    fn close_ymm(&mut self) {
        let closed = self.asm.label();
        self.asm.cmp_byte(cell(field::YMM_CLOSED), 0);
        self.asm.jump_if(cc::NE, closed);
        for index in 0..16 {
            let half = Rm::Mem(RAX, (YMM_HIGH + 16 * index as usize) as i32);
            self.asm.vex(&Vex { map: 3, prefix: 1, long: true, wide: false, opcode: 0x19 }, index, 0, half); // vextractf128
            self.asm.bytes(&[1]);
        }
        self.asm.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
        self.asm.store_imm(1, cell(field::YMM_CLOSED), 1);
        self.asm.place(closed);
    }

    /// RAX is the vector state's address.
    fn open_ymm(&mut self) {
        let open = self.asm.label();
        self.asm.cmp_byte(cell(field::YMM_CLOSED), 0);
        self.asm.jump_if(cc::E, open);
        for index in 0..16 {
            let half = Rm::Mem(RAX, (YMM_HIGH + 16 * index as usize) as i32);
            let insert = Vex { map: 3, prefix: 1, long: true, wide: false, opcode: 0x18 };
            self.asm.vex(&insert, index, index, half); // vinsertf128
            self.asm.bytes(&[1]);
        }
        self.asm.store_imm(1, cell(field::YMM_CLOSED), 0);
        self.asm.place(open);
    }

    /// The doors. They change RAX and RCX, and keep the flags.
    fn opening(&mut self) -> [usize; 4] {
        [0, 1, 2, 3].map(|door| {
            let start = self.align();
            self.asm.place(self.open[door]);
            let (done, no) = (self.asm.label(), self.asm.label());
            self.asm.bytes(&[0x9c]); // pushfq
            self.asm.load_imm(RCX, 1);
            self.test(field::CR0, (cr0::EM | cr0::TS) as u32);
            self.asm.jump_if(cc::NE, no);
            self.test(field::CR4, cr4::OSFXSR as u32);
            self.asm.jump_if(cc::E, no);
            let wanted = open::DOORS[door];
            if wanted & open::YMM != 0 {
                self.test(field::CR4, cr4::OSXSAVE as u32);
                self.asm.jump_if(cc::E, no);
                self.asm.load32(RAX, cell(field::XCR0));
                self.asm.alu_imm(false, group::AND, Rm::Reg(RAX), (SSE | AVX) as i32);
                self.asm.alu_imm(false, group::CMP, Rm::Reg(RAX), (SSE | AVX) as i32);
                self.asm.jump_if(cc::NE, no);
            }
            self.open_xmm();
            if wanted & open::YMM != 0 {
                self.open_ymm();
            }
            if wanted & open::MXCSR != 0 {
                self.open_mxcsr(done, no);
            }
            self.asm.place(done);
            self.asm.alu(false, group::XOR, RCX, Rm::Reg(RCX));
            self.asm.place(no);
            self.asm.bytes(&[0x9d]); // popfq
            self.ret();
            start
        })
    }

    fn test(&mut self, at: i32, mask: u32) {
        self.asm.modrm(&[], false, false, &[0xf7], 0, cell(at));
        self.asm.bytes(&mask.to_le_bytes());
    }

    fn open_xmm(&mut self) {
        let open = self.asm.label();
        self.asm.load(RAX, cell(field::FP));
        self.asm.cmp_byte(cell(field::XMM_CLOSED), 0);
        self.asm.jump_if(cc::E, open);
        for index in 0..16 {
            self.asm.modrm(&[], false, false, &[0x0f, 0x28], index, Rm::Mem(RAX, (XMM + 16 * index as usize) as i32));
        }
        self.asm.store_imm(1, cell(field::XMM_CLOSED), 0);
        self.asm.place(open);
    }

    /// RAX is the vector state's address. Every exception must be masked.
    fn open_mxcsr(&mut self, done: Label, no: Label) {
        self.asm.cmp_byte(cell(field::MXCSR_CLOSED), 0);
        self.asm.jump_if(cc::E, done);
        self.asm.load32(RCX, Rm::Mem(RAX, MXCSR as i32));
        // ECX becomes nonzero where a mask bit is clear.
        self.asm.modrm(&[], false, false, &[0xf7], 2, Rm::Reg(RCX)); // not ecx
        self.asm.alu_imm(false, group::AND, Rm::Reg(RCX), 0x1f80);
        self.asm.jump_if(cc::NE, no);
        self.asm.modrm(&[], false, false, &[0x0f, 0xae], 2, Rm::Mem(RAX, MXCSR as i32)); // ldmxcsr
        self.asm.store_imm(1, cell(field::MXCSR_CLOSED), 0);
    }
}

//! The fixed pieces of code that look something up: code in the jump table, pages in the TLB.

use super::asm::{cc, cell, group, Asm, Label, Rm};
use super::layout::{field, host::*};
use super::link::{jump, site, JUMPS};
use super::stubs::{reason, Builder};

/// RAX = the entry of the jump table for linear address R11, which holds now. Changes RCX.
pub(super) fn look_up_jump(asm: &mut Asm, miss: Label) {
    let entry = |offset: usize| Rm::Mem(RAX, offset as i32);
    asm.load(RCX, cell(field::ATTENTION));
    asm.alu_imm(false, group::CMP, Rm::Mem(RCX, 0), 0);
    asm.jump_if(cc::NE, miss);
    asm.load32(RAX, Rm::Reg(R11));
    asm.shift(false, 5, RAX, 12);
    asm.alu(false, group::XOR, RAX, Rm::Reg(R11));
    asm.alu_imm(false, group::AND, Rm::Reg(RAX), JUMPS as i32 - 1);
    asm.shift(false, 4, RAX, jump::SHIFT);
    asm.alu(true, group::ADD, RAX, cell(field::JUMPS));
    asm.alu(true, group::CMP, R11, entry(jump::LINEAR));
    asm.jump_if(cc::NE, miss);
    asm.load32(RCX, cell(field::CONTEXT));
    asm.alu(false, group::CMP, RCX, entry(jump::CONTEXT));
    asm.jump_if(cc::NE, miss);
    asm.load(RCX, entry(jump::WORD));
    asm.load32(RCX, Rm::Mem(RCX, 4));
    asm.alu(false, group::CMP, RCX, entry(jump::GENERATION));
    asm.jump_if(cc::NE, miss);
}

/// On to the code of RAX's entry.
pub(super) fn enter_jump(asm: &mut Asm) {
    asm.alu_imm(true, group::AND, Rm::Reg(R11), -4096);
    asm.store(cell(field::PAGE), R11);
    asm.modrm(&[], false, false, &[0xff], 4, Rm::Mem(RAX, jump::CODE as i32)); // jmp [entry.code]
}

impl Builder {
    /// R11 is a linear address: on to its code, if the jump table has it and nobody wants attention.
    pub(super) fn look_up(&mut self, missed: u32) -> (usize, usize) {
        let host = self.align();
        self.asm.save_flags(field::FLAGS);
        let start = self.asm.here();
        if missed == reason::NEXT {
            self.asm.place(self.direct);
        }
        let miss = self.asm.label();
        look_up_jump(&mut self.asm, miss);
        enter_jump(&mut self.asm);
        self.asm.place(miss);
        self.missed(missed);
        (host, start)
    }

    pub(super) fn missed(&mut self, missed: u32) {
        self.asm.store(cell(field::RIP), R11);
        self.asm.load_imm(RAX, missed);
        self.asm.jump(self.leave);
    }

    /// As `direct`, and the site keeps what is found.
    pub(super) fn far(&mut self) -> usize {
        let start = self.align();
        let miss = self.asm.label();
        look_up_jump(&mut self.asm, miss);
        self.asm.load(RCX, cell(field::SITE));
        self.asm.alu_imm(true, group::AND, Rm::Reg(R11), -4096);
        self.asm.store(Rm::Mem(RCX, site::TO), R11);
        self.asm.load(R11, cell(field::PAGE));
        self.asm.store(Rm::Mem(RCX, site::FROM), R11);
        for (from, to) in [(jump::CONTEXT, site::CONTEXT), (jump::GENERATION, site::GENERATION)] {
            self.asm.load32(R11, Rm::Mem(RAX, from as i32));
            self.asm.store32(Rm::Mem(RCX, to), R11);
        }
        for (from, to) in [(jump::WORD, site::WORD), (jump::CODE, site::CODE)] {
            self.asm.load(R11, Rm::Mem(RAX, from as i32));
            self.asm.store(Rm::Mem(RCX, to), R11);
        }
        self.asm.load(R11, Rm::Mem(RCX, site::TO));
        self.asm.store(cell(field::PAGE), R11);
        self.asm.modrm(&[], false, false, &[0xff], 4, Rm::Mem(RAX, jump::CODE as i32));
        self.asm.place(miss);
        self.missed(reason::NEXT);
        start
    }

    /// See [`Stubs::access`].
    pub(super) fn access(&mut self, second: usize, size: usize, write: bool) -> usize {
        let start = self.align();
        let miss = self.asm.label();
        super::memory::look_up(&mut self.asm, miss, size, write);
        self.asm.alu(false, group::XOR, RAX, Rm::Reg(RAX));
        self.ret();
        self.asm.place(miss);
        self.asm.jump_to(second);
        start
    }

    /// See [`Stubs::second`]. RCX is the entry, RAX the tag that was wanted.
    pub(super) fn second(&mut self, write: bool) -> usize {
        use super::memory::{ADDEND, BEHIND, READ_TAG, WRITE_TAG};
        let start = self.align();
        let no = self.asm.label();
        let tag = if write { WRITE_TAG } else { READ_TAG };
        self.asm.alu(true, group::CMP, RAX, Rm::Mem(RCX, BEHIND + tag));
        self.asm.jump_if(cc::NE, no);
        self.push(R11);
        for field in (0..4).map(|word| 8 * word) {
            self.asm.load(RAX, Rm::Mem(RCX, field));
            self.asm.load(R11, Rm::Mem(RCX, BEHIND + field));
            self.asm.store(Rm::Mem(RCX, field), R11);
            self.asm.store(Rm::Mem(RCX, BEHIND + field), RAX);
        }
        self.pop(R11);
        self.asm.alu(true, group::ADD, R11, Rm::Mem(RCX, ADDEND));
        self.asm.alu(false, group::XOR, RAX, Rm::Reg(RAX));
        self.asm.place(no);
        self.ret();
        start
    }

    /// See [`Stubs::stack`]; `fill` makes the page of R11 the stack page.
    pub(super) fn stack_access(&mut self, [fill, second]: [usize; 2], size: usize, write: bool) -> usize {
        let start = self.align();
        let (crossing, done, miss) = (self.asm.label(), self.asm.label(), self.asm.label());
        if size > 1 {
            // An access that crosses into the next page must not take this page's address.
            self.asm.load32(RAX, Rm::Reg(R11));
            self.asm.alu_imm(false, group::AND, Rm::Reg(RAX), size as i32 - 1);
            self.asm.jump_if(cc::NE, crossing);
        }
        self.asm.call_to(fill);
        self.asm.jump_if(cc::E, done);
        self.asm.place(crossing);
        super::memory::look_up(&mut self.asm, miss, size, write);
        self.asm.alu(false, group::XOR, RAX, Rm::Reg(RAX));
        self.asm.place(done);
        self.ret();
        self.asm.place(miss);
        self.asm.jump_to(second);
        start
    }

    pub(super) fn stack(&mut self) -> usize {
        let start = self.align();
        let no = self.asm.label();
        super::memory::find_entry(&mut self.asm, None);
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
}

//! Emit: what a kernel does with its flags and bases all the time: CLI, STI, PUSHF, POPF, SWAPGS.
//!
//! Fast at CPL 0, and while no event waits for IF (`Out::held`); the handlers do all else.

use super::asm::{cc, cell, group, Rm};
use super::emit::{Emitter, Flags};
use super::layout::{field, host::*};
use super::memory::RSP_NUMBER;
use crate::cpu::state::{rflags, seg};

/// What POPF at CPL 0 changes with consequences, or rarely.
const SERIOUS: u64 = rflags::TF | rflags::DF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID;

impl Emitter<'_> {
    fn need_cpl0(&mut self) {
        let miss = self.miss_label();
        self.asm.cmp_byte(cell(field::CPL), 0);
        self.asm.jump_if(cc::NE, miss);
    }

    fn need_nothing_held(&mut self) {
        let miss = self.miss_label();
        self.asm.cmp_byte(cell(field::HELD), 0);
        self.asm.jump_if(cc::NE, miss);
    }

    pub(super) fn cli(&mut self) {
        self.flags_to_memory();
        self.need_cpl0();
        self.asm.alu_imm(false, group::AND, cell(field::SYS_FLAGS), !(rflags::IF as i32));
    }

    /// As nothing looks for interrupts before the next instruction of the block, that one is safe from
    /// them, as it must be. The block's last is its handler's. In lockstep every STI is, as it asks the
    /// board something.
    pub(super) fn sti(&mut self) {
        if self.index + 1 == self.steps.len() || self.source.counted {
            return self.handler();
        }
        self.flags_to_memory();
        self.need_cpl0();
        self.need_nothing_held();
        self.asm.alu_imm(false, group::OR, cell(field::SYS_FLAGS), rflags::IF as i32);
    }

    pub(super) fn push_flags(&mut self) {
        let top = self.check(RSP_NUMBER, -8, true);
        self.flags_to_memory();
        self.asm.load_short(1, RAX, cell(field::FLAGS));
        self.asm.shift(false, 4, RAX, 11);
        // The image's other byte is as LAHF has it, with bit 1 set.
        self.asm.load_short(1, RCX, cell(field::FLAGS + 1));
        self.asm.alu(false, group::OR, RAX, Rm::Reg(RCX));
        self.asm.alu(false, group::OR, RAX, cell(field::SYS_FLAGS));
        self.asm.alu_imm(false, group::AND, Rm::Reg(RAX), !((rflags::VM | rflags::RF) as i32));
        self.asm.store(top, RAX);
        self.move_rsp(-8);
    }

    pub(super) fn pop_flags(&mut self) {
        if self.source.counted {
            return self.handler();
        }
        self.flags_to_memory();
        self.need_cpl0();
        self.need_nothing_held();
        let top = self.check(RSP_NUMBER, 0, false);
        let miss = self.miss_label();
        self.asm.load(R11, top);
        self.asm.load32(RAX, Rm::Reg(R11));
        self.asm.alu(false, group::XOR, RAX, cell(field::SYS_FLAGS));
        self.asm.modrm(&[], false, false, &[0xf7], 0, Rm::Reg(RAX)); // test eax, imm32
        self.asm.bytes(&(SERIOUS as u32).to_le_bytes());
        self.asm.jump_if(cc::NE, miss);
        self.asm.alu_imm(false, group::AND, Rm::Reg(RAX), rflags::IF as i32);
        self.asm.modrm(&[], false, false, &[0x31], RAX, cell(field::SYS_FLAGS)); // xor [sys_flags], eax
        self.asm.load32(RAX, Rm::Reg(R11));
        self.asm.alu_imm(false, group::AND, Rm::Reg(RAX), 0xd5);
        self.asm.alu_imm(false, group::OR, Rm::Reg(RAX), 2);
        self.asm.modrm(&[], false, true, &[0x88], RAX, cell(field::FLAGS + 1));
        self.asm.shift(false, 5, R11, 11);
        self.asm.alu_imm(false, group::AND, Rm::Reg(R11), 1);
        self.asm.modrm(&[], false, true, &[0x88], R11, cell(field::FLAGS));
        self.move_rsp(8);
        self.flags = Flags::Memory;
    }

    pub(super) fn swap_gs(&mut self) {
        self.flags_to_memory();
        self.need_cpl0();
        self.asm.load(RAX, cell(field::KERNEL_GS_BASE));
        self.asm.load(RCX, cell(field::GS_BASE));
        self.asm.store(cell(field::KERNEL_GS_BASE), RCX);
        self.asm.store(cell(field::GS_BASE), RAX);
        self.asm.store(cell(field::seg_base(seg::GS)), RAX);
    }
}

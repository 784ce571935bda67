//! Emit: branches. SDM vol. 2, JMP, Jcc, CALL, RET.
//!
//! An indirect branch to an address that is not canonical is found out after the fact, where no code
//! is found for it; its exit says how to take it back. CALL checks before it pushes.
//!
//! A cycle of pieces has a backward direct branch or an indirect one in it, and these look at the attention
//! word. A RET does before it trusts a note: another vCPU that changes code says so there before it goes on.

use super::asm::{cc, cell, group, Label, Rm};
use super::emit::{Emitter, Flags, Step};
use super::layout::{field, host::*};
use super::link::{back, site};
use super::lookups::{enter_jump, look_up_jump};
use super::memory::RSP_NUMBER;
use super::shape::home;

impl Emitter<'_> {
    /// The page offset a direct branch leads to; it may lie beyond the page.
    pub(super) fn target(step: &Step) -> i64 {
        step.ins.near_branch_target() as i64
    }

    pub(super) fn jcc(&mut self, step: &Step) {
        let condition = step.plan.shape.opcode().last().map_or(0, |byte| byte & 15);
        let condition = self.test_saved(condition).unwrap_or_else(|| {
            self.flags_to_host();
            condition
        });
        let before = self.flags;
        let taken = self.go_if(condition, Self::target(step));
        self.go(step.next as i64);
        if let Some(label) = taken {
            self.asm.place(label);
            self.flags = before;
            self.go(Self::target(step));
        }
    }

    /// Where the flags are in the `Cpu` and the condition is about bits next to each other, tests
    /// them there: gives the condition to branch by.
    pub(super) fn test_saved(&mut self, condition: u8) -> Option<u8> {
        // CF, ZF, CF or ZF, SF, PF, as LAHF has them; OF is the image's other byte.
        let (byte, mask) = match condition >> 1 {
            0 => (0, 0x01),
            1 => (1, 0x01),
            2 => (1, 0x40),
            3 => (1, 0x41),
            4 => (1, 0x80),
            5 => (1, 0x04),
            _ => return None,
        };
        if self.flags != Flags::Memory {
            return None;
        }
        self.asm.modrm(&[], false, true, &[0xf6], 0, cell(field::FLAGS + byte));
        self.asm.bytes(&[mask]);
        // Set bits mean that the even condition holds.
        Some(if condition & 1 == 0 { cc::NE } else { cc::E })
    }

    pub(super) fn jmp(&mut self, step: &Step) {
        self.go(Self::target(step));
    }

    /// R11 = where an indirect branch goes.
    fn load_target(&mut self, step: &Step) {
        if step.plan.memory.is_some() {
            let operand = self.access(step, 8, false, 1);
            self.asm.load(R11, operand);
        } else {
            let guest = step.plan.operands[0].and_then(|o| o.gpr());
            self.asm.load(R11, guest.map_or(Rm::Reg(R11), home));
        }
        // R11 is no longer what a group's accesses go by; a CALL's push is one.
        self.known = None;
    }

    /// To R11: by a look-up of its own, so that the host's predictor knows this branch from others.
    fn go_indirect(&mut self) {
        let miss = self.slow_return(0);
        look_up_jump(&mut self.asm, miss);
        enter_jump(&mut self.asm);
    }

    /// A label that goes to R11 the long way.
    fn slow_return(&mut self, popped: u32) -> Label {
        let (label, exit) = (self.asm.label(), self.indirect_exit(popped));
        self.slow_returns.push((label, exit));
        label
    }

    /// To a page offset that is not in this page, or not in it for sure.
    pub(super) fn go_far(&mut self, target: i64) {
        self.flags_to_memory();
        let (miss, site) = (self.asm.label(), self.sites.add());
        let cell_of = |offset| Rm::Mem(RAX, offset);
        self.asm.load_imm64(RAX, site as usize as u64);
        self.asm.load(RCX, cell(field::PAGE));
        self.asm.alu(true, group::CMP, RCX, cell_of(site::FROM));
        self.asm.jump_if(cc::NE, miss);
        self.asm.load32(RCX, cell(field::CONTEXT));
        self.asm.alu(false, group::CMP, RCX, cell_of(site::CONTEXT));
        self.asm.jump_if(cc::NE, miss);
        self.asm.load(RCX, cell_of(site::WORD));
        self.asm.load32(RCX, Rm::Mem(RCX, 4));
        self.asm.alu(false, group::CMP, RCX, cell_of(site::GENERATION));
        self.asm.jump_if(cc::NE, miss);
        if target <= self.highest as i64 {
            self.asm.load(RCX, cell(field::ATTENTION));
            self.asm.alu_imm(false, group::CMP, Rm::Mem(RCX, 0), 0);
            self.asm.jump_if(cc::NE, miss);
        }
        self.asm.load(RCX, cell_of(site::TO));
        self.asm.store(cell(field::PAGE), RCX);
        self.asm.modrm(&[], false, false, &[0xff], 4, cell_of(site::CODE)); // jmp [site.code]
        self.far.push((miss, site, target));
    }

    /// The rare parts of branches, and where RETs come back to.
    pub(super) fn branches_out_of_line(&mut self) {
        for (label, next) in std::mem::take(&mut self.landings) {
            self.asm.place(label);
            self.asm.lea(true, RAX, Some(R11), None, -(next as i32));
            self.asm.store(cell(field::PAGE), RAX);
            self.flags = Flags::Memory;
            let (exit, cold) = self.link_within_page(next as u16);
            self.asm.jump(cold);
            self.link_here(exit);
        }
        for (label, site, target) in std::mem::take(&mut self.far) {
            self.asm.place(label);
            self.asm.load_imm64(RAX, site as usize as u64);
            self.asm.store(cell(field::SITE), RAX);
            self.address_in_code(R11, target);
            self.asm.jump_to(self.stubs.far);
        }
        for (label, exit) in std::mem::take(&mut self.slow_returns) {
            self.asm.place(label);
            self.asm.store_imm(4, cell(field::EXIT), exit);
            self.asm.jump_to(self.stubs.indirect);
        }
    }

    pub(super) fn jmp_indirect(&mut self, step: &Step) {
        self.flags_to_memory();
        self.load_target(step);
        self.go_indirect();
    }

    /// Stores the return address at `top`, moves RSP, and leaves a note for the RET.
    fn push_return(&mut self, step: &Step, top: Rm) {
        self.address_in_code(RAX, step.next as i64);
        self.asm.store(top, RAX);
        self.move_rsp(-8);
        if step.next >= 4096 || self.source.second.is_some() {
            return;
        }
        let landing = self.asm.label();
        self.asm.load32(RCX, cell(field::TOP));
        self.asm.alu_imm(false, group::ADD, Rm::Reg(RCX), back::SIZE);
        self.asm.alu_imm(false, group::AND, Rm::Reg(RCX), back::MASK);
        self.asm.store32(cell(field::TOP), RCX);
        self.asm.lea(true, RCX, Some(RBP), Some((RCX, 0)), field::RETURNS);
        self.asm.store(Rm::Mem(RCX, back::LINEAR), RAX);
        self.asm.load32(RAX, cell(field::CONTEXT));
        self.asm.store32(Rm::Mem(RCX, back::CONTEXT), RAX);
        self.asm.lea_label(RAX, landing);
        self.asm.store(Rm::Mem(RCX, back::CODE), RAX);
        self.landings.push((landing, step.next));
    }

    pub(super) fn call(&mut self, step: &Step) {
        let top = self.check(RSP_NUMBER, -8, true);
        self.flags_to_memory();
        self.push_return(step, top);
        self.go(Self::target(step));
    }

    pub(super) fn call_indirect(&mut self, step: &Step) {
        self.flags_to_memory();
        self.load_target(step);
        let miss = self.miss_label();
        self.asm.load(RAX, Rm::Reg(R11));
        self.asm.shift(true, 4, RAX, 16);
        self.asm.shift(true, 7, RAX, 16);
        self.asm.alu(true, group::CMP, RAX, Rm::Reg(R11));
        self.asm.jump_if(cc::NE, miss);
        // RIP is nobody's while translated code runs.
        self.asm.store(cell(field::RIP), R11);
        let top = self.check(RSP_NUMBER, -8, true);
        self.push_return(step, top);
        self.asm.load(R11, cell(field::RIP));
        self.go_indirect();
    }

    pub(super) fn ret(&mut self, step: &Step) {
        let top = self.check(RSP_NUMBER, 0, false);
        self.flags_to_memory();
        self.asm.load(R11, top);
        let popped = 8 + if step.ins.op_count() == 1 { step.ins.immediate16() as u32 } else { 0 };
        self.move_rsp(popped as i32);
        let miss = self.slow_return(popped);
        self.asm.load(RAX, cell(field::ATTENTION));
        self.asm.alu_imm(false, group::CMP, Rm::Mem(RAX, 0), 0);
        self.asm.jump_if(cc::NE, miss);
        self.asm.load32(RAX, cell(field::TOP));
        self.asm.lea(true, RCX, Some(RBP), Some((RAX, 0)), field::RETURNS);
        self.asm.alu(true, group::CMP, R11, Rm::Mem(RCX, back::LINEAR));
        self.asm.jump_if(cc::NE, miss);
        self.asm.alu_imm(false, group::SUB, Rm::Reg(RAX), back::SIZE);
        self.asm.alu_imm(false, group::AND, Rm::Reg(RAX), back::MASK);
        self.asm.store32(cell(field::TOP), RAX);
        self.asm.load32(RAX, cell(field::CONTEXT));
        self.asm.alu(false, group::CMP, RAX, Rm::Mem(RCX, back::CONTEXT));
        self.asm.jump_if(cc::NE, miss);
        self.asm.modrm(&[], false, false, &[0xff], 4, Rm::Mem(RCX, back::CODE));
        // jmp [return.code]
    }
}

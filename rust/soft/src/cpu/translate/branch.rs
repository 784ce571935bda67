//! Emit: branches. SDM vol. 2, JMP, Jcc, CALL, RET.
//!
//! An indirect branch to an address that is not canonical is found out after the fact, where no code
//! is found for it; its exit says how to take it back. CALL checks before it pushes.

use super::asm::{cc, cell, group, Rm};
use super::emit::{Emitter, Flags, Step};
use super::layout::{field, host::*, GUEST_RSP};
use super::shape::home;

impl Emitter<'_> {
    /// The page offset a direct branch leads to; it may lie beyond the page.
    fn target(step: &Step) -> i64 {
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
    fn test_saved(&mut self, condition: u8) -> Option<u8> {
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
            self.access(step, 8, false, 1);
            self.asm.load(R11, Rm::Mem(R11, 0));
        } else {
            let guest = step.plan.operands[0].and_then(|o| o.gpr());
            self.asm.load(R11, guest.map_or(Rm::Reg(R11), home));
        }
    }

    /// To R11.
    fn go_indirect(&mut self, popped: u32) {
        let exit = self.indirect_exit(popped);
        self.asm.store_imm(4, cell(field::EXIT), exit);
        self.asm.jump_to(self.stubs.indirect);
    }

    pub(super) fn jmp_indirect(&mut self, step: &Step) {
        self.flags_to_memory();
        self.load_target(step);
        self.go_indirect(0);
    }

    /// Stores the return address at [R11] and moves RSP.
    fn push_return(&mut self, step: &Step) {
        self.address_in_code(RAX, step.next as i64);
        self.asm.store(Rm::Mem(R11, 0), RAX);
        self.move_rsp(-8);
    }

    pub(super) fn call(&mut self, step: &Step) {
        self.check(GUEST_RSP, -8, 8, true);
        self.push_return(step);
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
        self.check(GUEST_RSP, -8, 8, true);
        self.push_return(step);
        self.asm.load(R11, cell(field::RIP));
        self.go_indirect(0);
    }

    pub(super) fn ret(&mut self, step: &Step) {
        self.check(GUEST_RSP, 0, 8, false);
        self.asm.load(R11, Rm::Mem(R11, 0));
        let popped = 8 + if step.ins.op_count() == 1 { step.ins.immediate16() as u32 } else { 0 };
        self.move_rsp(popped as i32);
        self.go_indirect(popped);
    }
}

//! Emit: moves, addresses, and arithmetic on registers that the opcode implies.

use super::asm::{cc, cell, group, Rm};
use super::copies::Back;
use super::emit::{Emitter, Step};
use super::layout::{field, host::*, GUEST_RAX, GUEST_RBP, GUEST_RSP};
use super::memory::RBP_NUMBER;
use super::shape::home;
use crate::cpu::op::{ADDR16, ADDR32};
use iced_x86::{Mnemonic, Register};

impl Emitter<'_> {
    pub(super) fn mov_immediate(&mut self, step: &Step) {
        let Some(operand) = step.plan.operands[0] else { return };
        let Some(guest) = operand.gpr() else { return };
        let (to, value) = (home(guest), step.ins.immediate(1));
        match (operand.size, to) {
            (1, _) => self.asm.store_imm(1, to, value as i32),
            (2, _) => {
                self.asm.modrm(&[0x66], false, false, &[0xc7], 0, to);
                self.asm.bytes(&(value as u16).to_le_bytes());
            }
            (size, _) => self.load_constant(to, if size == 4 { value as u32 as u64 } else { value }),
        }
    }

    pub(super) fn load_constant(&mut self, to: Rm, value: u64) {
        let signed = i32::try_from(value as i64).ok();
        match (to, signed) {
            (Rm::Reg(reg), Some(small)) if small < 0 => self.asm.store_imm(8, Rm::Reg(reg), small),
            (Rm::Reg(reg), _) => self.asm.load_imm64(reg, value),
            (_, Some(small)) => self.asm.store_imm(8, to, small),
            _ => {
                self.asm.load_imm64(RAX, value);
                self.asm.store(to, RAX);
            }
        }
    }

    pub(super) fn lea(&mut self, step: &Step) {
        let Some(operand) = step.plan.operands[0] else { return };
        let Some(guest) = operand.gpr() else { return };
        let to = home(guest);
        match (operand.size, to) {
            (4 | 8, Rm::Reg(reg)) => self.effective(step, reg, operand.size == 4),
            (4 | 8, _) => {
                self.effective(step, RAX, operand.size == 4);
                self.asm.store(to, RAX);
            }
            _ => {
                self.effective(step, RAX, false);
                self.asm.modrm(&[0x66], false, false, &[0x89], RAX, to);
            }
        }
    }

    /// The effective address into `to`, which may be one of the address's registers. Destroys RCX, and RAX where
    /// `to` is not R11; no flags.
    pub(super) fn effective(&mut self, step: &Step, to: u8, narrow: bool) {
        let ins = &step.ins;
        let scratch = if to == R11 { R11 } else { RAX };
        self.known = self.known.filter(|_| to != R11);
        let op = step.op;
        let wide = !narrow && op.flags & (ADDR32 | ADDR16) == 0;
        let displacement = ins.memory_displacement64() as i64 as i32;
        if ins.memory_base() == Register::RIP {
            self.asm.load(scratch, cell(field::PAGE));
            return self.asm.lea(wide, to, Some(scratch), None, displacement);
        }
        let guest = |r: Register| (r != Register::None).then(|| home(r.full_register().number()));
        let scale = ins.memory_index_scale().trailing_zeros() as u8;
        let base = guest(ins.memory_base()).map(|slot| self.in_register(slot, scratch));
        let index = guest(ins.memory_index()).map(|slot| (self.in_register(slot, RCX), scale));
        self.asm.lea(wide, to, base, index, displacement);
    }

    pub(super) fn in_register(&mut self, slot: Rm, scratch: u8) -> u8 {
        match slot {
            Rm::Reg(reg) => reg,
            _ => {
                self.known = self.known.filter(|_| scratch != R11);
                self.asm.load(scratch, slot);
                scratch
            }
        }
    }

    // ---- arithmetic with implied registers -------------------------------------------------

    pub(super) fn widen(&mut self, step: &Step) {
        let rax = Rm::Reg(GUEST_RAX);
        match step.ins.mnemonic() {
            Mnemonic::Cbw => self.asm.modrm(&[0x66], false, true, &[0x0f, 0xbe], GUEST_RAX, rax),
            Mnemonic::Cwde => self.asm.modrm(&[], false, false, &[0x0f, 0xbf], GUEST_RAX, rax),
            _ => self.asm.modrm(&[], true, false, &[0x63], GUEST_RAX, rax),
        }
    }

    /// The guest's RDX is the host's.
    pub(super) fn spread(&mut self, step: &Step) {
        self.asm.load(RAX, Rm::Reg(GUEST_RAX));
        match step.ins.mnemonic() {
            Mnemonic::Cwd => self.asm.bytes(&[0x66, 0x99]),
            Mnemonic::Cdq => self.asm.bytes(&[0x99]),
            _ => self.asm.bytes(&[0x48, 0x99]),
        }
    }

    /// The operand of a one-operand instruction.
    pub(super) fn only_operand(&mut self, step: &Step) -> Rm {
        if step.plan.memory.is_some() {
            return self.access(step, step.ins.memory_size().size(), false, 1);
        }
        let guest = step.plan.operands[0].and_then(|o| o.gpr());
        guest.map_or(Rm::Reg(GUEST_RAX), home)
    }

    pub(super) fn multiply(&mut self, step: &Step) {
        let operand = self.only_operand(step);
        let wide = step.plan.shape.wide;
        let digit = step.plan.shape.modrm.map_or(4, |m| m >> 3 & 7);
        self.asm.load(RAX, Rm::Reg(GUEST_RAX));
        self.asm.modrm(&[], wide, false, &[0xf7], digit, operand);
        self.asm.store(Rm::Reg(GUEST_RAX), RAX);
    }

    /// What might be #DE is the handler's: zero, quotients that may not fit. The handler leaves the
    /// flags as they are, and so does this.
    pub(super) fn divide(&mut self, step: &Step, signed: bool) {
        self.flags_to_memory();
        let operand = self.only_operand(step);
        let miss = self.miss_label();
        let wide = step.plan.shape.wide;
        self.asm.modrm(&[], wide, false, &[0x8b], RCX, operand);
        if signed {
            // -1 and 0 are special; otherwise the dividend must be a sign-extended RAX.
            self.asm.lea(wide, RAX, Some(RCX), None, 1);
            self.asm.alu_imm(wide, group::CMP, Rm::Reg(RAX), 1);
            self.asm.jump_if(cc::BE, miss);
            self.asm.load(RAX, Rm::Reg(GUEST_RAX));
            self.asm.shift(wide, 7, RAX, if wide { 63 } else { 31 });
            self.asm.alu(wide, group::CMP, RAX, Rm::Reg(RDX));
            self.asm.jump_if(cc::NE, miss);
        } else {
            self.asm.alu(wide, group::CMP, RDX, Rm::Reg(RCX));
            self.asm.jump_if(cc::AE, miss);
        }
        self.asm.load(RAX, Rm::Reg(GUEST_RAX));
        self.asm.modrm(&[], wide, false, &[0xf7], if signed { 7 } else { 6 }, Rm::Reg(RCX));
        self.asm.store(Rm::Reg(GUEST_RAX), RAX);
    }

    pub(super) fn cmpxchg(&mut self, step: &Step) {
        let memory = step.plan.memory.map(|_| {
            let size = step.ins.memory_size().size();
            self.access(step, size, true, if step.ins.has_lock_prefix() { size } else { 1 })
        });
        let (Some(source), Some(destination)) = (step.plan.operands[1], step.plan.operands[0]) else { return };
        let (target, slot) = match memory {
            Some(memory) => (memory, None),
            None => self.bring(&destination, R11, true),
        };
        let (Rm::Reg(new), _) = self.bring(&source, RCX, true) else { return };
        self.asm.load(RAX, Rm::Reg(GUEST_RAX));
        let shape = &step.plan.shape;
        self.asm.modrm(shape.prefixes().get(), shape.wide, source.size == 1, shape.opcode(), new, target);
        if let Some(Back::Slot(slot)) = slot {
            self.asm.store(slot, R11);
        }
        self.asm.store(Rm::Reg(GUEST_RAX), RAX);
    }

    pub(super) fn carry(&mut self, step: &Step) {
        self.flags_to_host();
        self.asm.bytes(step.plan.shape.opcode());
    }

    pub(super) fn leave_frame(&mut self) {
        let frame = self.check(RBP_NUMBER, 0, false);
        self.asm.lea(true, GUEST_RSP, Some(GUEST_RBP), None, 8);
        self.asm.load(GUEST_RBP, frame);
    }
}

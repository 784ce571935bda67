//! Emit: memory accesses, which look the TLB up as `mmu.rs` describes, and the stack.
//!
//! ```text
//! r11 = linear address
//! rcx = tlb + (r11 >> 12 & mask) * 32
//! r11 & align - 1 == 0, else miss                 ; where the instruction demands it
//! rax = (r11 + size - 1) & !0xfff | asid
//! rax == [rcx].r or .w, else miss
//! r11 += [rcx].addend                             ; the host address
//! ```
//!
//! Accesses by RSP are shorter, as they nearly always meet the page that the last one met:
//!
//! ```text
//! r11 & (!0xfff | size - 1) == stack_page, else fill it or look up as above
//! r11 += stack_addend
//! ```

use super::asm::{cc, cell, group, Asm, Label, Rm};
use super::emit::{Emitter, Step};
use super::layout::{field, host::*, GUEST_RSP};
use super::near::{Known, Place};
use crate::cpu::mmu::{Entry, ENTRIES};
use crate::cpu::state::seg;
use iced_x86::Register;
use std::mem::{offset_of, size_of};

/// log2 of a TLB entry's size.
const ENTRY_SHIFT: u8 = size_of::<Entry>().trailing_zeros() as u8;
const _: () = assert!(size_of::<Entry>().is_power_of_two());

/// Offsets in a TLB entry.
pub(super) const READ_TAG: i32 = offset_of!(Entry, r) as i32;
/// See [`READ_TAG`].
pub(super) const WRITE_TAG: i32 = offset_of!(Entry, w) as i32;
pub(super) const ADDEND: i32 = offset_of!(Entry, addend) as i32;
/// From an entry to the one it displaced.
pub(super) const BEHIND: i32 = (ENTRIES << ENTRY_SHIFT) as i32;

/// RCX = the TLB entry of linear address R11.
pub(super) fn find_entry(asm: &mut Asm) {
    asm.load32(RCX, Rm::Reg(R11));
    asm.shift(false, 5, RCX, 12 - ENTRY_SHIFT);
    asm.alu_imm(false, group::AND, Rm::Reg(RCX), ((ENTRIES - 1) << ENTRY_SHIFT) as i32);
    asm.alu(true, group::ADD, RCX, cell(field::TLB));
}

/// R11 becomes a host address, by the TLB.
pub(super) fn look_up(asm: &mut Asm, miss: Label, size: usize, write: bool) {
    find_entry(asm);
    match size {
        1 => asm.load(RAX, Rm::Reg(R11)),
        _ => asm.lea(true, RAX, Some(R11), None, size as i32 - 1),
    }
    asm.alu_imm(true, group::AND, Rm::Reg(RAX), -4096);
    asm.alu(true, group::OR, RAX, cell(field::ASID));
    let tag = if write { WRITE_TAG } else { READ_TAG };
    asm.alu(true, group::CMP, RAX, Rm::Mem(RCX, tag));
    asm.jump_if(cc::NE, miss);
    asm.alu(true, group::ADD, R11, Rm::Mem(RCX, ADDEND));
}

/// A look-up that did not meet its page at first.
pub(super) struct Second {
    from: Label,
    back: Label,
    miss: Label,
    write: bool,
}

/// RSP's and RBP's numbers.
pub(super) const RSP_NUMBER: usize = 4;
/// See [`RSP_NUMBER`].
pub(super) const RBP_NUMBER: usize = 5;

/// A stack access that did not meet the stack page: continued out of line.
pub(super) struct StackMiss {
    from: Label,
    back: Label,
    miss: Label,
    size: usize,
    write: bool,
}

impl Emitter<'_> {
    /// The memory operand, by its host address in R11. An `align` above 1 is demanded, else the access
    /// may lie anywhere in its page. The flags are where they were, or in the `Cpu`.
    pub(super) fn access(&mut self, step: &Step, size: usize, write: bool, align: usize) -> Rm {
        let place = self.place_at(step);
        if let Some(place) = place.filter(|_| align == 1) {
            if let Some(operand) = self.covered(place, size, write) {
                return operand;
            }
            self.flags_to_memory();
            if let Some(reach) = self.reach(place, size as i32, write) {
                return self.begin_group(place, reach);
            }
            if self.near(place, size, write) {
                return Rm::Mem(R11, 0);
            }
        }
        self.flags_to_memory();
        self.effective(step, R11, false);
        let segment = step.op.seg();
        if segment == seg::FS || segment == seg::GS {
            self.asm.alu(true, group::ADD, R11, cell(field::seg_base(segment)));
        }
        let by_rsp = step.ins.memory_base() == Register::RSP && step.ins.memory_index() == Register::None;
        if by_rsp && size <= 8 && size.is_power_of_two() && align == 1 && segment == seg::SS {
            self.stack_access(size, write);
            return Rm::Mem(R11, 0);
        }
        let miss = self.miss_label();
        if align > 1 {
            // By itself: low bits left in the tag could make it another address space's, or the one of no page.
            self.asm.test_byte(R11, align as u8 - 1);
            self.asm.jump_if(cc::NE, miss);
        }
        self.look_up(miss, size, write);
        self.known = place.map(|place| Known { place, write, group: None });
        Rm::Mem(R11, 0)
    }

    /// R11 becomes a host address, by the TLB: see [`look_up`].
    pub(super) fn look_up(&mut self, miss: Label, size: usize, write: bool) {
        let (from, back) = (self.asm.label(), self.asm.label());
        look_up(&mut self.asm, from, size, write);
        self.asm.place(back);
        self.seconds.push(Second { from, back, miss, write });
    }

    /// Where look-ups see whether their page was displaced.
    pub(super) fn seconds_out_of_line(&mut self) {
        for Second { from, back, miss, write } in std::mem::take(&mut self.seconds) {
            self.asm.place(from);
            self.asm.call_to(self.stubs.second[write as usize]);
            self.asm.jump_if(cc::E, back);
            self.asm.jump(miss);
        }
    }

    fn stack_access(&mut self, size: usize, write: bool) {
        self.known = None;
        let (miss, from, back) = (self.miss_label(), self.asm.label(), self.asm.label());
        self.asm.load(RAX, Rm::Reg(R11));
        self.asm.alu_imm(true, group::AND, Rm::Reg(RAX), -4096 | (size as i32 - 1));
        self.asm.alu(true, group::CMP, RAX, cell(field::STACK_PAGE));
        self.asm.jump_if(cc::NE, from);
        self.asm.alu(true, group::ADD, R11, cell(field::STACK_ADDEND));
        self.asm.place(back);
        self.stack_misses.push(StackMiss { from, back, miss, size, write });
    }

    /// The out-of-line parts of stack accesses.
    pub(super) fn stack_out_of_line(&mut self) {
        for StackMiss { from, back, miss, size, write } in std::mem::take(&mut self.stack_misses) {
            self.asm.place(from);
            self.asm.call_to(self.stubs.stack[write as usize][size.trailing_zeros() as usize]);
            self.asm.jump_if(cc::E, back);
            self.asm.jump(miss);
        }
    }

    /// Jumps to `failed` unless the `span` bytes at R11 lie in the stack page; R11 becomes the host's address.
    pub(super) fn stack_span(&mut self, failed: Label, span: usize) {
        self.asm.load(RAX, Rm::Reg(R11));
        self.asm.alu_imm(true, group::AND, Rm::Reg(RAX), -4096);
        self.asm.alu(true, group::CMP, RAX, cell(field::STACK_PAGE));
        self.asm.jump_if(cc::NE, failed);
        self.asm.lea(false, RAX, Some(R11), None, span as i32 - 1);
        self.asm.alu(false, group::XOR, RAX, Rm::Reg(R11));
        self.asm.alu_imm(false, group::AND, Rm::Reg(RAX), -4096);
        self.asm.jump_if(cc::NE, failed);
        self.asm.alu(true, group::ADD, R11, cell(field::STACK_ADDEND));
    }

    /// The quadword at `[base + displacement]`, where the guest's stack is. The flags are where they were, or in
    /// the `Cpu`.
    pub(super) fn check(&mut self, guest: usize, displacement: i32, write: bool) -> Rm {
        let place = Place { base: guest, displacement };
        if let Some(operand) = self.covered(place, 8, write) {
            return operand;
        }
        self.flags_to_memory();
        if let Some(reach) = self.reach(place, 8, write) {
            return self.begin_group(place, reach);
        }
        self.load_place(place);
        self.stack_access(8, write);
        Rm::Mem(R11, 0)
    }

    pub(super) fn move_rsp(&mut self, by: i32) {
        self.asm.lea(true, GUEST_RSP, Some(GUEST_RSP), None, by);
    }

    pub(super) fn push(&mut self, step: &Step) {
        let top = self.check(RSP_NUMBER, -8, true);
        let Some(guest) = step.plan.operands[0].and_then(|o| o.gpr()) else { return };
        match super::shape::home(guest) {
            Rm::Reg(reg) => self.asm.store(top, reg),
            slot => {
                self.asm.load(RAX, slot);
                self.asm.store(top, RAX);
            }
        }
        self.move_rsp(-8);
    }

    pub(super) fn push_memory(&mut self, step: &Step) {
        let operand = self.access(step, 8, false, 1);
        self.asm.load(RAX, operand);
        // RIP is nobody's while translated code runs.
        self.asm.store(cell(field::RIP), RAX);
        let top = self.check(RSP_NUMBER, -8, true);
        self.asm.load(RAX, cell(field::RIP));
        self.asm.store(top, RAX);
        self.move_rsp(-8);
    }

    pub(super) fn push_immediate(&mut self, step: &Step) {
        let top = self.check(RSP_NUMBER, -8, true);
        self.asm.store_imm(8, top, step.ins.immediate(0) as i32);
        self.move_rsp(-8);
    }

    pub(super) fn pop(&mut self, step: &Step) {
        let top = self.check(RSP_NUMBER, 0, false);
        let Some(guest) = step.plan.operands[0].and_then(|o| o.gpr()) else { return };
        // POP RSP: what was loaded wins.
        self.move_rsp(8);
        match super::shape::home(guest) {
            Rm::Reg(reg) => self.asm.load(reg, top),
            slot => {
                self.asm.load(RAX, top);
                self.asm.store(slot, RAX);
            }
        }
    }
}

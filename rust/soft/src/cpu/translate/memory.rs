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
//! A load waits for all but the comparison, so this is as short as can be: code of processes has the address of
//! their array, which is below 2 GiB, as displacements from RCX; and where RCX is free, it becomes the addend, and
//! the operand is `[r11 + rcx]`.
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

/// RCX = the TLB entry of linear address R11; with the array's address, its offset there. Gives the displacement to
/// address its fields by.
pub(super) fn find_entry(asm: &mut Asm, array: Option<i32>) -> i32 {
    if std::is_x86_feature_detected!("bmi2") {
        asm.rotate(RCX, Rm::Reg(R11), 12 - ENTRY_SHIFT);
    } else {
        asm.load32(RCX, Rm::Reg(R11));
        asm.shift(false, 5, RCX, 12 - ENTRY_SHIFT);
    }
    asm.alu_imm(false, group::AND, Rm::Reg(RCX), ((ENTRIES - 1) << ENTRY_SHIFT) as i32);
    if array.is_none() {
        asm.alu(true, group::ADD, RCX, cell(field::TLB));
    }
    array.unwrap_or(0)
}

/// R11 becomes a host address, by the TLB.
pub(super) fn look_up(asm: &mut Asm, miss: Label, size: usize, write: bool) {
    let at = check_entry(asm, None, miss, size, write);
    asm.alu(true, group::ADD, R11, Rm::Mem(RCX, at + ADDEND));
}

/// As [`find_entry`], and jumps to `miss` where that entry does not allow the access.
fn check_entry(asm: &mut Asm, array: Option<i32>, miss: Label, size: usize, write: bool) -> i32 {
    let at = find_entry(asm, array);
    match size {
        1 => asm.load(RAX, Rm::Reg(R11)),
        _ => asm.lea(true, RAX, Some(R11), None, size as i32 - 1),
    }
    asm.alu_imm(true, group::AND, Rm::Reg(RAX), -4096);
    asm.alu(true, group::OR, RAX, cell(field::ASID));
    let tag = if write { WRITE_TAG } else { READ_TAG };
    asm.alu(true, group::CMP, RAX, Rm::Mem(RCX, at + tag));
    asm.jump_if(cc::NE, miss);
    at
}

/// A look-up that did not meet its page at first.
pub(super) struct Second {
    from: Label,
    back: Label,
    miss: Label,
    write: bool,
    /// RCX is to be the addend.
    summed: bool,
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
    /// may lie anywhere in its page. The flags are where they were, in the `Cpu`, or
    /// to be had again.
    pub(super) fn access(&mut self, step: &Step, size: usize, write: bool, align: usize) -> Rm {
        self.access_by(step, size, write, align, false)
    }

    /// The same; where RCX is `free`, the operand may be the sum of it and R11.
    pub(super) fn access_by(&mut self, step: &Step, size: usize, write: bool, align: usize, free: bool) -> Rm {
        let place = self.place_at(step);
        if let Some(place) = place.filter(|_| align == 1) {
            if let Some(operand) = self.covered(place, size, write) {
                return operand;
            }
            self.flags_may_go();
            if let Some(reach) = self.reach(place, size as i32, write) {
                return self.begin_group(place, reach);
            }
            if self.near(place, size, write) {
                return Rm::Mem(R11, 0);
            }
        }
        self.flags_may_go();
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
        if free && !write {
            self.look_up_by(miss, size, write, true);
            self.known = None;
            return Rm::Sum(R11, RCX);
        }
        self.look_up(miss, size, write);
        self.known = place.map(|place| Known { place, write, group: None });
        Rm::Mem(R11, 0)
    }

    /// R11 becomes a host address, by the TLB.
    pub(super) fn look_up(&mut self, miss: Label, size: usize, write: bool) {
        self.look_up_by(miss, size, write, false);
    }

    /// R11, or the sum of it and RCX, becomes a host address.
    fn look_up_by(&mut self, miss: Label, size: usize, write: bool, summed: bool) {
        let (from, back) = (self.asm.label(), self.asm.label());
        let addend = ADDEND + check_entry(&mut self.asm, self.source.array, from, size, write);
        if summed {
            self.asm.load(RCX, Rm::Mem(RCX, addend));
        } else {
            self.asm.alu(true, group::ADD, R11, Rm::Mem(RCX, addend));
        }
        self.asm.place(back);
        self.seconds.push(Second { from, back, miss, write, summed });
    }

    /// Where look-ups see whether their page was displaced.
    pub(super) fn seconds_out_of_line(&mut self) {
        for Second { from, back, miss, write, summed } in std::mem::take(&mut self.seconds) {
            self.asm.place(from);
            if let Some(array) = self.source.array {
                self.asm.lea(true, RCX, Some(RCX), None, array);
            }
            self.asm.call_to(self.stubs.second[write as usize]);
            if summed {
                // R11 is all of it.
                self.asm.load_imm(RCX, 0);
            }
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

    /// The quadword at `[base + displacement]`, where the guest's stack is. The flags are where they were, in
    /// the `Cpu`, or to be had again.
    pub(super) fn check(&mut self, guest: usize, displacement: i32, write: bool) -> Rm {
        let place = Place { base: guest, displacement };
        if let Some(operand) = self.covered(place, 8, write) {
            return operand;
        }
        self.flags_may_go();
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

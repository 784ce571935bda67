//! Emit: a block's host code.
//!
//! The guest's arithmetic flags are in RFLAGS as long as possible ([`Flags`]). What destroys RFLAGS,
//! above all the look-up before a memory access, saves them first, because the access may fault.
//! A piece has two entries: one that finds the flags in RFLAGS, one that finds them in the `Cpu`.
//!
//! An instruction whose fast path does not apply (`miss`) is executed whole by its handler, out of
//! line; control comes back behind it. So nothing may be changed before the last check.

use super::asm::{cc, cell, group, Asm, Label, Rm};
use super::classes::{plan, Class, Plan};
use super::layout::{field, host::*, GUEST_RAX, GUEST_RBP, GUEST_RCX, GUEST_RSP};
use super::link::Exit;
use super::shape::{home, Operand, Role};
use super::stubs::Stubs;
use super::vector::open;
use crate::cpu::op::{Op, ADDR16, ADDR32};
use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, Register};
use std::sync::atomic::AtomicU64;

/// What is to be translated.
pub struct Source<'a> {
    /// The block's bytes.
    pub bytes: &'a [u8],
    /// Its operations, one an instruction.
    pub ops: &'a [Op],
    /// Where it begins in its page.
    pub offset: usize,
    /// Host address of that page.
    pub page: usize,
    /// Whether its direct successors may be linked.
    pub linkable: bool,
    /// Word and generation of its second page, when it straddles two.
    pub second: Option<(*const AtomicU64, u32)>,
    /// See `Translator::counted`.
    pub counted: bool,
}

/// A translated block, to be put where it was made for.
pub struct Piece {
    /// The bytes.
    pub code: Vec<u8>,
    /// Entry with the flags in RFLAGS, from the piece's start.
    pub host_entry: usize,
    /// Entry with the flags in the `Cpu`.
    pub entry: usize,
    /// Its exits, numbered from the number given.
    pub exits: Vec<Exit>,
}

/// Where the guest's arithmetic flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flags {
    /// In RFLAGS only.
    Host,
    /// In the `Cpu` only.
    Memory,
    /// In both.
    Both,
}

/// An out-of-line execution by handler.
struct Miss {
    from: Label,
    /// Control comes back behind the instruction; otherwise the block is left.
    back: bool,
    resume: Option<Label>,
    index: usize,
    /// The flags are in RFLAGS when control comes here.
    save: bool,
    /// They must be there at `resume`.
    load: bool,
}

/// A linkable exit's cold part.
struct Cold {
    from: Label,
    exit: usize,
    host: bool,
}

/// One instruction of the block.
pub(super) struct Step {
    pub ins: Instruction,
    pub plan: Plan,
    /// Page offset of the next instruction.
    pub next: usize,
}

pub(super) struct Emitter<'a> {
    pub asm: Asm,
    pub source: Source<'a>,
    pub stubs: &'a Stubs,
    pub flags: Flags,
    /// Index of the instruction in work.
    pub index: usize,
    /// How far the vector registers are known to be open.
    opened: u8,
    /// The miss label of the instruction in work, once it has one.
    miss: Option<Label>,
    misses: Vec<Miss>,
    pub stack_misses: Vec<super::memory::StackMiss>,
    colds: Vec<Cold>,
    exits: Vec<Exit>,
    first_exit: usize,
}

fn analyse(source: &Source, factory: &mut InstructionInfoFactory) -> Vec<Step> {
    let mut decoder = Decoder::with_ip(64, source.bytes, source.offset as u64, DecoderOptions::NONE);
    let mut steps = Vec::with_capacity(source.ops.len());
    let mut start = 0;
    while steps.len() < source.ops.len() && decoder.can_decode() {
        let ins = decoder.decode();
        let offsets = decoder.get_constant_offsets(&ins);
        let bytes = &source.bytes[start..start + ins.len()];
        start += ins.len();
        let plan = plan(&ins, bytes, &offsets, factory);
        steps.push(Step { ins, plan, next: source.offset + start });
    }
    steps
}

/// Translates a block; its code is for offset `origin` of the region, its exits are numbered from
/// `first_exit`.
pub fn translate(
    source: Source,
    stubs: &Stubs,
    origin: usize,
    first_exit: usize,
    factory: &mut InstructionInfoFactory,
) -> Option<Piece> {
    let steps = analyse(&source, factory);
    if steps.len() != source.ops.len() {
        return None;
    }
    let mut e = Emitter {
        asm: Asm::new(origin),
        source,
        stubs,
        flags: Flags::Memory,
        index: 0,
        opened: 0,
        miss: None,
        misses: Vec::new(),
        stack_misses: Vec::new(),
        colds: Vec::new(),
        exits: Vec::new(),
        first_exit,
    };
    // Where flags are set before anything could see the old ones, both entries are one.
    let straddles = e.source.second.is_some();
    let counted = e.source.counted;
    let first = steps.iter().find(|s| s.plan.clobbers_flags() || s.plan.needs_flags || s.plan.sets_flags);
    if !straddles && !counted && first.is_some_and(|s| !s.plan.clobbers_flags() && !s.plan.needs_flags) {
        e.flags = Flags::Host;
    } else {
        e.asm.save_flags(field::FLAGS);
    }
    let entry = e.asm.code.len();
    e.check_second_page();
    e.retire();
    for (index, step) in steps.iter().enumerate() {
        e.index = index;
        e.miss = None;
        let resume = e.asm.label();
        e.step(step);
        e.asm.place(resume);
        e.settle_misses(index, resume);
    }
    let last = &steps[steps.len() - 1];
    if !ends(last.plan.class) {
        e.fall_through(last.next);
    }
    e.out_of_line();
    e.asm.finish();
    Some(Piece { code: e.asm.code, host_entry: 0, entry, exits: e.exits })
}

/// Goes to page offset `target` by the jump table.
pub fn bridge(stubs: &Stubs, origin: usize, target: u16, flags_in_host: bool) -> Vec<u8> {
    let mut asm = Asm::new(origin);
    asm.load(R11, cell(field::PAGE));
    asm.lea(true, R11, Some(R11), None, target as i32);
    asm.jump_to(if flags_in_host { stubs.direct_host } else { stubs.direct });
    asm.code
}

/// The classes that emit their own exits.
fn ends(class: Class) -> bool {
    use Class::*;
    matches!(class, Jcc | Jmp | JmpIndirect | Call | CallIndirect | Ret)
}

impl Emitter<'_> {
    fn step(&mut self, step: &Step) {
        match step.plan.class {
            Class::Handler => self.handler(),
            Class::Copy => self.copy_instruction(step),
            Class::Vector => self.vector(step),
            Class::Nothing => {}
            Class::MovImmediate => self.mov_immediate(step),
            Class::Lea => self.lea(step),
            Class::Push => self.push(step),
            Class::PushImmediate => self.push_immediate(step),
            Class::Pop => self.pop(step),
            Class::Leave => self.leave_frame(),
            Class::Widen => self.widen(step),
            Class::Spread => self.spread(step),
            Class::Multiply => self.multiply(step),
            Class::Divide(signed) => self.divide(step, signed),
            Class::Cmpxchg => self.cmpxchg(step),
            Class::Carry => self.carry(step),
            Class::Jcc => self.jcc(step),
            Class::Jmp => self.jmp(step),
            Class::JmpIndirect => self.jmp_indirect(step),
            Class::Call => self.call(step),
            Class::CallIndirect => self.call_indirect(step),
            Class::Ret => self.ret(step),
        }
        if step.plan.sets_flags && !matches!(step.plan.class, Class::Handler | Class::Divide(_)) {
            self.flags = Flags::Host;
        }
    }

    /// A straddling block looks at its second page's generation itself; flags are in the `Cpu`.
    fn check_second_page(&mut self) {
        let Some((word, generation)) = self.source.second else { return };
        let stands = self.asm.label();
        self.asm.load_imm64(RCX, word as usize as u64);
        self.asm.modrm(&[], false, false, &[0x81], group::CMP, Rm::Mem(RCX, 4));
        self.asm.bytes(&generation.to_le_bytes());
        self.asm.jump_if(cc::E, stands);
        self.address_in_code(R11, self.source.offset as i64);
        self.asm.jump_to(self.stubs.next);
        self.asm.place(stands);
    }

    // ---- flags ---------------------------------------------------------------------------

    /// RFLAGS is about to be destroyed.
    pub(super) fn flags_to_memory(&mut self) {
        if self.flags == Flags::Host {
            self.asm.save_flags(field::FLAGS);
        }
        self.flags = Flags::Memory;
    }

    pub(super) fn flags_to_host(&mut self) {
        if self.flags == Flags::Memory {
            self.asm.load_flags(field::FLAGS);
            self.flags = Flags::Both;
        }
    }

    // ---- ways out ------------------------------------------------------------------------

    /// Where the instruction goes when its fast path does not apply; flags are in the `Cpu` then.
    pub(super) fn miss_label(&mut self) -> Label {
        if let Some(label) = self.miss {
            return label;
        }
        let label = self.asm.label();
        self.miss = Some(label);
        self.misses.push(Miss { from: label, back: true, resume: None, index: self.index, save: false, load: false });
        label
    }

    /// The instruction is complete: its misses come back here.
    fn settle_misses(&mut self, index: usize, here: Label) {
        let load = self.flags != Flags::Memory;
        for miss in self.misses.iter_mut().rev().take_while(|miss| miss.index == index) {
            if miss.back {
                (miss.resume, miss.load) = (Some(here), load);
            }
        }
    }

    fn call_out(&mut self, index: usize, stub: usize) {
        let op: *const Op = &self.source.ops[index];
        self.asm.load_imm64(RCX, op as usize as u64);
        let count = self.source.ops.len();
        self.asm.load_imm(RAX, (self.source.offset | index << 16 | count << 24) as u32);
        self.asm.call_to(stub);
    }

    /// The instruction is its handler's.
    fn handler(&mut self) {
        self.flags_to_memory();
        self.call_out(self.index, self.stubs.call);
        self.opened = 0;
    }

    fn out_of_line(&mut self) {
        self.stack_out_of_line();
        for miss in std::mem::take(&mut self.misses) {
            self.asm.place(miss.from);
            if miss.save {
                self.asm.save_flags(field::FLAGS);
            }
            let stub = match (miss.resume, miss.load) {
                (None, _) => self.stubs.call_and_leave,
                (_, true) => self.stubs.miss_with_flags,
                (_, false) => self.stubs.miss,
            };
            self.call_out(miss.index, stub);
            if let Some(resume) = miss.resume {
                self.asm.jump(resume);
            }
        }
        for cold in std::mem::take(&mut self.colds) {
            self.asm.place(cold.from);
            self.asm.load_imm(RCX, (self.first_exit + cold.exit) as u32);
            self.asm.jump_to(if cold.host { self.stubs.link_host } else { self.stubs.link });
        }
    }

    /// Counts the block's instructions, when the flags do not matter: at its start. Whatever leaves
    /// it early takes the rest back.
    fn retire(&mut self) {
        let count = self.source.ops.len() as i32;
        self.asm.alu_imm(true, group::ADD, cell(field::RETIRED), count);
        if self.source.counted {
            self.stay_within_limit(count);
        }
    }

    /// For lockstep: goes back to the loop if the block would end beyond `Out::limit`. The flags are
    /// in the `Cpu`.
    fn stay_within_limit(&mut self, count: i32) {
        let fits = self.asm.label();
        self.asm.load(RAX, cell(field::RETIRED));
        self.asm.alu(true, group::CMP, RAX, cell(field::LIMIT));
        self.asm.jump_if(cc::BE, fits);
        self.asm.alu_imm(true, group::SUB, cell(field::RETIRED), count);
        self.address_in_code(R11, self.source.offset as i64);
        self.asm.jump_to(self.stubs.next);
        self.asm.place(fits);
    }

    fn fall_through(&mut self, next: usize) {
        if self.source.linkable {
            return self.go(next as i64);
        }
        self.flags_to_memory();
        self.address_in_code(R11, next as i64);
        self.asm.jump_to(self.stubs.next);
    }

    /// Loads the linear address of a page offset, which may lie beyond the page.
    pub(super) fn address_in_code(&mut self, reg: u8, offset: i64) {
        self.asm.load(reg, cell(field::PAGE));
        self.asm.lea(true, reg, Some(reg), None, offset as i32);
    }

    fn new_link(&mut self, target: i64) -> Option<(usize, Label)> {
        if !(0..4096).contains(&target) || !self.source.linkable {
            return None;
        }
        let (exit, from, host) = (self.exits.len(), self.asm.label(), self.flags == Flags::Host);
        self.exits.push(Exit::Link { at: 0, target: target as u16, page: self.source.page, flags_in_host: host });
        self.colds.push(Cold { from, exit, host });
        Some((exit, from))
    }

    /// The displacement just emitted is that of exit `exit`.
    fn link_here(&mut self, exit: usize) {
        let here = self.asm.here() as u32 - 4;
        if let Exit::Link { at, .. } = &mut self.exits[exit] {
            *at = here;
        }
    }

    /// On to a page offset; the instructions are counted already.
    pub(super) fn go(&mut self, target: i64) {
        let Some((exit, cold)) = self.new_link(target) else {
            self.address_in_code(R11, target);
            self.asm.jump_to(if self.flags == Flags::Host { self.stubs.direct_host } else { self.stubs.direct });
            return;
        };
        if target <= self.source.offset as i64 {
            self.asm.load(RCX, cell(field::ATTENTION));
            self.asm.load32(RCX, Rm::Mem(RCX, 0));
            self.asm.skip_if_ecx_zero(5);
            self.asm.jump(cold);
        }
        self.asm.jump(cold);
        self.link_here(exit);
    }

    /// To a page offset if `condition` holds.
    pub(super) fn go_if(&mut self, condition: u8, target: i64) -> Option<Label> {
        let forward = target > self.source.offset as i64;
        if let Some((exit, cold)) = forward.then(|| self.new_link(target)).flatten() {
            self.asm.jump_if(condition, cold);
            self.link_here(exit);
            return None;
        }
        let taken = self.asm.label();
        self.asm.jump_if(condition, taken);
        Some(taken)
    }

    pub(super) fn indirect_exit(&mut self, popped: u32) -> i32 {
        let from =
            self.source.offset + self.source.ops[self.index].end as usize - self.source.ops[self.index].len as usize;
        self.exits.push(Exit::Indirect { from: from as u16, popped });
        (self.first_exit + self.exits.len() - 1) as i32
    }

    // ---- copies --------------------------------------------------------------------------

    fn copy_instruction(&mut self, step: &Step) {
        let size = step.ins.memory_size().size();
        let locked = step.ins.has_lock_prefix() || step.ins.mnemonic() == Mnemonic::Xchg;
        self.copy_with(step, if locked { size } else { 1 });
    }

    fn vector(&mut self, step: &Step) {
        let door = super::vector::door(&step.ins);
        if open::DOORS[door] & !self.opened != 0 {
            self.open(door);
        }
        self.copy_with(step, super::vector::alignment(&step.ins));
    }

    /// The instruction with other operands; a memory operand must be aligned so.
    fn copy_with(&mut self, step: &Step, align: usize) {
        let memory = step.plan.memory.map(|index| {
            let written = step.plan.operands[index].is_some_and(|o| o.written);
            self.access(step, step.ins.memory_size().size(), written, align);
            Rm::Mem(R11, 0)
        });
        if step.plan.needs_flags {
            self.flags_to_host();
        }
        self.copy(step, memory);
    }

    /// Opens the vector registers, or leaves to the handler for good.
    fn open(&mut self, door: usize) {
        // What is behind the others is open when they are.
        let (at, bytes) =
            [(field::XMM_CLOSED, 1), (field::MXCSR_CLOSED, 1), (field::YMM_CLOSED, 1), (field::MXCSR_CLOSED, 2)][door];
        let from = self.asm.label();
        self.asm.load_short(bytes, RCX, cell(at));
        self.asm.skip_if_ecx_zero(5 + 3 + 5);
        self.asm.call_to(self.stubs.open[door]);
        self.asm.skip_if_ecx_zero(5);
        self.asm.jump(from);
        let save = self.flags == Flags::Host;
        self.misses.push(Miss { from, back: false, resume: None, index: self.index, save, load: false });
        self.opened |= open::DOORS[door];
    }

    fn copy(&mut self, step: &Step, memory: Option<Rm>) {
        let Parts { reg, vvvv, rm, count_in_cl } = parts(&step.plan);
        let digit = step.plan.shape.modrm.map_or(0, |m| m >> 3 & 7);
        if count_in_cl {
            self.asm.load32(RCX, Rm::Reg(GUEST_RCX));
        }
        let exchanges = matches!(step.ins.mnemonic(), Mnemonic::Xchg | Mnemonic::Xadd);
        let (reg_field, reg_slot) = match reg {
            Some(o) => self.bring(&o, RAX, exchanges),
            None => (Rm::Reg(digit), None),
        };
        let (vvvv_field, vvvv_slot) = match vvvv {
            Some(o) => self.bring(&o, RCX, false),
            None => (Rm::Reg(0), None),
        };
        let (rm_field, rm_slot) = match (memory, rm) {
            (Some(memory), _) => (memory, None),
            (None, Some(o)) => {
                // With memory and a register, BT's operands would be a bit string.
                let bits = matches!(step.ins.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
                let vector = step.plan.class == Class::Vector;
                // The OF of these is undefined, and another in memory than in a register.
                let rotates = matches!(step.ins.mnemonic(), Mnemonic::Rol | Mnemonic::Ror);
                let register_only = exchanges || bits || rotates || vector || o.role == Role::OpcodeReg;
                let in_place = !(register_only || o.written && o.size == 4);
                match o.gpr().map(home) {
                    Some(slot @ Rm::Mem(..)) if in_place => (slot, None),
                    _ => self.bring(&o, R11, exchanges),
                }
            }
            (None, None) => (Rm::Reg(GUEST_RAX), None),
        };
        let (Rm::Reg(reg_number), Rm::Reg(vvvv_number)) = (reg_field, vvvv_field) else {
            unreachable!("bring() gives registers")
        };
        self.encode(step, [reg_number, vvvv_number], rm_field, reg.is_some());
        // MULX with one register for both results: the one in ModRM.reg stays.
        for (slot, scratch) in [(vvvv_slot, RCX), (reg_slot, RAX), (rm_slot, R11)] {
            if let Some(slot) = slot {
                self.asm.store(slot, scratch);
            }
        }
    }

    /// The register an operand is in; one that lives in memory is brought into `scratch`, and goes
    /// back to the slot given if it is written.
    fn bring(&mut self, operand: &Operand, scratch: u8, always: bool) -> (Rm, Option<Rm>) {
        let Some(guest) = operand.gpr() else { return (Rm::Reg(operand.register.number() as u8), None) };
        match home(guest) {
            Rm::Reg(host) => (Rm::Reg(host), None),
            slot => {
                if operand.read || operand.size < 4 || always {
                    self.asm.load(scratch, slot);
                }
                (Rm::Reg(scratch), operand.written.then_some(slot))
            }
        }
    }

    fn encode(&mut self, step: &Step, [reg, vvvv]: [u8; 2], rm: Rm, reg_is_register: bool) {
        let shape = &step.plan.shape;
        match (&shape.vex, shape.modrm) {
            (Some(vex), Some(_)) => {
                self.asm.vex(vex, reg, vvvv, rm);
                return self.asm.bytes(shape.immediate());
            }
            // VZEROUPPER, VZEROALL.
            (Some(vex), None) => return self.asm.bytes(&[0xc5, 0xf8 | (vex.long as u8) << 2, vex.opcode]),
            _ => {}
        }
        let byte = step.plan.operands.iter().flatten().any(|o| o.size == 1 && o.register.is_gpr());
        let prefixes = shape.prefixes();
        let mut opcode = [0u8; 3];
        let count = shape.opcode().len();
        opcode[..count].copy_from_slice(shape.opcode());
        let mut field = reg;
        if shape.modrm.is_none() {
            // The accumulator's short forms, and registers in the opcode.
            match opcode[0] {
                one @ 0x00..=0x3f if count == 1 => (opcode[0], field) = (0x80 | one & 1, one >> 3),
                one @ (0xa8 | 0xa9) => (opcode[0], field) = (0xf6 | one & 1, 0),
                0x90..=0x97 => (opcode[0], field) = (0x87, GUEST_RAX),
                _ => {
                    let Rm::Reg(r) = rm else { unreachable!("BSWAP's register is brought into one") };
                    let rex = 0x40 | (shape.wide as u8) << 3 | r >> 3;
                    self.asm.bytes(prefixes.get());
                    return self.asm.bytes(&[rex, 0x0f, 0xc8 | r & 7]);
                }
            }
        }
        // A digit is no register: it asks for no REX.
        let byte = byte && (reg_is_register || matches!(rm, Rm::Reg(_)));
        self.asm.modrm(prefixes.get(), shape.wide, byte, &opcode[..count], field, rm);
        self.asm.bytes(shape.immediate());
    }

    // ---- moves ---------------------------------------------------------------------------

    fn mov_immediate(&mut self, step: &Step) {
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

    fn load_constant(&mut self, to: Rm, value: u64) {
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

    fn lea(&mut self, step: &Step) {
        let Some(operand) = step.plan.operands[0] else { return };
        let Some(guest) = operand.gpr() else { return };
        let to = home(guest);
        match (operand.size, to) {
            (4 | 8, Rm::Reg(reg)) => self.effective(step, reg, operand.size == 4),
            (4 | 8, _) => {
                self.effective(step, R11, operand.size == 4);
                self.asm.store(to, R11);
            }
            _ => {
                self.effective(step, R11, false);
                self.asm.modrm(&[0x66], false, false, &[0x89], R11, to);
            }
        }
    }

    /// The effective address into `to`, which may be one of the address's registers. Destroys RCX
    /// and R11, no flags.
    pub(super) fn effective(&mut self, step: &Step, to: u8, narrow: bool) {
        let ins = &step.ins;
        let op = &self.source.ops[self.index];
        let wide = !narrow && op.flags & (ADDR32 | ADDR16) == 0;
        let displacement = ins.memory_displacement64() as i64 as i32;
        if ins.memory_base() == Register::RIP {
            self.asm.load(R11, cell(field::PAGE));
            return self.asm.lea(wide, to, Some(R11), None, displacement);
        }
        let guest = |r: Register| (r != Register::None).then(|| home(r.full_register().number()));
        let scale = ins.memory_index_scale().trailing_zeros() as u8;
        let base = guest(ins.memory_base()).map(|slot| self.in_register(slot, R11));
        let index = guest(ins.memory_index()).map(|slot| (self.in_register(slot, RCX), scale));
        self.asm.lea(wide, to, base, index, displacement);
    }

    fn in_register(&mut self, slot: Rm, scratch: u8) -> u8 {
        match slot {
            Rm::Reg(reg) => reg,
            _ => {
                self.asm.load(scratch, slot);
                scratch
            }
        }
    }

    // ---- arithmetic with implied registers -------------------------------------------------

    fn widen(&mut self, step: &Step) {
        let rax = Rm::Reg(GUEST_RAX);
        match step.ins.mnemonic() {
            Mnemonic::Cbw => self.asm.modrm(&[0x66], false, true, &[0x0f, 0xbe], GUEST_RAX, rax),
            Mnemonic::Cwde => self.asm.modrm(&[], false, false, &[0x0f, 0xbf], GUEST_RAX, rax),
            _ => self.asm.modrm(&[], true, false, &[0x63], GUEST_RAX, rax),
        }
    }

    /// The guest's RDX is the host's.
    fn spread(&mut self, step: &Step) {
        self.asm.load(RAX, Rm::Reg(GUEST_RAX));
        match step.ins.mnemonic() {
            Mnemonic::Cwd => self.asm.bytes(&[0x66, 0x99]),
            Mnemonic::Cdq => self.asm.bytes(&[0x99]),
            _ => self.asm.bytes(&[0x48, 0x99]),
        }
    }

    /// The operand of a one-operand instruction.
    fn only_operand(&mut self, step: &Step) -> Rm {
        if step.plan.memory.is_some() {
            self.access(step, step.ins.memory_size().size(), false, 1);
            return Rm::Mem(R11, 0);
        }
        let guest = step.plan.operands[0].and_then(|o| o.gpr());
        guest.map_or(Rm::Reg(GUEST_RAX), home)
    }

    fn multiply(&mut self, step: &Step) {
        let operand = self.only_operand(step);
        let wide = step.plan.shape.wide;
        let digit = step.plan.shape.modrm.map_or(4, |m| m >> 3 & 7);
        self.asm.load(RAX, Rm::Reg(GUEST_RAX));
        self.asm.modrm(&[], wide, false, &[0xf7], digit, operand);
        self.asm.store(Rm::Reg(GUEST_RAX), RAX);
    }

    /// What might be #DE is the handler's: zero, quotients that may not fit. The handler leaves the
    /// flags as they are, and so does this.
    fn divide(&mut self, step: &Step, signed: bool) {
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

    fn cmpxchg(&mut self, step: &Step) {
        let memory = step.plan.memory.map(|_| {
            let size = step.ins.memory_size().size();
            self.access(step, size, true, if step.ins.has_lock_prefix() { size } else { 1 });
            Rm::Mem(R11, 0)
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
        if let Some(slot) = slot {
            self.asm.store(slot, R11);
        }
        self.asm.store(Rm::Reg(GUEST_RAX), RAX);
    }

    fn carry(&mut self, step: &Step) {
        self.flags_to_host();
        self.asm.bytes(step.plan.shape.opcode());
    }

    fn leave_frame(&mut self) {
        self.check(GUEST_RBP, 0, 8, false);
        self.asm.lea(true, GUEST_RSP, Some(GUEST_RBP), None, 8);
        self.asm.load(GUEST_RBP, Rm::Mem(R11, 0));
    }
}

/// The operands of a copy by place.
struct Parts {
    reg: Option<Operand>,
    vvvv: Option<Operand>,
    rm: Option<Operand>,
    count_in_cl: bool,
}

fn parts(plan: &Plan) -> Parts {
    let find = |roles: &[Role]| plan.operands.iter().flatten().find(|o| roles.contains(&o.role)).copied();
    let count_in_cl = plan.operands.iter().flatten().any(|o| o.role == Role::Implied && o.register == Register::CL);
    Parts { reg: find(&[Role::Reg]), vvvv: find(&[Role::Vvvv]), rm: find(&[Role::RmReg, Role::OpcodeReg]), count_in_cl }
}

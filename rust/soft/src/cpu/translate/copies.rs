//! Emit: instructions that are copied with other operands.
//!
//! A register operand that lives in memory is brought into RAX (ModRM.reg), RCX (VEX.vvvv) or R11 (ModRM.rm) and
//! put back.

use super::asm::{cell, Rm};
use super::classes::{Class, Plan};
use super::emit::{Emitter, Flags, Step};
use super::exits::Miss;
use super::layout::{field, host::*, GUEST_RAX, GUEST_RCX};
use super::shape::{home, Operand, Role};
use super::vector::open;
use iced_x86::{Mnemonic, Register};

/// Whether ModRM.rm may be the slot of a register that lives in memory.
fn in_place(step: &Step, operand: &Operand) -> bool {
    use Mnemonic::*;
    // With memory and a register, BT's operands would be a bit string; the OF of ROL and ROR is undefined, and
    // another in memory than in a register.
    let special = matches!(step.ins.mnemonic(), Xchg | Xadd | Bt | Bts | Btr | Btc | Rol | Ror);
    let register_only =
        operand.high_byte() || special || step.plan.class == Class::Vector || operand.role == Role::OpcodeReg;
    !(register_only || operand.written && operand.size == 4)
}

/// Whether an instruction that is copied uses R11 for a register operand.
pub(super) fn takes_r11(step: &Step) -> bool {
    step.plan.operands.iter().flatten().any(|operand| {
        let spilled = operand.gpr().is_some_and(|guest| matches!(home(guest), Rm::Mem(..)));
        match operand.role {
            Role::RmReg | Role::OpcodeReg => operand.high_byte() || spilled && !in_place(step, operand),
            _ => false,
        }
    })
}

/// Whether no register operand of an instruction that is copied needs RCX.
fn leaves_rcx(step: &Step) -> bool {
    let Parts { vvvv, count_in_cl, .. } = parts(&step.plan);
    !count_in_cl && vvvv.is_none_or(|operand| operand.gpr().is_none())
}

impl Emitter<'_> {
    pub(super) fn copy_instruction(&mut self, step: &Step) {
        self.copy_with(step, alignment(step));
    }

    pub(super) fn vector(&mut self, step: &Step) {
        let door = super::vector::door(&step.ins);
        if open::DOORS[door] & !self.opened != 0 {
            self.open(door);
        }
        self.copy_with(step, alignment(step));
    }

    /// The instruction with other operands; a memory operand must be aligned so.
    pub(super) fn copy_with(&mut self, step: &Step, align: usize) {
        let memory = step.plan.memory.map(|index| {
            let written = step.plan.operands[index].is_some_and(|o| o.written);
            self.access_by(step, step.ins.memory_size().size(), written, align, leaves_rcx(step))
        });
        if step.plan.needs_flags {
            self.flags_to_host();
        }
        self.copy(step, memory);
    }

    /// Opens the vector registers, or leaves to the handler for good.
    pub(super) fn open(&mut self, door: usize) {
        // What is behind the others is open when they are.
        let (at, bytes) =
            [(field::XMM_CLOSED, 1), (field::MXCSR_CLOSED, 1), (field::YMM_CLOSED, 1), (field::MXCSR_CLOSED, 2)][door];
        let from = self.asm.label();
        self.asm.load_short(bytes, RCX, cell(at));
        self.asm.skip_if_ecx_zero(5 + 3 + 5);
        self.asm.call_to(self.stubs.open[door]);
        self.asm.skip_if_ecx_zero(5);
        self.asm.jump(from);
        let (save, again) = (self.flags == Flags::Host, self.again_only());
        self.misses.push(Miss { from, back: false, resume: None, index: self.index, save, again, load: false });
        self.opened |= open::DOORS[door];
    }

    pub(super) fn copy(&mut self, step: &Step, memory: Option<Rm>) {
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
            (None, Some(o)) => match o.gpr().map(home) {
                Some(slot @ Rm::Mem(..)) if in_place(step, &o) => (slot, None),
                _ => self.bring(&o, R11, exchanges),
            },
            (None, None) => (Rm::Reg(GUEST_RAX), None),
        };
        let (Rm::Reg(reg_number), Rm::Reg(vvvv_number)) = (reg_field, vvvv_field) else {
            unreachable!("bring() gives registers")
        };
        self.encode(step, [reg_number, vvvv_number], rm_field, reg.is_some());
        // MULX with one register for both results: the one in ModRM.reg stays.
        for (slot, scratch) in [(vvvv_slot, RCX), (reg_slot, RAX), (rm_slot, R11)] {
            match slot {
                Some(Back::Slot(slot)) => self.asm.store(slot, scratch),
                Some(Back::High(guest)) => self.put_high(guest, scratch),
                None => {}
            }
        }
    }

    /// The register an operand is in; one that lives in memory is brought into `scratch`, and goes
    /// back to the slot given if it is written.
    pub(super) fn bring(&mut self, operand: &Operand, scratch: u8, always: bool) -> (Rm, Option<Back>) {
        let Some(guest) = operand.gpr() else { return (Rm::Reg(operand.register.number() as u8), None) };
        let spilled = matches!(home(guest), Rm::Mem(..));
        self.known = self.known.filter(|_| scratch != R11 || !(spilled || operand.high_byte()));
        if operand.high_byte() {
            if operand.read {
                self.take_high(guest, scratch);
            }
            return (Rm::Reg(scratch), operand.written.then_some(Back::High(guest)));
        }
        match home(guest) {
            Rm::Reg(host) => (Rm::Reg(host), None),
            slot => {
                if operand.read || operand.size < 4 || always {
                    self.asm.load(scratch, slot);
                }
                (Rm::Reg(scratch), operand.written.then_some(Back::Slot(slot)))
            }
        }
    }

    /// The low byte of `scratch`, RAX or R11 (then RCX changes, too), becomes AH, CH, DH or BH.
    fn take_high(&mut self, guest: usize, scratch: u8) {
        let by = if scratch == RAX { RAX } else { RCX };
        let from = match home(guest) {
            // These two are the host's own DH and BH.
            Rm::Reg(host @ (RDX | RBX)) => host,
            slot => {
                self.asm.load(by, slot);
                by
            }
        };
        // movzx by, high byte
        self.asm.bytes(&[0x0f, 0xb6, 0xc0 | by << 3 | (from + 4)]);
        if by != scratch {
            self.asm.load32(scratch, Rm::Reg(by));
        }
    }

    /// Puts the low byte of `scratch`, RAX or R11, there; RAX and RCX change.
    fn put_high(&mut self, guest: usize, scratch: u8) {
        let by = if scratch == RAX {
            RAX
        } else {
            self.asm.load32(RCX, Rm::Reg(scratch));
            RCX
        };
        match home(guest) {
            // mov dh or bh, by
            Rm::Reg(host @ (RDX | RBX)) => self.asm.bytes(&[0x88, 0xc0 | by << 3 | (host + 4)]),
            slot => {
                let whole = if by == RAX { RCX } else { RAX };
                self.asm.load(whole, slot);
                self.asm.bytes(&[0x88, 0xc0 | by << 3 | (whole + 4)]);
                self.asm.store(slot, whole);
            }
        }
    }

    pub(super) fn encode(&mut self, step: &Step, [reg, vvvv]: [u8; 2], rm: Rm, reg_is_register: bool) {
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
}

/// The alignment that the memory operand of a copy must have.
pub(super) fn alignment(step: &Step) -> usize {
    if step.plan.class == Class::Vector {
        return super::vector::alignment(&step.ins);
    }
    let locked = step.ins.has_lock_prefix() || step.ins.mnemonic() == Mnemonic::Xchg;
    if locked {
        step.ins.memory_size().size()
    } else {
        1
    }
}

/// How a register that was brought goes back.
#[derive(Clone, Copy)]
pub(super) enum Back {
    /// All of it, to its slot.
    Slot(Rm),
    /// Its low byte, to the second lowest of a guest register.
    High(usize),
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

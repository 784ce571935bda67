//! From a decoded instruction to an operation: operands into [`Op`]'s fields, and the row of the
//! opcode table that chooses the handler.

use super::op::{Handler, Op, ADDR16, ADDR32, LOCK, OP16, OP64, REP, REPNE, SLOW};
use super::state::CodeSize;
use super::{table, Cpu, R, RIP_BASE, ZERO};
use crate::host::thunk::{Thunk, ThunkCache};
use crate::host::vex::is_vex;
use iced_x86::{Code, Instruction, OpKind, Register};
use std::sync::Arc;

/// What an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    Reg,
    Mem,
    Imm,
    Branch,
    Far,
    /// Implicit memory of string instructions.
    Str,
    None,
}

/// The thunks of a vCPU, and those that its decoded operations point to.
#[derive(Default)]
pub struct Thunks {
    cache: Option<ThunkCache>,
    /// Keeps alive what operations point to; cleared with the blocks.
    kept: Vec<Arc<Thunk>>,
}

impl Thunks {
    /// The address of an instruction's thunk, good until `clear`.
    fn get(&mut self, ins: &Instruction, bytes: &[u8]) -> Option<*const Thunk> {
        if self.cache.is_none() {
            self.cache = ThunkCache::new().ok();
        }
        let thunk = self.cache.as_mut()?.get(ins, bytes)?;
        let address = Arc::as_ptr(&thunk);
        self.kept.push(thunk);
        Some(address)
    }

    /// How many are kept; see `truncate`.
    pub(crate) fn len(&self) -> usize {
        self.kept.len()
    }

    /// Operations decoded since there were `count` are gone: single-stepping must not pile up.
    pub(crate) fn truncate(&mut self, count: usize) {
        self.kept.truncate(count);
    }

    /// The operations that pointed to thunks are gone.
    pub(crate) fn clear(&mut self) {
        self.kept.clear();
    }
}

/// A binding in progress, given to a row's bind function.
pub struct Binder<'a> {
    /// The decoded instruction.
    pub ins: &'a Instruction,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// The operation, operand fields filled in: memory operand, `dst` = register of operand 0,
    /// `src` = register of operand 1 (byte offsets), `imm` = the immediate or branch target.
    pub op: Op,
    /// The code segment's size.
    pub size: CodeSize,
    thunks: &'a mut Thunks,
}

unsafe fn undefined(cpu: &mut Cpu, _: &Op) -> R {
    Err(cpu.ud())
}

/// The handler that raises #UD.
pub const UNDEFINED: Handler = undefined;

/// Number of a segment register; None for others.
pub fn segment_number(register: Register) -> Option<u8> {
    (register >= Register::ES && register <= Register::GS).then(|| register as u8 - Register::ES as u8)
}

/// Byte offset in the register file of a general register.
pub fn register_offset(register: Register) -> Option<u8> {
    if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) {
        return Some((register as u8 - Register::AH as u8) * 8 + 1);
    }
    register.is_gpr().then(|| register.full_register().number() as u8 * 8)
}

impl<'a> Binder<'a> {
    /// Fills in the operands.
    pub fn new(ins: &'a Instruction, bytes: &'a [u8], size: CodeSize, thunks: &'a mut Thunks) -> Self {
        let op = Op {
            f: UNDEFINED,
            imm: 0,
            disp: 0,
            base: ZERO,
            index: ZERO,
            scale_seg: 0,
            dst: 0,
            src: 0,
            flags: 0,
            end: 0,
            len: ins.len() as u8,
        };
        let mut binder = Self { ins, bytes, op, size, thunks };
        binder.prefixes();
        for index in 0..ins.op_count() {
            binder.operand(index);
        }
        binder
    }

    fn prefixes(&mut self) {
        let ins = self.ins;
        let mut flags = if self.size == CodeSize::B64 { 0 } else { SLOW };
        for (set, flag) in [(ins.has_lock_prefix(), LOCK), (ins.has_rep_prefix(), REP), (ins.has_repne_prefix(), REPNE)]
        {
            flags |= if set { flag } else { 0 };
        }
        self.op.flags = flags;
        self.op.scale_seg = self.segment() << 2;
    }

    /// The memory operand's segment. In 64-bit mode override prefixes of ES, CS, SS and DS are ignored,
    /// also for the choice between #SS and #GP.
    fn segment(&self) -> u8 {
        const SS: u8 = 2;
        const DS: u8 = 3;
        let segment = segment_number(self.ins.memory_segment()).unwrap_or(DS);
        if self.size != CodeSize::B64 || segment > DS {
            return segment;
        }
        match self.ins.memory_base() {
            Register::RSP | Register::RBP | Register::ESP | Register::EBP => SS,
            _ => DS,
        }
    }

    fn address_size(&mut self, bytes: usize) {
        self.op.flags |= match bytes {
            2 => ADDR16 | SLOW,
            4 => ADDR32 | SLOW,
            _ => 0,
        };
    }

    fn operand(&mut self, index: u32) {
        let ins = self.ins;
        match ins.op_kind(index) {
            OpKind::Register => {
                let register = ins.op_register(index);
                let value = register_offset(register).unwrap_or_else(|| register.number() as u8);
                match index {
                    0 => self.op.dst = value,
                    1 => self.op.src = value,
                    _ => {}
                }
            }
            OpKind::Memory => self.memory(),
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => self.address_size(2),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => self.address_size(4),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                self.op.imm = ins.near_branch_target();
                if ins.op_kind(index) == OpKind::NearBranch16 {
                    self.op.flags |= OP16;
                }
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 => {
                let offset = if ins.op_kind(index) == OpKind::FarBranch16 {
                    self.op.flags |= OP16;
                    ins.far_branch16() as u64
                } else {
                    ins.far_branch32() as u64
                };
                self.op.imm = offset | (ins.far_branch_selector() as u64) << 32;
            }
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => {}
            // ENTER, INSERTQ and EXTRQ alone have two immediates; their handlers look again.
            _ => self.op.imm = ins.immediate(index),
        }
    }

    fn memory(&mut self) {
        let ins = self.ins;
        let (base, index) = (ins.memory_base(), ins.memory_index());
        let width = [base, index].iter().filter(|r| r.is_gpr() && r.size() > 1).map(|r| r.size()).next();
        let width = width.unwrap_or(match base {
            Register::RIP => 8,
            Register::EIP => 4,
            _ => ins.memory_displ_size() as usize,
        });
        self.op.base = match base {
            Register::None => ZERO,
            Register::RIP | Register::EIP => RIP_BASE,
            r => r.full_register().number() as u8,
        };
        if index != Register::None {
            self.op.index = index.full_register().number() as u8;
        }
        self.op.scale_seg |= ins.memory_index_scale().trailing_zeros() as u8;
        self.op.disp = ins.memory_displacement64() as i64;
        if width == 4 || width == 2 || self.size != CodeSize::B64 && width == 0 {
            self.address_size(if width == 0 {
                if self.size == CodeSize::B16 {
                    2
                } else {
                    4
                }
            } else {
                width
            });
        }
    }

    /// What operand `index` is.
    pub fn kind(&self, index: u32) -> Kind {
        if index >= self.ins.op_count() {
            return Kind::None;
        }
        match self.ins.op_kind(index) {
            OpKind::Register => Kind::Reg,
            OpKind::Memory => Kind::Mem,
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => Kind::Branch,
            OpKind::FarBranch16 | OpKind::FarBranch32 => Kind::Far,
            kind if kind >= OpKind::MemorySegSI && kind <= OpKind::MemoryESRDI => Kind::Str,
            _ => Kind::Imm,
        }
    }

    /// Bytes of operand `index` (register or memory).
    pub fn width(&self, index: u32) -> usize {
        match self.kind(index) {
            Kind::Reg => self.ins.op_register(index).size(),
            _ => self.ins.memory_size().size(),
        }
    }

    /// The operand size in bytes by prefix and code size, for instructions without sized operands.
    pub fn set_operand_size(&mut self, bytes: usize) {
        self.op.flags |= match bytes {
            2 => OP16,
            8 => OP64,
            _ => 0,
        };
    }

    /// The address of the host thunk for this instruction.
    pub fn thunk(&mut self) -> Option<*const Thunk> {
        self.thunks.get(self.ins, self.bytes)
    }

    /// Makes MASKMOV's implicit operand, [rDI], the memory operand.
    pub fn masked_move_operand(&mut self) {
        self.op.base = 7;
    }

    /// Whether the bytes hold an operand-size prefix (66).
    pub fn operand_override(&self) -> bool {
        let prefixes = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3];
        self.bytes.iter().take_while(|b| prefixes.contains(b)).any(|&b| b == 0x66)
    }
}

/// Binds an instruction: always gives an operation; what the table lacks raises #UD.
pub fn bind(ins: &Instruction, bytes: &[u8], size: CodeSize, thunks: &mut Thunks) -> Op {
    let mut binder = Binder::new(ins, bytes, size, thunks);
    let handler = match ins.code() {
        Code::INVALID => None,
        // Real mode has no VEX encodings; 16-bit code of protected mode, which nobody writes, goes without.
        code if size == CodeSize::B16 && is_vex(code) => None,
        _ => table::row(ins.mnemonic()).and_then(|row| (row.bind)(&mut binder)),
    };
    let mut op = binder.op;
    op.f = handler.unwrap_or(UNDEFINED);
    op
}

/// Chooses the instance of a generic handler for 1, 2, 4 or 8 bytes: `sized!(width, alu_rr, Add)`.
#[macro_export]
#[doc(hidden)]
macro_rules! sized {
    ($width:expr, $f:ident $(, $extra:ty)*) => {
        match $width {
            1 => Some($f::<u8 $(, $extra)*> as $crate::cpu::op::Handler),
            2 => Some($f::<u16 $(, $extra)*> as $crate::cpu::op::Handler),
            4 => Some($f::<u32 $(, $extra)*> as $crate::cpu::op::Handler),
            8 => Some($f::<u64 $(, $extra)*> as $crate::cpu::op::Handler),
            _ => None,
        }
    };
}

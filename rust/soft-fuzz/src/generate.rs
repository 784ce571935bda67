//! Random sequences. Registers are tracked roughly (pointer, small number, anything), so that most
//! memory operands lead into the data area and most counts are small; what an instruction needs
//! beyond that (`recipes.rs`) is put before it.

use crate::encode::{Address, Bank, Choice, Form, Rm};
use crate::layout::*;
use crate::recipes;
use crate::rng::Rng;
use crate::select::{is_safe, usable, Catalogue, RowCodes};
use crate::sequence::{Field, Item, Jump, Sequence};
use crate::values::{self, Kind};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess};
use ostler_soft::cpu::table::Class;

/// Encoding number of RSP.
pub const RSP: u8 = 4;
/// Most instructions that one sequence is made of, preparations not counted.
const MAX_LENGTH: u64 = 24;

/// Makes sequences.
pub struct Generator<'a> {
    /// The random source.
    pub rng: Rng,
    /// What registers hold at this point of the sequence.
    pub kinds: [Kind; 16],
    /// This sequence may use XRSTOR; otherwise the XSAVE family.
    pub restores: bool,
    /// 64, or 32 for compatibility mode.
    pub bits: u32,
    pools: [Pool; 2],
    pub(crate) items: Vec<Item>,
    information: InstructionInfoFactory,
    _catalogue: &'a Catalogue,
}

/// The forms of one mode, by row, and the rows of each class.
struct Pool {
    rows: Vec<Vec<Form>>,
    user: Vec<usize>,
    simd: Vec<usize>,
    branch: Vec<usize>,
}

impl Pool {
    fn new(catalogue: &Catalogue, bits: u32) -> Self {
        let forms = |codes: &[Code]| codes.iter().filter_map(|&code| Form::new(code, bits)).collect();
        let codes = |row: &RowCodes| if bits == 64 { row.codes.clone() } else { row.codes32.clone() };
        let rows: Vec<(Class, Vec<Form>)> = catalogue.rows.iter().map(|row| (row.class, forms(&codes(row)))).collect();
        let of = |class| (0..rows.len()).filter(|&index| rows[index].0 == class && !rows[index].1.is_empty()).collect();
        let (user, simd, branch) = (of(Class::User), of(Class::Simd), of(Class::Branch));
        Self { user, simd, branch, rows: rows.into_iter().map(|(_, forms)| forms).collect() }
    }
}

/// Where an instruction's memory operand should lead.
#[derive(Clone, Copy, Debug, Default)]
pub struct Need {
    /// Alignment that spares a fault: 1 to 64.
    pub align: u64,
    /// An offset in the data area, instead of anywhere.
    pub at: Option<u64>,
}

impl<'a> Generator<'a> {
    /// A generator for the rows of a catalogue.
    pub fn new(catalogue: &'a Catalogue, seed: u64) -> Self {
        Self {
            rng: Rng::new(seed),
            kinds: [Kind::Value; 16],
            restores: false,
            bits: 64,
            pools: [Pool::new(catalogue, 64), Pool::new(catalogue, 32)],
            items: Vec::new(),
            information: InstructionInfoFactory::new(),
            _catalogue: catalogue,
        }
    }

    /// A new sequence and what its registers should hold at the start.
    pub fn sequence(&mut self) -> (Sequence, [Kind; 16]) {
        self.bits = if self.rng.percent(15) { 32 } else { 64 };
        let kinds = self.begin();
        let length = 1 + self.rng.below(MAX_LENGTH);
        // Some sequences keep to one family: their state then stays interesting for it.
        let family = self.rng.below(8);
        let mut made = 0;
        while made < length {
            made += self.instruction(family) as u64;
        }
        self.aim_branches();
        (Sequence { items: std::mem::take(&mut self.items) }, kinds)
    }

    /// Begins a sequence; what registers shall hold at its start.
    pub(crate) fn begin(&mut self) -> [Kind; 16] {
        self.kinds = self.initial_kinds();
        self.items.clear();
        self.restores = self.rng.percent(40);
        self.kinds
    }

    fn initial_kinds(&mut self) -> [Kind; 16] {
        let mut kinds = [Kind::Value; 16];
        for kind in kinds.iter_mut() {
            *kind = match self.rng.below(8) {
                0..=2 => Kind::Pointer,
                3 => Kind::Small,
                _ => Kind::Value,
            };
        }
        kinds[RSP as usize] = Kind::Stack;
        if self.rng.percent(50) {
            kinds[5] = Kind::Stack;
        }
        if self.bits == 32 {
            kinds[8..].fill(Kind::Value);
        }
        kinds
    }

    /// Adds one instruction with its preparations; false when the attempt gave nothing.
    pub(crate) fn instruction(&mut self, family: u64) -> bool {
        let pool = &self.pools[(self.bits == 32) as usize];
        let list = match (family, self.rng.below(100)) {
            (0 | 1, 0..=4) => &pool.branch,
            (0 | 1, _) => &pool.simd,
            (2 | 3, 0..=79) | (_, 0..=44) => &pool.user,
            (2 | 3, _) | (_, 45..=54) => &pool.branch,
            _ => &pool.simd,
        };
        if list.is_empty() {
            return false;
        }
        let row = list[self.rng.below(list.len() as u64) as usize];
        let forms = &pool.rows[row];
        let form = forms[self.rng.below(forms.len() as u64) as usize].clone();
        let before = self.items.len();
        let made = recipes::cook(self, &form);
        if !made {
            self.items.truncate(before);
        }
        made
    }

    /// Gives branches their targets: mostly a little forward.
    pub(crate) fn aim_branches(&mut self) {
        let count = self.items.len();
        let entries: Vec<usize> = (0..count).filter(|&i| !self.items[i].glued).chain([count]).collect();
        for index in 0..count {
            let Some(jump) = self.items[index].jump else { continue };
            if jump.target != usize::MAX {
                continue;
            }
            let here = entries.partition_point(|&entry| entry <= index);
            let target = if self.rng.percent(12) {
                here.saturating_sub(1 + self.rng.below(4) as usize)
            } else {
                (here + self.rng.below(4) as usize).min(entries.len() - 1)
            };
            self.items[index].jump = Some(Jump { target: entries[target], ..jump });
        }
    }

    // ---- what recipes are made of ---------------------------------------------------------

    /// Random operands for a form; memory as `need` says.
    pub fn choose(&mut self, form: &Form, need: Need) -> Choice {
        let memory = match form.rm {
            Rm::Memory => true,
            Rm::Either => self.rng.percent(55),
            _ => false,
        };
        let mut choice = Choice {
            reg: self.register(form.reg),
            rm: self.register(Some(form.rm_bank)),
            opcode_reg: self.register(form.opcode_reg),
            vvvv: self.register(form.vvvv),
            rex: self.bits == 64 && self.rng.percent(10),
            wide: self.rng.percent(10),
            long_displacement: self.rng.percent(5),
            ..Choice::default()
        };
        if memory {
            choice.memory = Some(self.address(need));
        }
        if form.moffs {
            choice.immediate = self.data_address(need).to_le_bytes()[..self.bits as usize / 8].to_vec();
        } else {
            for &size in &form.immediates {
                let value = values::integer(&mut self.rng).to_le_bytes();
                choice.immediate.extend_from_slice(&value[..size as usize]);
            }
        }
        let lockable = memory && form.code.op_code().can_use_lock_prefix();
        if lockable && self.rng.percent(30) {
            choice.prefix = Some(0xf0);
        }
        if self.rng.percent(4) && !form.branch {
            let noise = [0x66, 0xf2, 0xf3, 0x2e, 0x36, 0x3e, 0x26, 0x67, 0x48, 0x4f, 0x40];
            let fitting = if self.bits == 64 { &noise[..] } else { &noise[..7] };
            choice.noise.push(self.rng.pick(fitting));
        }
        choice
    }

    fn register(&mut self, bank: Option<Bank>) -> u8 {
        match bank {
            None => 0,
            Some(Bank::Eight) => self.rng.below(8) as u8,
            Some(Bank::Segment) => self.rng.below(6) as u8,
            Some(Bank::Xmm | Bank::Gpr8) => self.rng.below(self.registers()) as u8,
            Some(Bank::Gpr) => self.gpr(),
        }
    }

    /// How many registers the mode has.
    fn registers(&self) -> u64 {
        self.bits as u64 / 4
    }

    /// A general register: seldom RSP, rather no pointer.
    pub fn gpr(&mut self) -> u8 {
        loop {
            let register = self.rng.below(self.registers()) as u8;
            let spare = match self.kinds[register as usize] {
                Kind::Stack => 92,
                Kind::Pointer => 60,
                _ => 0,
            };
            if !self.rng.percent(spare) {
                return register;
            }
        }
    }

    /// An address in the data area.
    pub fn data_address(&mut self, need: Need) -> u64 {
        let at = match need.at {
            Some(at) => return DATA + at,
            None => 0x400 + self.rng.below(0x2000),
        };
        self.aligned(DATA + at, need.align)
    }

    fn aligned(&mut self, address: u64, align: u64) -> u64 {
        let keep = align > 1 && self.rng.percent(96) || align <= 1 && self.rng.percent(50);
        if keep {
            address & !(align.max(8) - 1)
        } else {
            address
        }
    }

    /// A memory operand.
    pub fn address(&mut self, need: Need) -> Address {
        let mut address = match self.rng.below(100) {
            _ if need.at.is_some() && self.rng.percent(60) => self.direct(need),
            0..=19 => self.direct(need),
            20..=27 if need.at.is_none() => {
                let disp = self.rng.below(0x80) as i64 as u64;
                let disp = self.aligned(disp, need.align) as i32;
                Address { base: Some(RSP), disp, ..Address::default() }
            }
            28..=33 if need.at.is_none() && self.bits == 64 => self.segmented(need),
            34 => {
                let base = self.any_but_rsp();
                let value = values::bad_pointer(&mut self.rng);
                self.load(base, value, Kind::Value);
                Address { base: Some(base), ..Address::default() }
            }
            _ => self.based(need),
        };
        // In the lower 4 GiB a 32-bit address is as good, as long as the base is below it too.
        address.short = self.bits == 64 && self.rng.percent(5) && address.segment.is_none();
        if self.rng.percent(2) && !address.rip {
            address.segment = Some(self.rng.pick(&[0x26, 0x2e, 0x36, 0x3e]));
        }
        address
    }

    fn direct(&mut self, need: Need) -> Address {
        let rip = self.rng.percent(60);
        Address { rip, disp: self.data_address(need) as i32, ..Address::default() }
    }

    /// Relative to the FS or GS base, which lie in the data area.
    fn segmented(&mut self, need: Need) -> Address {
        let disp = self.rng.below(0x400) as i64 as u64;
        let disp = self.aligned(disp, need.align) as i32;
        Address { segment: Some(self.rng.pick(&[0x64, 0x65])), disp, ..Address::default() }
    }

    fn based(&mut self, need: Need) -> Address {
        let base = match need.at {
            None => self.pointer(),
            Some(at) => {
                let base = self.any_but_rsp();
                self.load(base, DATA + at, Kind::Pointer);
                return Address { base: Some(base), ..Address::default() };
            }
        };
        let raw = self.rng.below(0x800) as i64 - 0x400;
        let raw = if self.rng.percent(50) { raw / 16 } else { raw };
        let disp = self.aligned(raw as u64, need.align) as i32;
        let mut address = Address { base: Some(base), disp, ..Address::default() };
        let small = self.rng.below(self.registers()) as u8;
        if self.kinds[small as usize] == Kind::Small && small != RSP && need.align <= 1 {
            address.index = Some((small, self.rng.below(4) as u8));
        } else if self.rng.percent(10) && need.align <= 1 {
            let index = self.any_but_rsp();
            if index != base {
                let value = self.rng.below(32);
                self.load(index, value, Kind::Small);
                address.index = Some((index, self.rng.below(4) as u8));
            }
        }
        address
    }

    /// A general register other than RSP.
    pub fn any_but_rsp(&mut self) -> u8 {
        let count = self.registers();
        ((RSP as u64 + 1 + self.rng.below(count - 1)) % count) as u8
    }

    /// A register that leads into the data area.
    pub fn pointer(&mut self) -> u8 {
        let start = self.rng.below(16) as u8;
        let known = (0..16).map(|i| (start + i) & 15).find(|&r| self.kinds[r as usize] == Kind::Pointer);
        known.unwrap_or_else(|| {
            let register = self.any_but_rsp();
            self.ensure(register, Kind::Pointer);
            register
        })
    }

    /// Makes sure, mostly, that a register holds what an instruction expects.
    pub fn ensure(&mut self, register: u8, kind: Kind) {
        if self.kinds[register as usize] == kind {
            return;
        }
        let value = match kind {
            Kind::Pointer => values::pointer(&mut self.rng),
            Kind::Stack => values::stack_pointer(&mut self.rng),
            Kind::Small => self.rng.below(40),
            Kind::Value => values::integer(&mut self.rng),
        };
        self.load(register, value, kind);
    }

    /// `mov register, value`, as short as possible.
    pub fn load(&mut self, register: u8, value: u64, kind: Kind) {
        let (high, low) = (register >> 3, register & 7);
        let mut bytes;
        let value = if self.bits == 32 { value & 0xffff_ffff } else { value };
        if let Ok(small) = u32::try_from(value) {
            bytes = if high != 0 { vec![0x41, 0xb8 | low] } else { vec![0xb8 | low] };
            bytes.extend_from_slice(&small.to_le_bytes());
        } else if value as i64 == value as i32 as i64 {
            bytes = vec![0x48 | high, 0xc7, 0xc0 | low];
            bytes.extend_from_slice(&(value as u32).to_le_bytes());
        } else {
            bytes = vec![0x48 | high, 0xb8 | low];
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        self.items.push(Item { bytes, ..Item::default() });
        self.kinds[register as usize] = kind;
    }

    /// A vector register.
    pub fn vector(&mut self) -> u8 {
        self.register(Some(Bank::Xmm))
    }

    /// Adds given bytes.
    pub fn raw(&mut self, bytes: &[u8], glued: bool) {
        self.items.push(Item { bytes: bytes.to_vec(), glued, ..Item::default() });
        self.note_writes(bytes);
    }

    /// Adds `opcode` with the 32-bit address of an item yet to be chosen behind it.
    pub fn code_address(&mut self, opcode: &[u8]) {
        let at = opcode.len();
        let mut bytes = opcode.to_vec();
        bytes.extend_from_slice(&[0; 4]);
        let jump = Some(Jump { at, field: Field::Absolute32, target: usize::MAX });
        self.note_writes(&bytes);
        self.items.push(Item { bytes, jump, ..Item::default() });
    }

    /// Encodes and adds an instruction; false when the bytes mean something else that must not run.
    pub fn emit(&mut self, form: &Form, choice: &Choice, glued: bool) -> bool {
        let encoded = form.encode(choice);
        let Some(instruction) = decode(&encoded.bytes, self.bits) else { return false };
        let undefined = if is_laundered(&instruction) { undefined_flags(&instruction) } else { 0 };
        if undefined != 0 {
            self.ensure(RSP, Kind::Stack);
        }
        let mut item = Item { glued, ..Item::default() };
        if let Some(address) = choice.memory.filter(|address| address.rip && self.bits == 64) {
            item.rip = encoded.rip_at.map(|at| (at, address.disp as u64));
        }
        if form.branch {
            let field = if choice.immediate.len() == 1 { Field::Relative8 } else { Field::Relative32 };
            let at = encoded.bytes.len() - choice.immediate.len();
            item.jump = Some(Jump { at, field, target: usize::MAX });
        }
        self.note(&instruction);
        item.bytes = encoded.bytes;
        self.items.push(item);
        if undefined != 0 {
            self.launder(undefined);
        }
        true
    }

    /// Clears flags that the manual leaves undefined, and keeps the others:
    /// `pushfq`; `and qword ptr [rsp], mask`; `popfq`.
    fn launder(&mut self, undefined: u32) {
        self.raw(&[0x9c], true);
        let mut clear = if self.bits == 64 { vec![0x48] } else { Vec::new() };
        clear.extend_from_slice(&[0x81, 0x24, 0x24]);
        clear.extend_from_slice(&(!undefined).to_le_bytes());
        self.raw(&clear, true);
        self.raw(&[0x9d], true);
    }

    /// Glues the last item to the one before it.
    pub fn glue(&mut self) {
        if let Some(item) = self.items.last_mut() {
            item.glued = true;
        }
    }

    fn note_writes(&mut self, bytes: &[u8]) {
        if let Some(instruction) = decode(bytes, self.bits) {
            self.note(&instruction);
        }
    }

    /// Forgets what written registers held.
    fn note(&mut self, instruction: &Instruction) {
        let keeps_pointers = instruction.is_string_instruction() || instruction.is_stack_instruction();
        for used in self.information.info(instruction).used_registers() {
            let written = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
            let register = used.register();
            if !written || !register.is_gpr() {
                continue;
            }
            let number = register.full_register().number();
            let kept = match self.kinds[number] {
                Kind::Stack => keeps_pointers && number == RSP as usize,
                _ => instruction.is_string_instruction(),
            };
            if !kept {
                self.kinds[number] = Kind::Value;
            }
        }
    }
}

/// Instructions whose undefined flags the interpreter does not take from the same instruction of the
/// host: BMI and decimal adjustments (it computes the result).
fn is_laundered(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bzhi
            | M::Aaa
            | M::Aas
            | M::Aad
            | M::Aam
            | M::Daa
            | M::Das
    )
}

/// RFLAGS bits that the instruction leaves undefined.
fn undefined_flags(instruction: &Instruction) -> u32 {
    use iced_x86::RflagsBits as B;
    let undefined = instruction.rflags_undefined();
    let by_immediate = instruction.op1_kind() == iced_x86::OpKind::Immediate8 && instruction.immediate8() & 0x1f > 1;
    // Also where a rotate through CF by the whole width changes nothing else.
    let undefined = if by_immediate { undefined | B::OF } else { undefined };
    let bits = [(B::OF, 0x800), (B::SF, 0x80), (B::ZF, 0x40), (B::AF, 0x10), (B::PF, 4), (B::CF, 1)];
    bits.iter().filter(|(bit, _)| undefined & bit != 0).map(|(_, value)| value).sum()
}

/// Decodes an instruction that must fill the bytes, be an encoding that may run here, and have a row.
pub fn decode(bytes: &[u8], bits: u32) -> Option<Instruction> {
    let mut decoder = Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let good = instruction.len() == bytes.len() && usable(instruction.code(), bits) && is_safe(instruction.mnemonic());
    // On Intel's CPUs 66 changes nothing for near branches; on AMD's it does.
    let branch16 = bytes.contains(&0x66) && instruction.flow_control() != iced_x86::FlowControl::Next;
    let plain = instruction.mnemonic() != Mnemonic::INVALID;
    (good && plain && !branch16).then_some(instruction)
}

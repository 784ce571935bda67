//! What particular instructions need before them to do more than fault: counts that end, pointers
//! where operands are implicit, images for the ones that load state, targets for branches.

use crate::encode::{Choice, Form, Rm};
use crate::generate::{Generator, Need, RSP};
use crate::layout::*;
use crate::values::{self, Kind};
use iced_x86::Mnemonic as M;
use ostler_soft::host::vex::host_has_all;

const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;
const RBX: u8 = 3;
const RBP: u8 = 5;
const RSI: u8 = 6;
const RDI: u8 = 7;

/// Adds an instruction of this form with its preparations; false when it cannot be made this time.
pub fn cook(g: &mut Generator, form: &Form) -> bool {
    if form.code.op_code().is_fpu_no_wait() && form.code.op_code().fwait() {
        return false;
    }
    if form.si || form.di {
        return string(g, form);
    }
    if form.branch {
        return branch(g, form);
    }
    match form.code.mnemonic() {
        M::Jmp | M::Call => indirect(g, form),
        M::Ret => ret(g, form),
        M::Popf | M::Popfd | M::Popfq => popf(g, form),
        M::Div | M::Idiv => divide(g, form),
        M::Bt | M::Bts | M::Btr | M::Btc => bit(g, form),
        M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b => compare_exchange(g, form),
        M::Enter => enter(g, form),
        M::Leave => with(g, form, RBP, Kind::Stack),
        M::Xlatb => with(g, form, RBX, Kind::Pointer),
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => with(g, form, RDI, Kind::Pointer),
        M::Wrfsbase | M::Wrgsbase => base(g, form),
        M::Xgetbv => xgetbv(g, form),
        M::Fldenv | M::Frstor => at_image(g, form, FNSAVE_IMAGE, 0, 1),
        M::Fldcw => at_image(g, form, CONTROL_WORDS + 64, 32, 2),
        _ if form.vector_index => gather(g, form),
        // Whether registers that are all zero count as in use depends on the CPU: no sequence saves them.
        M::Vzeroall | M::Vzeroupper if !g.restores => false,
        M::Ldmxcsr | M::Vldmxcsr => at_image(g, form, CONTROL_WORDS, 16, 4),
        M::Fxrstor | M::Fxrstor64 | M::Fxsave | M::Fxsave64 => at_image(g, form, XSAVE_IMAGES, 2, 0x400),
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => xsave(g, form),
        M::Xrstor | M::Xrstor64 => xsave(g, form),
        M::Push | M::Pop | M::Pushfq | M::Pushfd | M::Pushf => stack(g, form),
        M::Pusha | M::Pushad | M::Popa | M::Popad => stack(g, form),
        _ => plain(g, form, Need { align: alignment(form), at: None }),
    }
}

/// Alignment that an operand needs, or that makes sense.
fn alignment(form: &Form) -> u64 {
    match form.code.op_code().memory_size().size() {
        size @ (16 | 32) => size as u64,
        _ => 1,
    }
}

/// A gather, whose indices are made small before.
fn gather(g: &mut Generator, form: &Form) -> bool {
    let mut choice = g.choose(form, Need { align: 1, at: None });
    choice.noise.clear();
    let index = g.vector();
    if g.rng.percent(95) && (index == choice.reg || index == choice.vvvv || choice.reg == choice.vvvv) {
        return false;
    }
    // VPSRLD and VPSRLQ of the index register by an immediate; the third operand is in VEX.vvvv.
    let qwords = matches!(form.code.mnemonic(), M::Vgatherqps | M::Vgatherqpd | M::Vpgatherqd | M::Vpgatherqq);
    let (opcode, bits) = if qwords { (0x73, 64) } else { (0x72, 32) };
    let shift = if g.rng.percent(95) { bits - 6 } else { bits - 14 };
    let extension = if index >= 8 { 0xc1 } else { 0xe1 };
    g.raw(&[0xc4, extension, (!index & 15) << 3 | 5, opcode, 0xd0 | index & 7, shift], false);
    let base = g.pointer();
    let (disp, scale) = (g.rng.below(0x100) as i32, g.rng.below(4) as u8);
    choice.memory =
        Some(crate::encode::Address { base: Some(base), index: Some((index, scale)), disp, ..Default::default() });
    g.emit(form, &choice, true)
}

fn plain(g: &mut Generator, form: &Form, need: Need) -> bool {
    let mut choice = g.choose(form, need);
    // Memory-only hints and LEA may name any address; the others were given a good one.
    if form.rm == Rm::None {
        choice.memory = None;
    }
    g.emit(form, &choice, false)
}

fn with(g: &mut Generator, form: &Form, register: u8, kind: Kind) -> bool {
    if g.rng.percent(95) {
        g.ensure(register, kind);
    }
    plain(g, form, Need::default())
}

fn stack(g: &mut Generator, form: &Form) -> bool {
    with(g, form, RSP, Kind::Stack)
}

fn string(g: &mut Generator, form: &Form) -> bool {
    if form.si && g.rng.percent(97) {
        g.ensure(RSI, Kind::Pointer);
    }
    if form.di && g.rng.percent(97) {
        g.ensure(RDI, Kind::Pointer);
    }
    let mut choice = g.choose(form, Need::default());
    choice.noise.clear();
    if g.rng.percent(60) {
        if g.rng.percent(97) {
            g.ensure(RCX, Kind::Small);
        }
        choice.prefix = Some(if g.rng.percent(60) { 0xf3 } else { 0xf2 });
    }
    let short = g.bits == 64 && g.rng.percent(5);
    if short {
        // What a count of zero does to the registers' upper halves depends on the CPU.
        let count = 1 + g.rng.below(24);
        g.load(RCX, count, Kind::Small);
        for register in [RSI, RDI] {
            let value = values::pointer(&mut g.rng);
            g.load(register, value, Kind::Pointer);
            g.glue();
        }
        choice.noise.push(0x67);
    }
    if form.si && g.rng.percent(5) {
        choice.noise.push(g.rng.pick(&[0x26, 0x2e, 0x36, 0x3e]));
    }
    g.emit(form, &choice, short)
}

fn branch(g: &mut Generator, form: &Form) -> bool {
    let code = form.code;
    if code.is_loop() || code.is_loopcc() || code.is_jcx_short() {
        let count = g.rng.below(4);
        g.load(RCX, count, Kind::Small);
    }
    if code.mnemonic() == M::Call {
        g.ensure(RSP, Kind::Stack);
    }
    let choice = Choice { immediate: vec![0; form.immediates[0] as usize], ..Choice::default() };
    g.emit(form, &choice, false)
}

/// Indirect JMP and CALL: the target by register or memory.
fn indirect(g: &mut Generator, form: &Form) -> bool {
    g.ensure(RSP, Kind::Stack);
    let mut choice = g.choose(form, Need::default());
    choice.noise.clear();
    if g.rng.percent(10) {
        return g.emit(form, &choice, false);
    }
    match choice.memory.as_mut() {
        None => {
            choice.rm = g.rng.pick(&[0, 1, 2, 3, 6, 7]);
            g.code_address(&[0xb8 | choice.rm]);
        }
        Some(address) => {
            // mov qword ptr [absolute], imm32
            let at = g.data_address(Need::default());
            *address = crate::encode::Address { disp: at as i32, ..Default::default() };
            let mut store = if g.bits == 64 { vec![0x48] } else { Vec::new() };
            store.extend_from_slice(&[0xc7, 0x04, 0x25]);
            store.extend_from_slice(&(at as u32).to_le_bytes());
            g.code_address(&store);
        }
    }
    g.emit(form, &choice, true)
}

fn ret(g: &mut Generator, form: &Form) -> bool {
    let mut choice = g.choose(form, Need::default());
    choice.noise.clear();
    if !choice.immediate.is_empty() {
        choice.immediate = vec![g.rng.below(64) as u8 & !7, 0];
    }
    g.ensure(RSP, Kind::Stack);
    let good = g.rng.percent(90);
    if good {
        g.code_address(&[0x68]);
    }
    g.emit(form, &choice, good)
}

/// User code may change the arithmetic flags, DF, NT and ID; TF and AC are kept out, the host's
/// kernel would act on them.
fn popf(g: &mut Generator, form: &Form) -> bool {
    g.ensure(RSP, Kind::Stack);
    let flags = g.rng.u64() as u32 & 0x003a_3ad5;
    let mut push = vec![0x68];
    push.extend_from_slice(&flags.to_le_bytes());
    g.raw(&push, false);
    g.emit(form, &Choice::default(), true)
}

/// Random dividends overflow nearly always: mostly one that does not.
fn divide(g: &mut Generator, form: &Form) -> bool {
    match g.rng.below(4) {
        0 => {}
        1 if g.bits == 64 => g.raw(&[0x48, 0x99], false),
        1 => g.raw(&[0x99], false),
        2 => g.raw(&[0x31, 0xd2], false),
        _ => {
            let small = g.rng.below(100);
            g.load(RAX, small, Kind::Small);
            g.load(RDX, 0, Kind::Small);
        }
    }
    plain(g, form, Need::default())
}

/// A bit offset in a register reaches up to 2^60 bytes away.
fn bit(g: &mut Generator, form: &Form) -> bool {
    let mut choice = g.choose(form, Need::default());
    if choice.memory.is_some() && form.reg.is_some() && g.rng.percent(92) {
        let based = choice.memory.and_then(|address| address.base);
        choice.reg = g.any_but_rsp();
        if based != Some(choice.reg) && choice.memory.and_then(|a| a.index).is_none_or(|(r, _)| r != choice.reg) {
            let offset = g.rng.below(0x400);
            let sign = g.rng.percent(40);
            g.load(choice.reg, if sign { 0u64.wrapping_sub(offset) } else { offset }, Kind::Value);
        }
    }
    g.emit(form, &choice, false)
}

/// Half of the comparisons are made to succeed: the accumulator is loaded from the operand.
fn compare_exchange(g: &mut Generator, form: &Form) -> bool {
    let need = Need { align: 16, at: None };
    let mut choice = g.choose(form, need);
    choice.noise.clear();
    if let (Some(_), true) = (choice.memory, g.rng.percent(50)) {
        let at = g.data_address(need);
        choice.memory = Some(crate::encode::Address { disp: at as i32, ..Default::default() });
        let wide = if g.bits == 64 && g.rng.percent(80) { 0x48 } else { 0x40 };
        for (modrm, offset) in [(0x04, 0), (0x14, if wide == 0x48 { 8 } else { 4 })] {
            let mut load = if g.bits == 64 { vec![wide] } else { Vec::new() };
            load.extend_from_slice(&[0x8b, modrm, 0x25]);
            load.extend_from_slice(&(at as u32 + offset).to_le_bytes());
            g.raw(&load, false);
        }
    }
    g.emit(form, &choice, false)
}

fn enter(g: &mut Generator, form: &Form) -> bool {
    g.ensure(RSP, Kind::Stack);
    g.ensure(RBP, Kind::Stack);
    let level = if g.rng.percent(70) { g.rng.below(3) } else { g.rng.u64() & 0xff };
    let immediate = vec![g.rng.u64() as u8, g.rng.below(2) as u8, level as u8];
    let choice = Choice { immediate, ..g.choose(form, Need::default()) };
    g.emit(form, &Choice { noise: Vec::new(), ..choice }, false)
}

fn base(g: &mut Generator, form: &Form) -> bool {
    let mut choice = g.choose(form, Need::default());
    choice.rm = if g.rng.percent(90) { g.pointer() } else { choice.rm };
    g.emit(form, &choice, false)
}

fn xgetbv(g: &mut Generator, form: &Form) -> bool {
    g.load(RCX, 0, Kind::Small);
    g.emit(form, &Choice::default(), true)
}

/// An instruction that loads (or stores over) one of the images in the data area.
fn at_image(g: &mut Generator, form: &Form, image: u64, count: u64, step: u64) -> bool {
    let index = if count == 0 { 0 } else { g.rng.below(count) };
    let odd = if g.rng.percent(3) { g.rng.below(16) } else { 0 };
    plain(g, form, Need { align: 1, at: Some(image + index * step + odd) })
}

/// XSAVE and its kin: x87, SSE and AVX are asked for, the rest of the host's state is its own.
fn xsave(g: &mut Generator, form: &Form) -> bool {
    // A component that was set to its initial state and touched since: whether it counts as in use
    // depends on the CPU. So no sequence both restores and saves.
    let restores = matches!(form.code.mnemonic(), M::Xrstor | M::Xrstor64);
    if restores != g.restores {
        return false;
    }
    // XSAVEOPT leaves out what did not change since an XRSTOR of the same image, which depends on the
    // CPU: it has an image of its own.
    let optimised = matches!(form.code.mnemonic(), M::Xsaveopt | M::Xsaveopt64);
    let offset = if optimised { XSAVEOPT_IMAGE } else { XSAVE_IMAGES + g.rng.below(2) * 0x400 };
    let odd = if g.rng.percent(3) { g.rng.below(64) } else { 0 };
    let mut choice = g.choose(form, Need { align: 1, at: Some(offset + odd) });
    choice.noise.clear();
    // The operand must not depend on what the mask is loaded into.
    let address = choice.memory.unwrap_or_default();
    if [address.base, address.index.map(|(register, _)| register)].iter().flatten().any(|&r| r == RAX || r == RDX) {
        return false;
    }
    let mask = g.rng.below(if host_has_all() { 8 } else { 4 });
    g.load(RAX, mask, Kind::Small);
    g.load(RDX, 0, Kind::Small);
    g.glue();
    g.emit(form, &choice, true)
}

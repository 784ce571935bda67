//! What differs between two outcomes, and what may.

use crate::layout::*;
use iced_x86::{Instruction, Mnemonic, Register};
use ostler_soft::host::vex::{is_gather, is_selective, plain};

/// Flags the manual leaves undefined are compared all the same: the interpreter takes them from the
/// host's own instructions (where it does not, `generate.rs` makes them defined). What hardware is
/// free to do around a fault is excused here, each with its place in the manual: `ours` is made
/// equal to `native` where the difference is none.
pub fn excuse(case: &Case, native: &Outcome, ours: &mut Outcome) {
    let End::Fault { vector, .. } = native.end else { return };
    let offset = native.state.rip.wrapping_sub(case.state.rip) as usize;
    let Ok(index) = case.starts.binary_search(&offset) else { return };
    let instruction = case.instructions()[index];
    let ours_faulted = matches!(ours.end, End::Fault { .. }) && ours.state.rip == native.state.rip;
    if !ours_faulted {
        if is_masked_move(&instruction) && matches!(vector, 13 | 14) {
            // SDM vol. 2B, MASKMOVQ: a fault in spite of an all-zero mask depends on the CPU.
            *ours = native.clone();
        }
        if chooses_elements(&instruction) && vector == 13 {
            // The CPU looks at all of the operand's addresses, the interpreter at those of chosen elements.
            *ours = native.clone();
        }
        if is_dot_product(&instruction) && vector == 19 {
            // `host/thunk.rs` sees underflow in the result, not in the products it is made of.
            *ours = native.clone();
        }
        return;
    }
    if case.bits == 32 && at_the_top(&instruction, &native.state) {
        // SDM vol. 3, 5.3: whether an access beyond 4 GiB exceeds a limit of 4 GiB depends on the CPU.
        ours.end = native.end;
    }
    if matches!(instruction.mnemonic(), Mnemonic::Popa | Mnemonic::Popad) {
        // Some of the registers may have been loaded before the fault, as with a store in parts.
        ours.state.gpr = native.state.gpr;
    }
    if several_operands(&instruction) {
        // SDM vol. 3, 6.9: in which order one instruction's operands fault depends on the CPU.
        ours.end = native.end;
    }
    if matches!(instruction.mnemonic(), Mnemonic::Vcvtps2ph) {
        // The same for the operand and the exceptions of what is stored there.
        ours.end = native.end;
        ours.state.fx[fx::MXCSR] = native.state.fx[fx::MXCSR];
    }
    if ours.end != native.end {
        return;
    }
    if stores_in_parts(&instruction) {
        // SDM vol. 3, 8.1.1: a store of several parts may be seen in part when one of them faults.
        ours.memory = native.memory.clone();
    }
    if is_gather(instruction.mnemonic()) {
        excuse_above(&instruction, native, ours);
    }
    if uses_mmx(&instruction) && same_mmx(&native.state, &ours.state) {
        // SDM vol. 1, 9.6.2 does not say whether an instruction that faults has entered MMX mode.
        ours.state.fx[..fx::XMM].copy_from_slice(&native.state.fx[..fx::XMM]);
    }
    if restores(&instruction) {
        // SDM vol. 1, 13.8: what was restored before the fault depends on the CPU.
        (ours.state.fx, ours.state.ymm) = (native.state.fx, native.state.ymm);
    }
    if vector == 19 && is_dot_product(&instruction) {
        // Several operations one after the other: the interpreter goes on behind the one that faults.
        ours.state.fx[fx::MXCSR] = native.state.fx[fx::MXCSR];
    }
    if vector == 19 {
        excuse_precision(native, ours);
    }
    if launders(&instruction) {
        ours.state.rflags = native.state.rflags;
    }
}

/// SDM vol. 2C, VGATHER: what is above the elements of destination and mask becomes zero; whether it
/// is that already when an element faults depends on the CPU.
fn excuse_above(instruction: &Instruction, native: &Outcome, ours: &mut Outcome) {
    let narrow = matches!(instruction.mnemonic(), Mnemonic::Vgatherqps | Mnemonic::Vpgatherqd)
        && instruction.memory_index().is_xmm();
    for register in [instruction.op0_register().number(), instruction.op2_register().number()] {
        if instruction.op0_register().is_xmm() {
            let above = 16 * register..16 * register + 16;
            ours.state.ymm[above.clone()].copy_from_slice(&native.state.ymm[above]);
        }
        let end = fx::XMM + 16 * register + 16;
        if narrow {
            ours.state.fx[end - 8..end].copy_from_slice(&native.state.fx[end - 8..end]);
        }
    }
}

/// Whether an operand may reach beyond 4 GiB.
fn at_the_top(instruction: &Instruction, state: &State) -> bool {
    let register = |register: Register, _: usize, _: usize| {
        let known = register.is_gpr().then(|| state.gpr[register.full_register().number()] & 0xffff_ffff);
        known.or(register.is_segment_register().then_some(0))
    };
    let pushed = state.gpr[4].wrapping_sub(32) & 0xffff_ffff;
    // Strings, LEAVE, XLAT: by one of the registers.
    let implicit = state.gpr.into_iter().chain([pushed]);
    let explicit = (0..instruction.op_count()).filter_map(|index| instruction.virtual_address(index, 0, register));
    explicit.map(|address| address & 0xffff_ffff).chain(implicit).any(|address| address >= 0xffff_fe00)
}

/// `pushfq`, with which `generate.rs` begins to make undefined flags defined, did not get that far.
fn launders(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Pushfq | Mnemonic::Pushfd)
}

fn is_dot_product(instruction: &Instruction) -> bool {
    matches!(plain(instruction.mnemonic()), Mnemonic::Dpps | Mnemonic::Dppd)
}

fn is_masked_move(instruction: &Instruction) -> bool {
    matches!(plain(instruction.mnemonic()), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu)
}

/// VMASKMOV and VPMASKMOV.
fn chooses_elements(instruction: &Instruction) -> bool {
    is_selective(instruction.mnemonic()) && !is_gather(instruction.mnemonic())
}

fn several_operands(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let wide = matches!(
        instruction.mnemonic(),
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 | M::Fnsave | M::Fnstenv | M::Frstor | M::Fldenv
    );
    let compares = matches!(instruction.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq);
    wide || compares
        || is_masked_move(instruction)
        || chooses_elements(instruction)
        || stores_in_parts(instruction)
        || matches!(instruction.mnemonic(), M::Call | M::Xrstor | M::Xrstor64)
}

fn stores_in_parts(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Fxsave
            | M::Fxsave64
            | M::Fnsave
            | M::Fnstenv
            | M::Xsave
            | M::Xsave64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Enter
            | M::Pusha
            | M::Pushad
            | M::Fbstp
            | M::Fstp
            // The return address, before the target turns out to be bad.
            | M::Call
    )
}

fn restores(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(instruction.mnemonic(), M::Xrstor | M::Xrstor64 | M::Fxrstor | M::Fxrstor64 | M::Frstor | M::Fldenv)
}

fn uses_mmx(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|index| instruction.op_register(index).is_mm())
}

/// Whether the physical registers and everything but TOP and tags are the same.
fn same_mmx(one: &State, other: &State) -> bool {
    let physical = |state: &State| -> Vec<[u8; 10]> {
        let top = (state.fx[fx::FSW + 1] >> 3 & 7) as usize;
        let slot = |register: usize| fx::ST + 16 * ((register + 8 - top) & 7);
        (0..8).map(|register| std::array::from_fn(|byte| state.fx[slot(register) + byte])).collect()
    };
    let rest = |state: &State| (state.fx[fx::FSW], state.fx[fx::FSW + 1] & 0xc7);
    physical(one) == physical(other) && rest(one) == rest(other) && one.fx[..fx::FSW] == other.fx[..fx::FSW]
}

/// Beside an unmasked overflow or underflow hardware judges inexactness with an unbounded exponent,
/// the interpreter that of the masked result (`host/thunk.rs`). SDM vol. 1, 4.9.1.4 and 4.9.1.5.
fn excuse_precision(native: &Outcome, ours: &mut Outcome) {
    const PRECISION: u8 = 0x20;
    let flags = native.state.fx[fx::MXCSR];
    let masks = native.state.fx[fx::MXCSR + 1] << 1 | flags >> 7;
    if flags & 0x18 & !masks != 0 {
        ours.state.fx[fx::MXCSR] = ours.state.fx[fx::MXCSR] & !PRECISION | flags & PRECISION;
    }
}

/// Whether two outcomes agree.
pub fn same(one: &Outcome, other: &Outcome) -> bool {
    one.end == other.end && one.state == other.state && one.memory == other.memory && one.code == other.code
}

const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// Fields of the FXSAVE image: name, offset, bytes.
const FIELDS: [(&str, usize, usize); 7] =
    [("fcw", 0, 2), ("fsw", 2, 2), ("ftw", 4, 1), ("fop", 6, 2), ("fip", 8, 8), ("fdp", 16, 8), ("mxcsr", 24, 4)];

/// One register, for display.
fn registers(state: &State) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for (name, value) in NAMES.iter().zip(state.gpr) {
        out.push((name.to_string(), format!("{value:#018x}")));
    }
    let whole = [("rflags", state.rflags), ("rip", state.rip), ("fs base", state.fs), ("gs base", state.gs)];
    out.extend(whole.map(|(name, value)| (name.to_owned(), format!("{value:#x}"))));
    for (name, at, size) in FIELDS {
        out.push((name.to_owned(), hex(&state.fx[at..at + size])));
    }
    out.extend((0..8).map(|i| (format!("st{i}"), hex(&state.fx[fx::ST + 16 * i..fx::ST + 16 * i + 10]))));
    out.extend((0..16).map(|i| (format!("xmm{i}"), hex(&state.fx[fx::XMM + 16 * i..fx::XMM + 16 * i + 16]))));
    out.extend((0..16).map(|i| (format!("ymm{i} above"), hex(&state.ymm[16 * i..16 * i + 16]))));
    out
}

/// Little-endian bytes as one hexadecimal number.
fn hex(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect();
    format!("0x{digits}")
}

/// The registers that are not zero, a line each.
pub fn describe(state: &State) -> String {
    let zero = |text: &str| text[2..].bytes().all(|digit| digit == b'0');
    let lines = registers(state).into_iter().filter(|(_, value)| !zero(value));
    lines.map(|(name, value)| format!("  {name} = {value}\n")).collect()
}

/// The differences, a line each.
pub fn differences(native: &Outcome, ours: &Outcome) -> String {
    let mut out = String::new();
    if native.end != ours.end {
        out += &format!("  end: host {:x?}, interpreter {:x?}\n", native.end, ours.end);
    }
    for ((name, host), (_, interpreter)) in registers(&native.state).into_iter().zip(registers(&ours.state)) {
        if host != interpreter {
            out += &format!("  {name}: host {host}, interpreter {interpreter}\n");
        }
    }
    let mut shown = 0;
    for ((base, host), (_, interpreter)) in native.memory.areas().into_iter().zip(ours.memory.areas()) {
        for index in (0..host.len()).filter(|&index| host[index] != interpreter[index]) {
            if shown < 24 {
                let at = base + index as u64;
                out += &format!("  [{at:#x}]: host {:02x}, interpreter {:02x}\n", host[index], interpreter[index]);
            }
            shown += 1;
        }
    }
    for (index, (host, interpreter)) in native.code.iter().zip(&ours.code).enumerate() {
        if host != interpreter {
            out += &format!("  code at offset {index:#x}: host {host:02x}, interpreter {interpreter:02x}\n");
        }
    }
    if shown > 24 {
        out += &format!("  and {} more bytes\n", shown - 24);
    }
    out
}

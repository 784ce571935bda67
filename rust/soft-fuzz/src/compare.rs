//! What differs between two outcomes, and what may.

use crate::layout::*;

/// Flags the manual leaves undefined are compared all the same: the interpreter takes them from the
/// host's own instructions. What has to be excused is listed here, with its place in the manual.
pub fn excused(case: &Case, native: &Outcome, ours: &mut Outcome) {
    let End::Fault { vector: 14, .. } = native.end else { return };
    let Some(offset) = native.state.rip.checked_sub(case.state.rip) else { return };
    if ours.end != native.end || !stores_in_parts(case, offset as usize) {
        return;
    }
    // SDM vol. 3, 8.1.1: a store of several parts may be seen in part when one of them faults.
    ours.memory = native.memory.clone();
}

fn stores_in_parts(case: &Case, offset: usize) -> bool {
    use iced_x86::Mnemonic as M;
    let Ok(index) = case.starts.binary_search(&offset) else { return false };
    matches!(
        case.instructions()[index].mnemonic(),
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
    )
}

/// Whether two outcomes agree.
pub fn same(one: &Outcome, other: &Outcome) -> bool {
    one.end == other.end && one.state == other.state && one.memory == other.memory
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
    if shown > 24 {
        out += &format!("  and {} more bytes\n", shown - 24);
    }
    out
}

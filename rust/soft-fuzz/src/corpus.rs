//! Cases as text files: reproducers and regressions. One `name value` pair a line; `#` begins a
//! comment.
//!
//! ```text
//! bits 64
//! rip 0x10000100
//! code 4801d8 90
//! gpr 0x0 0x0 ... (16)
//! rflags 0x202
//! bases 0x0 0x0
//! fx 7f03...
//! ymm 0000...
//! put 0 7e03
//! fill 0
//! poke 0x20000000 0102
//! ```
//!
//! `put` changes bytes of the FXSAVE image, `poke` of memory.

use crate::layout::*;
use iced_x86::{Decoder, DecoderOptions};
use std::fmt::Write;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<Vec<u8>, String> {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let pair = |pair: &[u8]| std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok());
    let bytes: Option<Vec<u8>> = digits.chunks(2).map(pair).collect();
    bytes.ok_or_else(|| format!("not hexadecimal bytes: {text}"))
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("not a number: {text}"))
}

/// A case as text, instructions apart; `note` becomes a comment.
pub fn print(case: &Case, note: &str) -> String {
    let mut out = String::new();
    for line in note.lines() {
        let _ = writeln!(out, "# {line}");
    }
    let mut ends = case.starts.clone();
    ends.push(case.code.len());
    let code: Vec<String> = ends.windows(2).map(|pair| hex(&case.code[pair[0]..pair[1]])).collect();
    let gpr: Vec<String> = case.state.gpr.iter().map(|value| format!("{value:#x}")).collect();
    let _ = writeln!(out, "bits {}", case.bits);
    let _ = writeln!(out, "rip {:#x}\ncode {}\ngpr {}", case.state.rip, code.join(" "), gpr.join(" "));
    let _ = writeln!(out, "rflags {:#x}\nbases {:#x} {:#x}", case.state.rflags, case.state.fs, case.state.gs);
    let _ = writeln!(out, "fx {}\nymm {}\nfill {}", hex(&case.state.fx), hex(&case.state.ymm), case.fill);
    for (address, bytes) in &case.pokes {
        let _ = writeln!(out, "poke {address:#x} {}", hex(bytes));
    }
    out
}

/// The case in a text; lines that are missing leave their part as [`State::default`] has it.
pub fn parse(text: &str) -> Result<Case, String> {
    let state = State { rip: CODE + 0x100, ..State::default() };
    let mut case = Case { bits: 64, code: Vec::new(), starts: Vec::new(), state, fill: 0, pokes: Vec::new() };
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or("").trim();
        let Some((name, rest)) = line.split_once(' ') else { continue };
        parse_line(&mut case, name, rest.trim())?;
    }
    let placed = [CODE, PATCH].iter().any(|area| (*area..area + CODE_BYTES as u64 / 2).contains(&case.state.rip));
    if !placed || case.code.len() > CODE_BYTES / 2 {
        return Err("the code does not lie in the code area".to_owned());
    }
    let mut at = 0;
    while at < case.code.len() {
        case.starts.push(at);
        at += Decoder::with_ip(case.bits, &case.code[at..], 0, DecoderOptions::NONE).decode().len().max(1);
    }
    Ok(case)
}

fn parse_line(case: &mut Case, name: &str, rest: &str) -> Result<(), String> {
    let numbers = || rest.split_whitespace().map(number).collect::<Result<Vec<u64>, String>>();
    let wrong = |what: &str| format!("{name}: expected {what}, got {rest}");
    match name {
        "bits" => match number(rest)? {
            bits @ (32 | 64) => case.bits = bits as u32,
            _ => return Err(wrong("32 or 64")),
        },
        "rip" => case.state.rip = number(rest)?,
        "code" => case.code = unhex(rest)?,
        "gpr" => case.state.gpr = numbers()?.try_into().map_err(|_| wrong("16 numbers"))?,
        "rflags" => case.state.rflags = number(rest)?,
        "bases" => [case.state.fs, case.state.gs] = numbers()?.try_into().map_err(|_| wrong("2 numbers"))?,
        "fx" => case.state.fx = unhex(rest)?.try_into().map_err(|_| wrong("416 bytes"))?,
        "ymm" => case.state.ymm = unhex(rest)?.try_into().map_err(|_| wrong("256 bytes"))?,
        "put" => {
            let (offset, bytes) = rest.split_once(' ').ok_or_else(|| wrong("an offset and bytes"))?;
            let (offset, bytes) = (number(offset)? as usize, unhex(bytes)?);
            let place = offset.checked_add(bytes.len()).and_then(|end| case.state.fx.get_mut(offset..end));
            place.ok_or_else(|| wrong("an offset within the image"))?.copy_from_slice(&bytes);
        }
        "fill" => case.fill = number(rest)?,
        "poke" => {
            let (address, bytes) = rest.split_once(' ').ok_or_else(|| wrong("an address and bytes"))?;
            case.pokes.push((number(address)?, unhex(bytes)?));
        }
        _ => return Err(format!("unknown line: {name}")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_parse_of_print_gives_the_case_back() {
        let mut state = State { rip: CODE + 0x80, fs: 3, ..State::default() };
        state.gpr[9] = u64::MAX;
        let code = vec![0x66, 0x01, 0xd8, 0x90];
        let case = Case { bits: 32, code, starts: vec![0, 3], state, fill: 9, pokes: vec![(DATA, vec![1, 2])] };

        let again = parse(&print(&case, "a note")).unwrap();

        assert_eq!((&again.code, &again.starts, &again.state), (&case.code, &case.starts, &case.state));
        assert_eq!((again.bits, again.fill, again.pokes), (32, 9, case.pokes));
    }

    #[test]
    fn test_parse_of_a_bad_line_says_which() {
        assert_eq!(parse("gpr 1 2").err(), Some("gpr: expected 16 numbers, got 1 2".to_owned()));
    }
}

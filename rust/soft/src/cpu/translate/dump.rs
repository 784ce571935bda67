//! A block and its translation in words, for debugging: `OSTLER_DEBUG_ENGINE=blocks`.

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

/// A listing of `bytes` as code at `address`.
pub fn listing(bytes: &[u8], address: u64) -> String {
    let mut formatter = IntelFormatter::new();
    let mut decoder = Decoder::with_ip(64, bytes, address, DecoderOptions::NONE);
    let mut out = String::new();
    while decoder.can_decode() {
        let start = decoder.position();
        let ins = decoder.decode();
        let mut text = String::new();
        formatter.format(&ins, &mut text);
        let raw: String = bytes[start..start + ins.len()].iter().map(|byte| format!("{byte:02x}")).collect();
        out += &format!("  {:#x}  {raw:<24} {text}\n", ins.ip());
    }
    out
}

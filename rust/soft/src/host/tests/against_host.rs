//! Sweep: every encoding the thunks cover, found by decoding opcode maps, against the host.

use std::collections::HashSet;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Register};

use super::oracle::{Oracle, Registers};
use crate::host::classify::{host_has, supported};
use crate::host::fpstate::FpState;
use crate::host::thunk::{exec, ExecContext, MemAccess, Outcome, Scratch, ThunkCache, ARITHMETIC_FLAGS};

const STATES_PER_ENCODING: usize = 12;

/// xorshift64*: deterministic, good enough to mix values.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A value that is interesting as integers or as floating-point numbers.
    fn u64(&mut self) -> u64 {
        let f32s = [
            0x3F80_0000,
            0x0000_0001,
            0x7F80_0000,
            0x7FC0_0000,
            0x7FA0_0000,
            0x8000_0000,
            0x4B00_0001,
            0x0080_0000_u64,
            0x7F7F_FFFF,
            0xBF00_0000,
        ];
        let mut single = || {
            let index = self.below(12) as usize;
            f32s.get(index).copied().unwrap_or(self.0 & 0xFFFF_FFFF)
        };
        let pair = single() << 32 | single();
        match self.below(6) {
            0 => self.next(),
            1 => pair,
            2 => (self.below(2000) as f64 / 7.0 - 90.0).to_bits(),
            3 => [0, 1, u64::MAX, 1 << 63, 0x7FF0 << 48, 0x7FF8 << 48, 0x7FF4 << 48, 0x0010 << 48]
                [self.below(8) as usize],
            4 => u64::from((self.below(99) as f32 * 1.25e-3).to_bits()) << 32 | self.below(99),
            _ => self.next() & 0x7F7F_7F7F_7F7F_7F7F,
        }
    }

    fn fp_state(&mut self) -> FpState {
        let mut fp = FpState::initial();
        (0..16).for_each(|i| fp.set_xmm(i, u128::from(self.u64()) << 64 | u128::from(self.u64())));
        (0..16).for_each(|i| fp.set_ymm_high(i, u128::from(self.u64()) << 64 | u128::from(self.u64())));
        for slot in 0..8 {
            let mut value = [0; 10];
            let exponent = [0x3FFF, 0x4005, 0, 0x7FFF, 0xBFFE, 0x3FC0, 0x403D][self.below(7) as usize];
            let integer_bit = if exponent == 0 { 0 } else { 1 << 63 };
            value[..8].copy_from_slice(&(self.u64() | integer_bit).to_le_bytes());
            value[8..].copy_from_slice(&(exponent as u16).to_le_bytes());
            fp.set_st(slot, value);
        }
        // SIMD exceptions masked, x87 exceptions not pending; any rounding, DAZ, FTZ, flags, TOP, tags.
        let control = [0, self.next() as u32 & 0xE040][self.below(2) as usize];
        fp.set_mxcsr(0x1F80 | control | self.next() as u32 & [0, 0x3F][self.below(2) as usize]);
        let masks = [0x3F, self.next() as u16 & 0x3F][self.below(2) as usize];
        let precision = [0, 0x200, 0x300][self.below(3) as usize];
        fp.set_control_and_status(
            masks | (self.next() as u16 & 0x0C00) | precision,
            self.next() as u16 & (0x7F40 | masks),
        );
        fp.set_ftw_abridged([0xFF, 0x7F, 0, self.next() as u8][self.below(4) as usize]);
        fp
    }
}

/// Encodings to try: legacy prefixes and REX over the three SSE maps and the x87 opcodes, in register
/// form and with `[rbx]`.
fn encodings(random: &mut Random) -> Vec<Vec<u8>> {
    let mut list = vec![vec![0x9B]];
    let maps: [&[u8]; 3] = [&[0x0F], &[0x0F, 0x38], &[0x0F, 0x3A]];
    for map in maps {
        for (prefix, rex) in prefixes() {
            // 38 and 3A lead to the other maps, where the byte meant as ModRM would be an opcode.
            for opcode in (0..=255).filter(|opcode| map.len() > 1 || !matches!(opcode, 0x38 | 0x3A)) {
                for modrm in modrms(map, opcode, random) {
                    // A memory operand is [rbx], so REX.B must be clear.
                    let rex = if modrm < 0xC0 { rex & !1 } else { rex };
                    let mut bytes: Vec<u8> = prefix.iter().copied().collect();
                    bytes.extend((rex != 0).then_some(rex));
                    bytes.extend(map);
                    bytes.extend([opcode, modrm, random.next() as u8]);
                    list.push(bytes);
                }
            }
        }
    }
    vex_encodings(&mut list, random);
    for opcode in 0xD8..=0xDF {
        list.extend((0xC0..=0xFF).map(|modrm| vec![opcode, modrm]));
        list.extend((0..8).map(|reg| vec![opcode, reg << 3 | 3]));
        list.extend((0..8).map(|reg| vec![0x66, opcode, reg << 3 | 3]));
    }
    list
}

/// Three-byte VEX over its maps, with and without a third operand.
fn vex_encodings(list: &mut Vec<Vec<u8>>, random: &mut Random) {
    for choice in 0..3 * 16 * 2 * 256_usize {
        let (opcode, low, map) = (choice as u8, (choice >> 8 & 0xF) as u8, 1 + (choice >> 12) as u8 % 3);
        let vvvv = if choice < 3 << 12 { 15 } else { random.next() as u8 & 15 };
        // L and pp in the low bits, W on top.
        let last = (low & 8) << 4 | vvvv << 3 | low & 7;
        let maps: [&[u8]; 3] = [&[0x0F], &[0x0F, 0x38], &[0x0F, 0x3A]];
        for modrm in modrms(maps[usize::from(map) - 1], opcode, random) {
            let extension = random.next() as u8 & 0xE0 | if modrm < 0xC0 { 0x20 } else { 0 };
            list.push(vec![0xC4, extension | map, last, opcode, modrm, random.next() as u8]);
        }
    }
}

fn prefixes() -> impl Iterator<Item = (Option<u8>, u8)> {
    let legacy = [None, Some(0x66), Some(0xF2), Some(0xF3)];
    legacy.into_iter().flat_map(|prefix| [0, 0x45, 0x48, 0x4D].map(|rex| (prefix, rex)))
}

fn modrms(map: &[u8], opcode: u8, random: &mut Random) -> Vec<u8> {
    // Groups 12 to 15 (71 to 73, AE) choose the instruction by ModRM.reg.
    if map.len() == 1 && matches!(opcode, 0x71..=0x73 | 0xAE) {
        return (0..8).flat_map(|reg| [reg << 3 | 3, 0xC1 | reg << 3]).collect();
    }
    let any = random.next() as u8;
    vec![0xC0 | any, 0xC0 | any.rotate_left(3), any & 0x38 | 3]
}

fn decode(bytes: &[u8]) -> Instruction {
    Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode()
}

fn uses_rsp(ins: &Instruction) -> bool {
    (0..ins.op_count()).any(|i| ins.op_register(i).full_register() == Register::RSP)
}

#[test]
fn thunk_of_every_covered_encoding_equals_the_host() {
    let mut random = Random(0x1234_5678_9ABC_DEF1);
    let mut cache = ThunkCache::new().expect("code memory");
    let mut oracle = Oracle::new();
    let mut covered = HashSet::new();
    let mut wrong: Vec<(Code, String)> = Vec::new();
    for bytes in encodings(&mut random) {
        let ins = decode(&bytes);
        if !supported(ins.code()) || uses_rsp(&ins) {
            continue;
        }
        covered.insert(ins.code());
        for _ in 0..STATES_PER_ENCODING {
            let result = compare(&bytes[..ins.len()], &ins, &mut cache, &mut oracle, &mut random);
            if let Some(difference) = result {
                if wrong.last().is_none_or(|(code, _)| *code != ins.code()) {
                    wrong.push((ins.code(), difference));
                }
            }
        }
    }
    let missed: Vec<Code> = Code::values().filter(|&c| supported(c) && !covered.contains(&c)).collect();
    let codes: Vec<Code> = wrong.iter().map(|(code, _)| *code).collect();
    assert!(wrong.is_empty(), "{codes:?} differ, first {}", wrong[0].1);
    assert!(missed.is_empty(), "covered by thunks but not by the sweep: {missed:?}");
}

fn compare(
    bytes: &[u8],
    ins: &Instruction,
    cache: &mut ThunkCache,
    oracle: &mut Oracle,
    random: &mut Random,
) -> Option<String> {
    if !host_has(ins.code()) {
        return None;
    }
    let thunk = cache.get(ins, bytes).expect("covered");
    let mut memory = Scratch::new();
    memory.0.chunks_mut(8).for_each(|c| c.copy_from_slice(&random.u64().to_le_bytes()));
    if matches!(ins.code(), Code::Ldmxcsr_m32 | Code::VEX_Vldmxcsr_m32) {
        memory.0[..4].copy_from_slice(&(0x1F80 | random.next() as u32 & 0xE07F).to_le_bytes());
    }
    let original = memory.clone();
    let mut scratch = memory.clone();
    let mut guest: Registers = std::array::from_fn(|_| random.u64());
    guest[16] = random.next() & ARITHMETIC_FLAGS | 2;
    (guest[3], guest[7]) = (memory.0.as_mut_ptr() as u64, memory.0.as_mut_ptr() as u64);
    if thunk.mem == MemAccess::None {
        guest[3] = random.u64();
    }
    let mut host = guest;
    let mut fp = random.fp_state();
    let mut host_fp = fp.clone();
    let before = (guest, fp.clone());

    oracle.run(bytes, &mut host, &mut host_fp);
    let mut context = ExecContext { rflags: guest[16], long_mode: true, ..ExecContext::default() };
    let mut gprs: [u64; 16] = std::array::from_fn(|i| guest[i]);
    let outcome = exec(&thunk, &mut gprs, &mut fp, &mut scratch, &mut context);

    host[4] = gprs[4];
    // FOP, FIP, FDP and the MXCSR mask are the host's in the oracle's image.
    let state =
        |fp: &FpState| [&fp.bytes()[..6], &fp.bytes()[24..28], &fp.bytes()[32..416], &fp.bytes()[576..832]].concat();
    let expected = match outcome {
        Outcome::DoneWithoutStore => original.0,
        _ => stored(&thunk.mem, &scratch, &before, ins, &memory),
    };
    let parts = [
        ("outcome", matches!(outcome, Outcome::Done | Outcome::DoneWithoutStore)),
        ("registers", gprs == host[..16]),
        ("flags", (context.rflags ^ host[16]) & ARITHMETIC_FLAGS == 0),
        ("state", state(&fp) == state(&host_fp)),
        ("memory", expected == memory.0),
    ];
    let part = parts.iter().find(|(_, equal)| !equal)?.0;
    Some(format!(
        "{part} of {:?} {bytes:02x?}\nguest {gprs:x?} {:x?}\nhost {host:x?} {:x?}\nmemory {:x?} {:x?}",
        ins.code(),
        state(&fp),
        state(&host_fp),
        scratch.0,
        memory.0,
    ))
}

/// What guest memory holds after the thunk; fields with host pointers are taken from `host`.
fn stored(
    mem: &MemAccess,
    scratch: &Scratch,
    before: &(Registers, FpState),
    ins: &Instruction,
    host: &Scratch,
) -> [u8; 128] {
    let mut memory = host.0;
    match *mem {
        MemAccess::Write(n) | MemAccess::ReadWrite(n) => {
            let n = usize::from(n);
            memory[..n].copy_from_slice(&scratch.0[..n]);
            let pointers = match ins.code() {
                Code::Fnstenv_m28byte | Code::Fnsave_m108byte => 12..24,
                Code::Fnstenv_m14byte | Code::Fnsave_m94byte => 6..12,
                _ => 0..0,
            };
            memory[pointers.clone()].copy_from_slice(&host.0[pointers]);
        }
        MemAccess::MaskedWrite(n) => {
            let at = Scratch::MASK;
            let mask = u16::from_le_bytes([scratch.0[at], scratch.0[at + 1]]);
            let mask_register = ins.op2_register();
            let wanted = if n == 16 {
                before.1.xmm(mask_register.number())
            } else {
                u128::from(before.1.mm(mask_register.number()))
            };
            (0..usize::from(n)).for_each(|i| {
                assert_eq!(mask >> i & 1 != 0, wanted >> (8 * i + 7) & 1 != 0);
                if mask >> i & 1 != 0 {
                    memory[i] = scratch.0[i];
                }
            });
        }
        MemAccess::None | MemAccess::Read(_) => {}
    }
    memory
}

/// Control words and tags the ABI wants: FCW, full tag word, MXCSR's control bits.
fn host_environment() -> (u16, u16, u32) {
    let (mut environment, mut mxcsr) = ([0_u16; 14], 0_u32);
    // SAFETY: FNSTENV writes 28 bytes and masks exceptions, which FLDENV of the same image undoes.
    unsafe {
        std::arch::asm!(
            "fnstenv [{x87}]", "fldenv [{x87}]", "stmxcsr [{sse}]",
            x87 = in(reg) environment.as_mut_ptr(), sse = in(reg) &raw mut mxcsr,
        );
    }
    (environment[0], environment[4], mxcsr & !0x3F)
}

#[test]
fn random_bytes_in_every_mode_have_a_thunk_and_leave_the_host_as_it_was() {
    let mut random = Random(0x0BAD_5EED_0BAD_5EED);
    let mut cache = ThunkCache::new().expect("code memory");
    let before = host_environment();
    let starts: [&[u8]; 8] =
        [&[0x0F], &[0x66, 0x0F], &[0xF3, 0x0F], &[0xF2, 0x0F], &[0xD8], &[0x66, 0x0F, 0x3A], &[0xC4], &[0xC5]];
    let mut ran = 0;
    for _ in 0..60_000 {
        let mut bytes = starts[random.below(8) as usize].to_vec();
        if bytes == [0xD8] {
            bytes[0] |= random.below(8) as u8;
        }
        bytes.extend(random.next().to_le_bytes());
        let bitness = [16, 32, 64][random.below(3) as usize];
        let ins = Decoder::with_ip(bitness, &bytes, 0, DecoderOptions::NONE).decode();
        if !supported(ins.code()) {
            continue;
        }
        let thunk = cache.get(&ins, &bytes).expect("covered");
        // Any state, with exceptions unmasked, pending or both.
        let mut fp = random.fp_state();
        fp.set_control_and_status(random.next() as u16, random.next() as u16);
        fp.set_mxcsr(random.next() as u32);
        let mut regs = std::array::from_fn(|_| random.u64());
        let mut scratch = Scratch::new();
        scratch.0.chunks_mut(8).for_each(|c| c.copy_from_slice(&random.u64().to_le_bytes()));
        let mut context = ExecContext { rflags: random.next(), ..ExecContext::default() };

        let outcome = exec(&thunk, &mut regs, &mut fp, &mut scratch, &mut context);

        ran += 1;
        assert_eq!(host_environment(), before, "{outcome:?} after {bytes:02x?}");
        assert_eq!((fp.mxcsr() >> 16, fp.fcw() & 0xE0C0), (0, 0x40), "{bytes:02x?}");
    }
    assert!(ran > 10_000, "only {ran} instructions ran");
}

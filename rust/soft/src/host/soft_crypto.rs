//! AES-NI, PCLMULQDQ and SHA in software, for hosts without them (SDM volume 2; FIPS 180-4 and 197).
//!
//! Lanes are numbered as in the SDM: lane 3 holds bits 127 to 96. Table look-ups depend on data, so
//! this is not constant-time; a guest that needs that needs a host with the instructions.

use iced_x86::Code;

/// `(destination, source, xmm0, immediate)` to the new destination.
pub type XmmFunction = fn(u128, u128, u128, u8) -> u128;

/// The software form of `code`, if there is one.
pub fn function(code: Code) -> Option<XmmFunction> {
    Some(match code {
        Code::Aesenc_xmm_xmmm128 => |state, key, _, _| mix_columns(sub_shift(state)) ^ key,
        Code::Aesenclast_xmm_xmmm128 => |state, key, _, _| sub_shift(state) ^ key,
        Code::Aesdec_xmm_xmmm128 => |state, key, _, _| inv_mix_columns(inv_sub_shift(state)) ^ key,
        Code::Aesdeclast_xmm_xmmm128 => |state, key, _, _| inv_sub_shift(state) ^ key,
        Code::Aesimc_xmm_xmmm128 => |_, source, _, _| inv_mix_columns(source),
        Code::Aeskeygenassist_xmm_xmmm128_imm8 => |_, source, _, rcon| key_assist(source, rcon),
        Code::Pclmulqdq_xmm_xmmm128_imm8 => {
            |a, b, _, which| carryless_multiply(half(a, which & 1 != 0), half(b, which & 0x10 != 0))
        }
        Code::Sha1rnds4_xmm_xmmm128_imm8 => |a, b, _, rounds| sha1_rounds(a, b, rounds),
        Code::Sha1nexte_xmm_xmmm128 => |a, b, _, _| sha1_next_e(a, b),
        Code::Sha1msg1_xmm_xmmm128 => |a, b, _, _| sha1_message_1(a, b),
        Code::Sha1msg2_xmm_xmmm128 => |a, b, _, _| sha1_message_2(a, b),
        Code::Sha256rnds2_xmm_xmmm128 => |a, b, keys, _| sha256_rounds(a, b, keys),
        Code::Sha256msg1_xmm_xmmm128 => |a, b, _, _| sha256_message_1(a, b),
        Code::Sha256msg2_xmm_xmmm128 => |a, b, _, _| sha256_message_2(a, b),
        _ => return None,
    })
}

/// Multiplication by x in AES's field.
const fn times_x(byte: u8) -> u8 {
    (byte << 1) ^ if byte & 0x80 != 0 { 0x1B } else { 0 }
}

const fn multiply(mut a: u8, mut b: u8) -> u8 {
    let mut product = 0;
    while b != 0 {
        if b & 1 != 0 {
            product ^= a;
        }
        a = times_x(a);
        b >>= 1;
    }
    product
}

/// FIPS 197, 5.1.1: walks the field by its generator 3 and the generator's inverse together.
const SUB: [u8; 256] = {
    let mut table = [0; 256];
    let (mut element, mut inverse) = (1_u8, 1_u8);
    loop {
        let b = inverse;
        let affine = b ^ b.rotate_left(1) ^ b.rotate_left(2) ^ b.rotate_left(3) ^ b.rotate_left(4);
        table[element as usize] = affine ^ 0x63;
        element = multiply(element, 3);
        inverse = multiply(inverse, 0xF6);
        if element == 1 {
            break;
        }
    }
    table[0] = 0x63;
    table
};

const INV_SUB: [u8; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        table[SUB[index] as usize] = index as u8;
        index += 1;
    }
    table
};

/// SubBytes after ShiftRows; byte `4 * column + row` of the state.
fn sub_shift(state: u128) -> u128 {
    let from = state.to_le_bytes();
    let moved = std::array::from_fn(|i| SUB[usize::from(from[(i + 4 * (i % 4)) % 16])]);
    u128::from_le_bytes(moved)
}

fn inv_sub_shift(state: u128) -> u128 {
    let from = state.to_le_bytes();
    let moved = std::array::from_fn(|i| INV_SUB[usize::from(from[(i + 16 - 4 * (i % 4)) % 16])]);
    u128::from_le_bytes(moved)
}

fn mix_columns(state: u128) -> u128 {
    mix(state, [2, 3, 1, 1])
}

fn inv_mix_columns(state: u128) -> u128 {
    mix(state, [14, 11, 13, 9])
}

fn mix(state: u128, coefficients: [u8; 4]) -> u128 {
    let from = state.to_le_bytes();
    u128::from_le_bytes(std::array::from_fn(|i| {
        let (column, row) = (i & !3, i & 3);
        (0..4).fold(0, |sum, k| sum ^ multiply(from[column + (row + k) % 4], coefficients[k]))
    }))
}

fn key_assist(source: u128, rcon: u8) -> u128 {
    let words = lanes(source);
    let sub = |word: u32| u32::from_le_bytes(word.to_le_bytes().map(|b| SUB[usize::from(b)]));
    let (one, three) = (sub(words[1]), sub(words[3]));
    let rcon = u32::from(rcon);
    join([one, one.rotate_right(8) ^ rcon, three, three.rotate_right(8) ^ rcon])
}

fn half(value: u128, high: bool) -> u64 {
    (if high { value >> 64 } else { value }) as u64
}

fn carryless_multiply(a: u64, b: u64) -> u128 {
    let bits = (0..64).filter(|i| b >> i & 1 != 0);
    bits.fold(0, |product, i| product ^ u128::from(a) << i)
}

fn lanes(value: u128) -> [u32; 4] {
    std::array::from_fn(|i| (value >> (32 * i)) as u32)
}

fn join(lanes: [u32; 4]) -> u128 {
    (0..4).fold(0, |value, i| value | u128::from(lanes[i]) << (32 * i))
}

fn choose(x: u32, y: u32, z: u32) -> u32 {
    x & y ^ !x & z
}

fn parity(x: u32, y: u32, z: u32) -> u32 {
    x ^ y ^ z
}

fn majority(x: u32, y: u32, z: u32) -> u32 {
    x & y ^ x & z ^ y & z
}

/// Four rounds; the caller has added E to the first message word (SHA1NEXTE).
fn sha1_rounds(state: u128, message: u128, rounds: u8) -> u128 {
    let (mix, constant): (fn(u32, u32, u32) -> u32, u32) = match rounds & 3 {
        0 => (choose, 0x5A82_7999),
        1 => (parity, 0x6ED9_EBA1),
        2 => (majority, 0x8F1B_BCDC),
        _ => (parity, 0xCA62_C1D6),
    };
    let [mut d, mut c, mut b, mut a] = lanes(state);
    let mut e = 0_u32;
    for word in lanes(message).into_iter().rev() {
        let next =
            mix(b, c, d).wrapping_add(a.rotate_left(5)).wrapping_add(word).wrapping_add(e).wrapping_add(constant);
        (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
    }
    join([d, c, b, a])
}

fn sha1_next_e(state: u128, message: u128) -> u128 {
    let mut out = lanes(message);
    out[3] = out[3].wrapping_add(lanes(state)[3].rotate_left(30));
    join(out)
}

fn sha1_message_1(a: u128, b: u128) -> u128 {
    a ^ (a << 64 | b >> 64)
}

fn sha1_message_2(a: u128, b: u128) -> u128 {
    let [a0, a1, a2, a3] = lanes(a);
    let [b0, b1, b2, _] = lanes(b);
    let w16 = (a3 ^ b2).rotate_left(1);
    let w17 = (a2 ^ b1).rotate_left(1);
    let w18 = (a1 ^ b0).rotate_left(1);
    let w19 = (a0 ^ w16).rotate_left(1);
    join([w19, w18, w17, w16])
}

fn sha256_rounds(cdgh: u128, abef: u128, keys: u128) -> u128 {
    let [mut h, mut g, mut d, mut c] = lanes(cdgh);
    let [mut f, mut e, mut b, mut a] = lanes(abef);
    for key in &lanes(keys)[..2] {
        let first = h
            .wrapping_add(e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25))
            .wrapping_add(choose(e, f, g))
            .wrapping_add(*key);
        let second = (a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22)).wrapping_add(majority(a, b, c));
        (h, g, f, e) = (g, f, e, d.wrapping_add(first));
        (d, c, b, a) = (c, b, a, first.wrapping_add(second));
    }
    join([f, e, b, a])
}

fn small_sigma_0(x: u32) -> u32 {
    x.rotate_right(7) ^ x.rotate_right(18) ^ x >> 3
}

fn small_sigma_1(x: u32) -> u32 {
    x.rotate_right(17) ^ x.rotate_right(19) ^ x >> 10
}

fn sha256_message_1(a: u128, b: u128) -> u128 {
    let w = lanes(a);
    let next = [w[1], w[2], w[3], lanes(b)[0]];
    join(std::array::from_fn(|i| w[i].wrapping_add(small_sigma_0(next[i]))))
}

fn sha256_message_2(a: u128, b: u128) -> u128 {
    let [a0, a1, a2, a3] = lanes(a);
    let [_, _, w14, w15] = lanes(b);
    let w16 = a0.wrapping_add(small_sigma_1(w14));
    let w17 = a1.wrapping_add(small_sigma_1(w15));
    let w18 = a2.wrapping_add(small_sigma_1(w16));
    let w19 = a3.wrapping_add(small_sigma_1(w17));
    join([w16, w17, w18, w19])
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::Code as C;

    fn run(code: Code, a: u128, b: u128, xmm0: u128, immediate: u8) -> u128 {
        function(code).expect("covered")(a, b, xmm0, immediate)
    }

    #[test]
    fn aes_128_of_fips_197_appendix_b() {
        let key = u128::from_be_bytes(*b"\x2b\x7e\x15\x16\x28\xae\xd2\xa6\xab\xf7\x15\x88\x09\xcf\x4f\x3c");
        let text = 0x3243_f6a8_885a_308d_3131_98a2_e037_0734_u128;
        let mut round_key = key.swap_bytes();
        let mut state = text.swap_bytes() ^ round_key;
        for (round, rcon) in [1, 2, 4, 8, 16, 32, 64, 128, 27, 54].into_iter().enumerate() {
            let assist = run(C::Aeskeygenassist_xmm_xmmm128_imm8, 0, round_key, 0, rcon);
            let mut spread = round_key ^ round_key << 32;
            spread ^= spread << 64;
            round_key = spread ^ join([lanes(assist)[3]; 4]);
            let last = round == 9;
            let code = if last { C::Aesenclast_xmm_xmmm128 } else { C::Aesenc_xmm_xmmm128 };
            state = run(code, state, round_key, 0, 0);
        }
        assert_eq!(state.swap_bytes(), 0x3925_841d_02dc_09fb_dc11_8597_196a_0b32);
    }

    #[test]
    fn aesdec_undoes_aesenc_under_the_equivalent_inverse_cipher() {
        let (text, key) = (0x0011_2233_4455_6677_8899_aabb_ccdd_eeff, 0x1234_5678_u128);

        let sealed = run(C::Aesenclast_xmm_xmmm128, text, key, 0, 0) ^ key;
        let opened = run(C::Aesdeclast_xmm_xmmm128, sealed, 0, 0, 0);

        assert_eq!(opened, text);
        let mixed = mix_columns(text);
        assert_eq!(run(C::Aesimc_xmm_xmmm128, 0, mixed, 0, 0), text);
    }

    /// One padded block of "abc", big-endian words.
    fn abc_block() -> [u32; 16] {
        let mut words = [0; 16];
        words[0] = 0x6162_6380;
        words[15] = 24;
        words
    }

    #[test]
    fn sha1_of_abc_is_that_of_fips_180() {
        // Lane 3 holds the first word.
        let quad = |w: &[u32]| join([w[3], w[2], w[1], w[0]]);
        let block = abc_block();
        let mut w: Vec<u128> = block.chunks(4).map(quad).collect();
        for i in 4..20 {
            let partial = run(C::Sha1msg1_xmm_xmmm128, w[i - 4], w[i - 3], 0, 0) ^ w[i - 2];
            w.push(run(C::Sha1msg2_xmm_xmmm128, partial, w[i - 1], 0, 0));
        }
        let start = quad(&[0x6745_2301, 0xEFCD_AB89, 0x98BA_DCFE, 0x1032_5476]);
        let e = u128::from(0xC3D2_E1F0_u32) << 96;
        let mut state = start;
        let mut previous = 0;
        for (i, &words) in w.iter().enumerate() {
            let message = if i == 0 {
                let first = lanes(words)[3].wrapping_add(lanes(e)[3]);
                join([lanes(words)[0], lanes(words)[1], lanes(words)[2], first])
            } else {
                run(C::Sha1nexte_xmm_xmmm128, previous, words, 0, 0)
            };
            previous = state;
            state = run(C::Sha1rnds4_xmm_xmmm128_imm8, state, message, 0, (i / 5) as u8);
        }
        let last_e = lanes(run(C::Sha1nexte_xmm_xmmm128, previous, e, 0, 0))[3];
        let sums: Vec<u32> = (0..4).rev().map(|i| lanes(state)[i].wrapping_add(lanes(start)[i])).collect();
        assert_eq!(sums, [0xA999_3E36, 0x4706_816A, 0xBA3E_2571, 0x7850_C26C]);
        assert_eq!(last_e, 0x9CD0_D89D);
    }

    #[test]
    fn sha256_of_abc_is_that_of_fips_180() {
        let block = abc_block();
        let mut w: Vec<u128> = block.chunks(4).map(|w| join([w[0], w[1], w[2], w[3]])).collect();
        for i in 4..16 {
            let partial = lanes(run(C::Sha256msg1_xmm_xmmm128, w[i - 4], w[i - 3], 0, 0));
            let (low, high) = (lanes(w[i - 2]), lanes(w[i - 1]));
            let shifted = [low[1], low[2], low[3], high[0]];
            let sum = join(std::array::from_fn(|k| partial[k].wrapping_add(shifted[k])));
            w.push(run(C::Sha256msg2_xmm_xmmm128, sum, w[i - 1], 0, 0));
        }
        let iv = [
            0x6A09_E667,
            0xBB67_AE85,
            0x3C6E_F372,
            0xA54F_F53A_u32,
            0x510E_527F,
            0x9B05_688C,
            0x1F83_D9AB,
            0x5BE0_CD19,
        ];
        let mut abef = join([iv[5], iv[4], iv[1], iv[0]]);
        let mut cdgh = join([iv[7], iv[6], iv[3], iv[2]]);
        for i in 0..32 {
            let pair = w[i / 2] >> (64 * (i % 2));
            let keys = [pair as u32, (pair >> 32) as u32];
            let keys = join([keys[0].wrapping_add(K[2 * i]), keys[1].wrapping_add(K[2 * i + 1]), 0, 0]);
            (abef, cdgh) = (run(C::Sha256rnds2_xmm_xmmm128, cdgh, abef, keys, 0), abef);
        }
        let ([f, e, b, a], [h, g, d, c]) = (lanes(abef), lanes(cdgh));
        let sums: Vec<u32> = [a, b, c, d, e, f, g, h].iter().zip(iv).map(|(x, y)| x.wrapping_add(y)).collect();
        let expected =
            [0xBA78_16BF, 0x8F01_CFEA, 0x4141_40DE, 0x5DAE_2223, 0xB003_61A3, 0x9617_7A9C, 0xB410_FF61, 0xF200_15AD];
        assert_eq!(sums, expected);
    }

    /// FIPS 180-4, 4.2.2: the fractional parts of the cube roots of the first 64 primes, made here
    /// by an integer cube root instead of being listed.
    static K: std::sync::LazyLock<[u32; 64]> = std::sync::LazyLock::new(|| {
        let primes = (2_u128..).filter(|n| (2..*n).all(|d| n % d != 0));
        let mut table = [0; 64];
        for (slot, prime) in table.iter_mut().zip(primes) {
            let target = prime << 96;
            let mut root = 0_u128;
            for bit in (0..36).rev() {
                let guess = root | 1 << bit;
                if guess * guess * guess <= target {
                    root = guess;
                }
            }
            *slot = root as u32;
        }
        table
    });

    #[test]
    fn pclmulqdq_selects_halves_and_carries_nothing() {
        let (a, b) = (0x3_u128 << 64 | 0x5, 0x7_u128 << 64 | u128::from(u64::MAX));

        assert_eq!(run(C::Pclmulqdq_xmm_xmmm128_imm8, a, b, 0, 0x11), 0x9);
        assert_eq!(run(C::Pclmulqdq_xmm_xmmm128_imm8, a, b, 0, 0x10), 0x1B);
        assert_eq!(run(C::Pclmulqdq_xmm_xmmm128_imm8, a, b, 0, 0x01), 1 << 64 | 1);
    }
}

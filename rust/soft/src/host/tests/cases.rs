//! Case by case: outcomes, modes and properties that the sweep cannot see.

use std::sync::Arc;

use iced_x86::{Code, Decoder, DecoderOptions};

use crate::host::classify::{host_has, supported, Class};
use crate::host::fpstate::{x87_pending, FpState};
use crate::host::soft_crypto;
use crate::host::thunk::{exec, ExecContext, MemAccess, Outcome, Scratch, Thunk, ThunkCache};

/// A vCPU's registers, as far as thunks see them.
struct Guest {
    cache: ThunkCache,
    regs: [u64; 16],
    fp: FpState,
    scratch: Scratch,
    context: ExecContext,
}

impl Guest {
    fn new() -> Self {
        Self {
            cache: ThunkCache::new().expect("code memory"),
            regs: [0; 16],
            fp: FpState::initial(),
            scratch: Scratch::new(),
            context: ExecContext {
                rip: 0x40_1000,
                mem_offset: 0x60_0000,
                rflags: 2,
                real_mode: false,
                long_mode: true,
            },
        }
    }

    fn thunk(&mut self, bitness: u32, bytes: &[u8]) -> Arc<Thunk> {
        let ins = Decoder::with_ip(bitness, bytes, 0x1000, DecoderOptions::NONE).decode();
        assert_eq!(ins.len(), bytes.len());
        self.cache.get(&ins, bytes).expect("covered")
    }

    fn run_in(&mut self, bitness: u32, bytes: &[u8]) -> Outcome {
        let thunk = self.thunk(bitness, bytes);
        exec(&thunk, &mut self.regs, &mut self.fp, &mut self.scratch, &mut self.context)
    }

    fn run(&mut self, bytes: &[u8]) -> Outcome {
        self.run_in(64, bytes)
    }

    fn set_f64(&mut self, index: usize, value: f64) {
        self.fp.set_xmm(index, value.to_bits().into());
    }
}

const MULSD_0_1: &[u8] = &[0xF2, 0x0F, 0x59, 0xC1];
const DIVSD_0_1: &[u8] = &[0xF2, 0x0F, 0x5E, 0xC1];
const FDIV_0_1: &[u8] = &[0xD8, 0xF1];

#[test]
fn gpr_operands_rsp_and_r13_reach_their_own_slots() {
    let mut guest = Guest::new();
    guest.regs[4] = 0x1122_3344_5566_7788;
    guest.regs[13] = u64::MAX;

    assert_eq!(guest.run(&[0x66, 0x48, 0x0F, 0x6E, 0xCC]), Outcome::Done); // movq xmm1, rsp
    assert_eq!(guest.run(&[0x66, 0x41, 0x0F, 0x7E, 0xCD]), Outcome::Done); // movd r13d, xmm1

    assert_eq!(guest.fp.xmm(1), 0x1122_3344_5566_7788);
    assert_eq!(guest.regs[13], 0x5566_7788, "32-bit writes zero-extend");
    assert_eq!(guest.regs[4], 0x1122_3344_5566_7788);
}

#[test]
fn pcmpestri_with_rdx_in_its_address_reads_lengths_and_writes_ecx() {
    let mut guest = Guest::new();
    guest.fp.set_xmm(1, u128::from_le_bytes(*b"needle.........."));
    guest.scratch.0[..16].copy_from_slice(b"xxneedle........");
    (guest.regs[0], guest.regs[2], guest.regs[1]) = (6, 8, u64::MAX);

    // pcmpestri xmm1, [rdx+rcx*2+16], 0x0C (equal ordered)
    assert_eq!(guest.run(&[0x66, 0x0F, 0x3A, 0x61, 0x4C, 0x4A, 0x10, 0x0C]), Outcome::Done);

    assert_eq!(guest.regs[..3], [6, 2, 8]);
    assert_eq!(guest.context.rflags & 1, 1, "CF: the mask is not empty");
}

#[test]
fn memory_operands_say_size_access_and_alignment() {
    let mut guest = Guest::new();
    let cases: [(&[u8], MemAccess, u8); 9] = [
        (&[0x0F, 0x28, 0x03], MemAccess::Read(16), 16), // movaps xmm0, [rbx]
        (&[0x0F, 0x10, 0x03], MemAccess::Read(16), 1),  // movups xmm0, [rbx]
        (&[0x66, 0x0F, 0xE7, 0x03], MemAccess::Write(16), 16), // movntdq [rbx], xmm0
        (&[0xF2, 0x0F, 0xF0, 0x03], MemAccess::Read(16), 1), // lddqu xmm0, [rbx]
        (&[0x0F, 0x13, 0x03], MemAccess::Write(8), 1),  // movlps [rbx], xmm0
        (&[0x66, 0x0F, 0x38, 0x20, 0x03], MemAccess::Read(8), 1), // pmovsxbw xmm0, [rbx]
        (&[0x66, 0x0F, 0x3A, 0x14, 0x03, 5], MemAccess::Write(1), 1), // pextrb [rbx], xmm0, 5
        (&[0x66, 0x0F, 0x3A, 0x62, 0x03, 0], MemAccess::Read(16), 1), // pcmpistrm xmm0, [rbx], 0
        (&[0xDB, 0x3B], MemAccess::Write(10), 1),       // fstp tbyte [rbx]
    ];
    for (bytes, mem, align) in cases {
        let thunk = guest.thunk(64, bytes);
        assert_eq!((thunk.mem, thunk.mem_align), (mem, align), "{bytes:02x?}");
    }
}

#[test]
fn instructions_decoded_for_16_and_32_bits_run_the_same() {
    let mut guest = Guest::new();
    guest.scratch.0[..8].copy_from_slice(&2.5_f64.to_le_bytes());

    assert_eq!(guest.run_in(16, &[0xDD, 0x40, 0x08]), Outcome::Done); // fld qword [bx+si+8]
    assert_eq!(guest.run_in(32, &[0xDD, 0x1C, 0xB5, 1, 2, 3, 4]), Outcome::Done); // fstp qword [esi*4+..]
    assert_eq!(guest.run_in(32, &[0x65, 0x66, 0x0F, 0x6E, 0x38]), Outcome::Done); // movd xmm7, gs:[eax]
    assert_eq!(guest.run_in(16, &[0x66, 0x0F, 0x6E, 0xC3]), Outcome::Done); // movd xmm0, ebx

    assert_eq!(guest.scratch.0[..8], 2.5_f64.to_le_bytes());
    assert_eq!(guest.fp.ftw_abridged(), 0);
    assert_eq!(guest.fp.xmm(7), u128::from(2.5_f64.to_bits() as u32));
}

#[test]
fn equal_instructions_share_a_thunk_whatever_their_address() {
    let mut guest = Guest::new();
    let first = guest.thunk(64, &[0x0F, 0x58, 0x03]); // addps xmm0, [rbx]
    let second = guest.thunk(64, &[0x0F, 0x58, 0x05, 1, 2, 3, 4]); // addps xmm0, [rip+..]
    let other = guest.thunk(64, &[0x0F, 0x58, 0xC3]); // addps xmm0, xmm3

    assert!(Arc::ptr_eq(&first, &second));
    assert!(!Arc::ptr_eq(&first, &other));
    assert_eq!(guest.cache.len(), 2);
}

#[test]
fn thunks_stay_valid_when_the_code_memory_starts_afresh() {
    let mut guest = Guest::new();
    guest.cache = ThunkCache::with_region(4096).expect("code memory");
    let early = guest.thunk(64, &[0x66, 0x0F, 0xEF, 0xC0]); // pxor xmm0, xmm0
    for immediate in 0..=255 {
        guest.thunk(64, &[0x66, 0x0F, 0x70, 0xC0, immediate]); // pshufd xmm0, xmm0, immediate
    }
    guest.fp.set_xmm(0, 7);

    let outcome = exec(&early, &mut guest.regs, &mut guest.fp, &mut guest.scratch, &mut guest.context);

    assert!(guest.cache.len() < 256, "the cache started afresh");
    assert_eq!((outcome, guest.fp.xmm(0)), (Outcome::Done, 0));
}

#[test]
fn sse_flags_accumulate_and_the_hosts_mxcsr_stays() {
    let mut guest = Guest::new();
    let host_before = host_mxcsr() & !0x3F;
    guest.fp.set_mxcsr(0x7F81); // round towards zero, IE already set
    guest.set_f64(0, 1.0);
    guest.set_f64(1, 3.0);

    assert_eq!(guest.run(DIVSD_0_1), Outcome::Done);

    assert_eq!(guest.fp.mxcsr(), 0x7FA1);
    assert_eq!(guest.fp.xmm(0) as u64, 0x3FD5_5555_5555_5555);
    assert_eq!(host_mxcsr() & !0x3F, host_before);
}

fn host_mxcsr() -> u32 {
    let mut value = 0_u32;
    // SAFETY: stores four bytes to a u32.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut value) };
    value
}

/// Name, instruction, XMM0, XMM1, MXCSR before and after.
type Exception<'a> = (&'a str, &'a [u8], f64, f64, u32, u32);

/// Flags after an unmasked exception, as an Intel CPU reports them.
#[test]
fn unmasked_simd_exceptions_change_flags_only() {
    let cases: [Exception; 8] = [
        ("overflow", MULSD_0_1, f64::MAX, 1.9999, 0x1B80, 0x1BA8),
        ("inexact", DIVSD_0_1, 1.0, 3.0, 0x0F80, 0x0FA0),
        ("exact underflow", MULSD_0_1, f64::MIN_POSITIVE, 0.5, 0x1780, 0x1790),
        ("exact underflow with FTZ", MULSD_0_1, f64::MIN_POSITIVE, 0.5, 0x9780, 0x9790),
        ("denormal", MULSD_0_1, f64::from_bits(1), 3.0, 0x1E80, 0x1E82),
        ("division by zero", DIVSD_0_1, 1.0, 0.0, 0x1D80, 0x1D84),
        ("invalid", MULSD_0_1, 0.0, f64::INFINITY, 0x1F00, 0x1F01),
        ("invalid, others set", MULSD_0_1, 0.0, f64::INFINITY, 0x1F20, 0x1F21),
    ];
    for (what, bytes, a, b, before, after) in cases {
        let mut guest = Guest::new();
        guest.fp.set_mxcsr(before);
        guest.set_f64(0, a);
        guest.set_f64(1, b);

        assert_eq!(guest.run(bytes), Outcome::Xm, "{what}");

        assert_eq!(guest.fp.mxcsr(), after, "{what}");
        assert_eq!(guest.fp.xmm(0) as u64, a.to_bits(), "{what}");
    }
}

#[test]
fn unmasked_but_not_raised_commits_the_result() {
    let mut guest = Guest::new();
    guest.fp.set_mxcsr(0x1D82); // division by zero unmasked, DE set before
    guest.set_f64(0, 1.0);
    guest.set_f64(1, 3.0);

    assert_eq!(guest.run(DIVSD_0_1), Outcome::Done);

    assert_eq!((guest.fp.mxcsr(), guest.fp.xmm(0) as u64), (0x1DA2, (1.0_f64 / 3.0).to_bits()));
}

#[test]
fn unmasked_invalid_conversion_leaves_the_gpr_alone() {
    let mut guest = Guest::new();
    guest.fp.set_mxcsr(0x1F00);
    guest.set_f64(0, f64::NAN);
    guest.regs[0] = 42;

    assert_eq!(guest.run(&[0xF2, 0x48, 0x0F, 0x2C, 0xC0]), Outcome::Xm); // cvttsd2si rax, xmm0

    assert_eq!((guest.regs[0], guest.fp.mxcsr()), (42, 0x1F01));
}

#[test]
fn ldmxcsr_with_reserved_bits_is_a_general_protection_fault() {
    let mut guest = Guest::new();
    guest.scratch.0[..4].copy_from_slice(&0x0001_1F80_u32.to_le_bytes());

    assert_eq!(guest.run(&[0x0F, 0xAE, 0x13]), Outcome::Gp);

    assert_eq!(guest.fp.mxcsr(), 0x1F80);
}

/// 1/0 with division by zero unmasked.
fn with_pending_division_by_zero() -> Guest {
    let mut guest = Guest::new();
    for bytes in [&[0xD9, 0xEE], &[0xD9, 0xE8]] {
        assert_eq!(guest.run(bytes), Outcome::Done); // fldz; fld1
    }
    guest.fp.set_fcw(0x037B);
    guest.context.rip = 0x40_2000;
    assert_eq!(guest.run(FDIV_0_1), Outcome::Done);
    guest
}

#[test]
fn x87_unmasked_exception_stays_pending_with_pointers() {
    let guest = with_pending_division_by_zero();

    assert!(x87_pending(&guest.fp));
    assert_eq!(guest.fp.fsw() & 0xB884, 0x8084 | 6 << 11);
    assert_eq!((guest.fp.fip(), guest.fp.fop(), guest.fp.fdp()), (0x40_2000, 0x00F1, 0));
    assert_eq!(guest.fp.st(0)[8..], [0xFF, 0x3F], "the operand is still there");
}

#[test]
fn waiting_instructions_report_a_pending_exception_and_others_do_not() {
    let waiting: [&[u8]; 6] =
        [&[0x9B], FDIV_0_1, &[0xD9, 0x2B], &[0x0F, 0x77], &[0x0F, 0xFC, 0xC1], &[0xF2, 0x0F, 0xD6, 0xC1]];
    let others: [&[u8]; 6] =
        [&[0xDB, 0xE2], &[0xDB, 0xE3], &[0xDF, 0xE0], &[0xD9, 0x3B], &[0xDD, 0x33], &[0x0F, 0x58, 0xC1]];
    let before = with_pending_division_by_zero().fp;
    for bytes in waiting {
        let mut guest = with_pending_division_by_zero();
        assert_eq!(guest.run(bytes), Outcome::Mf, "{bytes:02x?}");
        assert_eq!(guest.fp.bytes(), before.bytes(), "{bytes:02x?}");
    }
    for bytes in others {
        assert_eq!(with_pending_division_by_zero().run(bytes), Outcome::Done, "{bytes:02x?}");
    }
}

#[test]
fn x87_store_with_unmasked_overflow_leaves_memory_and_stack_alone() {
    let mut guest = Guest::new();
    let mut large = [0; 10];
    (large[7], large[8], large[9]) = (0x80, 0xFF, 0x5F);
    guest.scratch.0[..10].copy_from_slice(&large);
    assert_eq!(guest.run(&[0xDB, 0x2B]), Outcome::Done); // fld tbyte [rbx]
    guest.fp.set_fcw(0x0377);

    assert_eq!(guest.run(&[0xD9, 0x1B]), Outcome::DoneWithoutStore); // fstp dword [rbx]

    assert_eq!((guest.fp.top(), guest.fp.st(0)), (7, large));
    assert_eq!((guest.fp.fdp(), guest.fp.fop()), (0x60_0000, 0x011B));
}

#[test]
fn x87_stack_overflow_and_underflow_are_told_apart_by_c1() {
    let mut guest = Guest::new();
    assert_eq!(guest.run(&[0xDD, 0xD8]), Outcome::Done); // fstp st0 of an empty stack
    assert_eq!(guest.fp.fsw() & 0x0241, 0x0041);
    guest.fp.fninit();
    for _ in 0..9 {
        assert_eq!(guest.run(&[0xD9, 0xE8]), Outcome::Done);
    }
    assert_eq!(guest.fp.fsw() & 0x0241, 0x0241);
    assert_eq!(guest.fp.st(0), [0, 0, 0, 0, 0, 0, 0, 0xC0, 0xFF, 0xFF]);
}

#[test]
fn fcomi_writes_and_fcmov_reads_the_guests_flags() {
    let mut guest = Guest::new();
    for bytes in [&[0xD9, 0xEE], &[0xD9, 0xE8]] {
        assert_eq!(guest.run(bytes), Outcome::Done); // st0 = 1, st1 = 0
    }
    guest.context.rflags = 0x0AD7;

    assert_eq!(guest.run(&[0xDB, 0xF1]), Outcome::Done); // fcomi st0, st1
    assert_eq!(guest.context.rflags, 0x0202, "1 > 0 clears them; IF stays");
    assert_eq!(guest.run(&[0xDA, 0xC9]), Outcome::Done); // fcmove st0, st1
    assert_eq!(guest.fp.st(0)[8..], [0xFF, 0x3F]);
    guest.context.rflags |= 0x40;
    assert_eq!(guest.run(&[0xDA, 0xC9]), Outcome::Done);
    assert_eq!(guest.fp.st(0), [0; 10]);
}

#[test]
fn classes_choose_the_availability_checks() {
    let mut guest = Guest::new();
    let cases: [(&[u8], Class); 9] = [
        (&[0x66, 0x0F, 0xEF, 0xC1], Class::SseInt), // pxor xmm0, xmm1
        (&[0x0F, 0x58, 0xC1], Class::SseFp),        // addps xmm0, xmm1
        (&[0x0F, 0xAE, 0x13], Class::SseFp),        // ldmxcsr [rbx]
        (&[0x0F, 0xEF, 0xC1], Class::Mmx),          // pxor mm0, mm1
        (&[0x0F, 0x77], Class::Mmx),                // emms
        (&[0xF3, 0x0F, 0xD6, 0xC1], Class::SseMmx), // movq2dq xmm0, mm1
        (&[0x0F, 0x2C, 0xC1], Class::SseMmx),       // cvttps2pi mm0, xmm1
        (&[0x9B], Class::Wait),
        (&[0xDB, 0xE2], Class::X87), // fnclex
    ];
    for (bytes, class) in cases {
        assert_eq!(guest.thunk(64, bytes).class, class, "{bytes:02x?}");
    }
}

#[test]
fn integer_and_privileged_neighbours_are_not_covered() {
    let others = [
        Code::Crc32_r32_rm8,
        Code::Movnti_m32_r32,
        Code::Sfence,
        Code::Prefetcht0_m8,
        Code::Fxsave_m512byte,
        Code::Popcnt_r32_rm32,
        Code::EVEX_Vaddps_xmm_k1z_xmm_xmmm128b32,
        Code::VEX_Vgatherdps_xmm_vm32x_xmm,
        Code::VEX_Andn_r32_r32_rm32,
        Code::Finit,
        Code::Cmovo_r32_rm32,
    ];
    assert_eq!(others.map(supported), [false; 11]);
}

#[test]
fn software_aes_and_pclmulqdq_equal_the_hosts() {
    let opcodes: [&[u8]; 10] = [
        &[0x66, 0x0F, 0x38, 0xDB, 0xC1],       // aesimc xmm0, xmm1
        &[0x66, 0x0F, 0x38, 0xDC, 0xC1],       // aesenc
        &[0x66, 0x0F, 0x38, 0xDD, 0xC1],       // aesenclast
        &[0x66, 0x0F, 0x38, 0xDE, 0xC1],       // aesdec
        &[0x66, 0x0F, 0x38, 0xDF, 0xC1],       // aesdeclast
        &[0x66, 0x0F, 0x3A, 0xDF, 0xC1, 0x1B], // aeskeygenassist xmm0, xmm1, 0x1B
        &[0x66, 0x0F, 0x3A, 0x44, 0xC1, 0x00], // pclmulqdq xmm0, xmm1, 0
        &[0x66, 0x0F, 0x3A, 0x44, 0xC1, 0x01],
        &[0x66, 0x0F, 0x3A, 0x44, 0xC1, 0x10],
        &[0x66, 0x0F, 0x3A, 0x44, 0xC1, 0x11],
    ];
    let mut guest = Guest::new();
    for bytes in opcodes {
        let ins = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
        let software = soft_crypto::function(ins.code()).expect("has a software form");
        let immediate = if ins.op_count() == 3 { ins.immediate8() } else { 0 };
        for round in 1..200_u128 {
            let (a, b) = (round.wrapping_mul(u128::MAX / 97), round.wrapping_mul(u128::MAX / 1009) ^ round << 70);
            guest.fp.set_xmm(0, a);
            guest.fp.set_xmm(1, b);
            assert!(guest.run(bytes) == Outcome::Done);
            if host_has(ins.code()) {
                assert_eq!(software(a, b, 0, immediate), guest.fp.xmm(0), "{bytes:02x?} of {a:x} and {b:x}");
            }
        }
    }
}

#[test]
fn sha_thunk_takes_its_source_from_memory_and_its_keys_from_xmm0() {
    let mut guest = Guest::new();
    let (cdgh, abef, keys) = (0x1111_2222_3333_4444_u128 << 17, 0x5555_6666_7777_8888_u128 << 31, 0x9999_u128 << 40);
    guest.fp.set_xmm(0, keys);
    guest.fp.set_xmm(9, cdgh);
    guest.scratch.0[..16].copy_from_slice(&abef.to_le_bytes());
    let thunk = guest.thunk(64, &[0x44, 0x0F, 0x38, 0xCB, 0x0B]); // sha256rnds2 xmm9, [rbx]
    assert_eq!((thunk.mem, thunk.mem_align), (MemAccess::Read(16), 16));

    assert_eq!(guest.run(&[0x44, 0x0F, 0x38, 0xCB, 0x0B]), Outcome::Done);

    let software = soft_crypto::function(Code::Sha256rnds2_xmm_xmmm128).expect("has a software form");
    assert_eq!(guest.fp.xmm(9), software(cdgh, abef, keys, 0));
}

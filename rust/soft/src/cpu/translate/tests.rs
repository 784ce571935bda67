//! The translator against the interpreter on programs whose shape matters: loops, links, faults,
//! code that changes. `soft-fuzz` compares what single instructions do.

use super::{Budget, MEMORY};
use crate::cpu::state::{cr0, cr4};
use crate::cpu::testing::Bench;
use crate::cpu::{attention, vector, Stop};
use crate::host::vex::host_has_all;
use crate::mem::note_store;

const CODE: u64 = 0x10_000;

fn bench(code: &[u8], hot: u32) -> Bench {
    let mut bench = Bench::new(1 << 20).long_mode(CODE, false);
    bench.load(CODE, code);
    if hot != 0 {
        assert!(bench.cpu.use_translator(hot, Budget::share(MEMORY, 4)));
    }
    bench
}

/// Runs until a fault under both; gives the translator's side after comparing them.
fn both(code: &[u8], prepare: impl Fn(&mut Bench)) -> Bench {
    let [mut interpreted, mut translated] = [0, 1].map(|hot| bench(code, hot));
    for side in [&mut interpreted, &mut translated] {
        prepare(side);
        assert_eq!(side.cpu.run_raw(10_000_000), Err(Stop::Fault));
    }
    let (a, b) = (&interpreted.cpu, &translated.cpu);
    assert_eq!(a.regs[..16], b.regs[..16]);
    assert_eq!((a.rip, a.rflags(), a.fault, a.retired), (b.rip, b.rflags(), b.fault, b.retired));
    assert!(a.fp.bytes() == b.fp.bytes());
    translated
}

#[test]
fn test_translate_loop_with_memory_and_calls_ends_as_interpreted() {
    // mov ecx, 5000; l: push rcx; call f; pop rcx; dec ecx; jnz l; ud2
    // f: inc qword [rsp-8]; add rax, [rsp+8]; adc r9, 1; ret
    let code = [
        0xb9, 0x88, 0x13, 0, 0, 0x51, 0xe8, 7, 0, 0, 0, 0x59, 0xff, 0xc9, 0x75, 0xf5, 0x0f, 0x0b, 0x48, 0xff, 0x44,
        0x24, 0xf8, 0x48, 0x03, 0x44, 0x24, 8, 0x49, 0x83, 0xd1, 1, 0xc3,
    ];
    let translated = both(&code, |_| {});
    let stats = translated.cpu.translator.as_ref().map(|t| t.stats).unwrap_or_default();
    assert!(stats.translated > 0 && stats.entries < 100, "{stats:?}");
}

#[test]
fn test_translate_fault_in_mid_block_is_exact() {
    // stc; mov rbx, 0x40000000 (not mapped); inc rdx; add rsi, [rbx]; inc rdx
    let code = [0xf9, 0xbb, 0, 0, 0, 0x40, 0x48, 0xff, 0xc2, 0x48, 0x03, 0x33, 0x48, 0xff, 0xc2];
    let translated = both(&code, |bench| (bench.cpu.regs[2], bench.cpu.regs[6]) = (0, 7));
    assert_eq!(translated.cpu.fault.vector, vector::PF);
    assert_eq!((translated.cpu.regs[2], translated.cpu.regs[6], translated.cpu.rip), (1, 7, CODE + 9));
}

#[test]
fn test_translate_store_into_its_own_block_executes_the_new_code() {
    // mov ecx, 9; l: mov [rip+1], cl (the next one's immediate); mov al, 0; add rdx, rax; dec ecx; jnz l; ud2
    let code = [0xb9, 9, 0, 0, 0, 0x88, 0x0d, 1, 0, 0, 0, 0xb0, 0, 0x48, 1, 0xc2, 0xff, 0xc9, 0x75, 0xf1, 0x0f, 0x0b];
    let translated = both(&code, |bench| bench.cpu.regs[2] = 0);
    assert_eq!(translated.cpu.regs[2], 45);
}

#[test]
fn test_translate_return_to_an_address_that_is_not_canonical_faults_at_the_return() {
    // mov rax, 0x8000_0000_0000; push rax; ret
    let code = [0x48, 0xb8, 0, 0, 0, 0, 0, 0x80, 0, 0, 0x50, 0xc3];
    let translated = both(&code, |_| {});
    assert_eq!((translated.cpu.fault.vector, translated.cpu.rip), (vector::GP, CODE + 11));
    assert_eq!(translated.cpu.regs[4], 0x7ff8);
}

#[test]
fn test_translate_endless_loop_sees_attention_and_changed_code() {
    // l: inc rax; jmp l
    let mut bench = bench(&[0x48, 0xff, 0xc0, 0xeb, 0xfb], 1);
    let shared = bench.cpu.shared.clone();
    let kicker = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        shared.raise(attention::KICK);
    });
    assert_eq!(bench.cpu.run_raw(u64::MAX / 2), Ok(()));
    kicker.join().unwrap();
    assert!(bench.cpu.retired > 1000);
    // What another vCPU does: new bytes, then the generation.
    bench.load(CODE, &[0x0f, 0x0b]);
    if let Some(slot) = bench.cpu.slots.find(CODE) {
        note_store(slot.code_word(CODE), 0, 2);
    }
    bench.cpu.shared.attention.store(0, std::sync::atomic::Ordering::SeqCst);
    let before = bench.cpu.retired;
    let result = bench.cpu.run_raw(10);
    assert_eq!(result, if bench.cpu.rip == CODE { Err(Stop::Fault) } else { Ok(()) });
    assert!(bench.cpu.retired < before + 20);
}

#[test]
fn test_translate_vector_state_is_the_cpus_again_after_a_fault() {
    // movd xmm5, eax; paddd xmm5, xmm5; cvtsi2sd xmm6, eax; ud2
    let code = [0x66, 0x0f, 0x6e, 0xe8, 0x66, 0x0f, 0xfe, 0xed, 0xf2, 0x0f, 0x2a, 0xf0, 0x0f, 0x0b];
    let translated = both(&code, |bench| bench.cpu.regs[0] = 21);
    assert_eq!(translated.cpu.fp.xmm(5), 42);
    assert_eq!(translated.cpu.fp.xmm(6) as u64, 21f64.to_bits());
}

#[test]
fn test_translate_unmasked_simd_exception_is_the_guests() {
    // xorps xmm0, xmm0; divss xmm1, xmm0 with every exception unmasked
    let code = [0x0f, 0x57, 0xc0, 0xf3, 0x0f, 0x5e, 0xc8];
    let translated = both(&code, |bench| {
        bench.cpu.fp.set_mxcsr(0);
        bench.cpu.fp.set_xmm(1, 0x3f80_0000);
    });
    assert_eq!((translated.cpu.fault.vector, translated.cpu.rip), (vector::XM, CODE + 3));
}

#[test]
fn test_translate_fields_across_a_page_boundary_and_back_are_those_of_the_interpreter() {
    // mov rax, [rbx]; mov rcx, [rbx+8]; mov [rbx-16], rax; add rcx, [rbx-4]; mov rdx, [rbx+4]; add [rbx+2], edx;
    // mov esi, [rbx+0xffc]; xor rdi, [rbx-8]; ud2
    let code = [
        0x48, 0x8b, 0x03, 0x48, 0x8b, 0x4b, 8, 0x48, 0x89, 0x43, 0xf0, 0x48, 0x03, 0x4b, 0xfc, 0x48, 0x8b, 0x53, 4, 1,
        0x53, 2, 0x8b, 0xb3, 0xfc, 0x0f, 0, 0, 0x48, 0x33, 0x7b, 0xf8, 0x0f, 0x0b,
    ];
    for start in [0x2_0ff0u64, 0x2_0ff8, 0x2_0ffc, 0x2_1000, 0x2_1004, 0x2_1010] {
        let translated = both(&code, |bench| {
            for index in 0..0x600u64 {
                bench.load(0x2_0000 + 8 * index, &(index * 0x0101_0101_0107).to_le_bytes());
            }
            bench.cpu.regs[3] = start;
        });
        assert_eq!(translated.cpu.fault.vector, vector::UD);
    }
}

#[test]
fn test_translate_field_after_one_that_only_the_handler_reads_is_looked_up() {
    // mov rax, [rbx+0x0ffc] (crosses); mov rcx, [rbx+0x1ff8]; mov rdx, [rbx-8]; mov rsi, [rbx+0x40000000] (not mapped)
    let code = [
        0x48, 0x8b, 0x83, 0xfc, 0x0f, 0, 0, 0x48, 0x8b, 0x8b, 0xf8, 0x1f, 0, 0, 0x48, 0x8b, 0x53, 0xf8, 0x48, 0x8b,
        0xb3, 0, 0, 0, 0x40,
    ];
    let translated = both(&code, |bench| {
        for index in 0..0x600u64 {
            bench.load(0x2_0000 + 8 * index, &(index * 0x0101_0101_0107).to_le_bytes());
        }
        bench.cpu.regs[3] = 0x2_1000;
    });
    assert_eq!((translated.cpu.fault.vector, translated.cpu.rip), (vector::PF, CODE + 18));
}

#[test]
fn test_translate_high_bytes_are_read_and_written_as_interpreted() {
    // mov ah, bl; add ch, ah; xor dh, [rip+0]; movzx esi, bh; not bh; sub ah, dh; test dh, 4; mov [rsp-8], ch; setz ah
    let code = [
        0x88, 0xdc, 0x00, 0xe5, 0x32, 0x35, 0, 0, 0, 0, 0x0f, 0xb6, 0xf7, 0xf6, 0xd7, 0x28, 0xf4, 0xf6, 0xc6, 4, 0x88,
        0x6c, 0x24, 0xf8, 0x0f, 0x94, 0xc4, 0x0f, 0x0b,
    ];
    both(&code, |bench| bench.cpu.regs[..4].copy_from_slice(&[0x1122_3344, 0x5566_7788, 0x99aa_bbcc, 0xddee_ff01]));
}

// ---- groups (`group.rs`): the first turn finds no TLB entry, later ones do unless two pages are met -----------------

#[test]
fn test_translate_group_with_live_flags_and_a_moving_base_is_the_interpreters() {
    // mov r14d, 4; l: stc; mov rax, [rbx]; adc rax, [rbx+8]; mov [rbx+16], rax; add rbx, 8; adc rcx, [rbx+16];
    // movups xmm1, [rbx-8]; paddd xmm1, xmm1; movups [rbx+8], xmm1; dec r14d; jnz l; ud2
    let code = [
        0x41, 0xbe, 4, 0, 0, 0, 0xf9, 0x48, 0x8b, 3, 0x48, 0x13, 0x43, 8, 0x48, 0x89, 0x43, 0x10, 0x48, 0x83, 0xc3, 8,
        0x48, 0x13, 0x4b, 0x10, 0x0f, 0x10, 0x4b, 0xf8, 0x66, 0x0f, 0xfe, 0xc9, 0x0f, 0x11, 0x4b, 8, 0x41, 0xff, 0xce,
        0x75, 0xdb, 0x0f, 0x0b,
    ];
    for start in [0x2_0800u64, 0x2_0fc8, 0x2_0fd0, 0x2_0fe3, 0x2_0ff1, 0x2_0ff8, 0x2_1000] {
        let prepare = |bench: &mut Bench| {
            for index in 0..0x600u64 {
                bench.load(0x2_0000 + 8 * index, &(index * 0x0101_0101_0107).to_le_bytes());
            }
            bench.cpu.regs[3] = start;
        };
        let (mut interpreted, translated) = (bench(&code, 0), both(&code, prepare));
        prepare(&mut interpreted);
        assert_eq!(interpreted.cpu.run_raw(1000), Err(Stop::Fault));
        assert!((0..0x600).all(|index| interpreted.word(0x2_0000 + 8 * index) == translated.word(0x2_0000 + 8 * index)));
    }
}

#[test]
fn test_translate_group_on_the_stack_is_the_interpreters_even_across_pages() {
    // mov r14d, 4; l: stc; push rax; adc rdx, 1; push rbx; call c; pop rcx; pop r8; dec r14d; jnz l; ud2
    // c: pop rsi; adc rdx, [rsp]; mov [rsp-16], rdx; mov rdi, [rsp-16]; push rsi; adc rdi, r8; ret
    let code = [
        0x41, 0xbe, 4, 0, 0, 0, 0xf9, 0x50, 0x48, 0x83, 0xd2, 1, 0x53, 0xe8, 0x0a, 0, 0, 0, 0x59, 0x41, 0x58, 0x41,
        0xff, 0xce, 0x75, 0xec, 0x0f, 0x0b, 0x5e, 0x48, 0x13, 0x14, 0x24, 0x48, 0x89, 0x54, 0x24, 0xf0, 0x48, 0x8b,
        0x7c, 0x24, 0xf0, 0x56, 0x4c, 0x11, 0xc7, 0xc3,
    ];
    for stack in [0x8000u64, 0x8800, 0x9008, 0x9010, 0x9013, 0x901c] {
        both(&code, |bench| (bench.cpu.regs[4], bench.cpu.regs[0]) = (stack, 0x1234));
    }
}

// ---- flags that are computed anew (`again.rs`) ---------------------------------------------------------------------

#[test]
fn test_translate_flags_that_look_ups_destroyed_are_the_interpreters_wherever_they_are_wanted() {
    // mov ecx, 1000
    // l: cmp rcx, 77; mov rax, [rbx]; setb sil; sub r9, r8; mov rdi, [rbx+rcx*2]; adc r10, [rbx+8]; add r11, rcx;
    // mov [rbx+16], r11; jc c; xor rdx, rcx; c: add r12d, 0x7f000001; movzx eax, word [rbx+2]; cmovo r13, rax;
    // and r14b, dil; push rdi; lahf; pop rbp; sub rax, 5; cmp [rbx+24], r8; movups xmm0, [rbx+1];
    // mov r15, [rbx+rax+8]; sbb r15w, cx; test r15, r15; mov r15, [rbx+32]; lea r15, [r15+r11]; cmp r15, rax;
    // dec ecx; jnz l; cmp r8, r13; inc rdi; sub rdi, r13; mov rdi, [rbp+0x40000000]
    let code = [
        0xb9, 0xe8, 3, 0, 0, 0x48, 0x83, 0xf9, 0x4d, 0x48, 0x8b, 3, 0x40, 0x0f, 0x92, 0xc6, 0x4d, 0x29, 0xc1, 0x48,
        0x8b, 0x3c, 0x4b, 0x4c, 0x13, 0x53, 8, 0x49, 1, 0xcb, 0x4c, 0x89, 0x5b, 0x10, 0x72, 3, 0x48, 0x31, 0xca, 0x41,
        0x81, 0xc4, 1, 0, 0, 0x7f, 0x0f, 0xb7, 0x43, 2, 0x4c, 0x0f, 0x40, 0xe8, 0x41, 0x20, 0xfe, 0x57, 0x9f, 0x5d,
        0x48, 0x83, 0xe8, 5, 0x4c, 0x39, 0x43, 0x18, 0x0f, 0x10, 0x43, 1, 0x4c, 0x8b, 0x7c, 3, 8, 0x66, 0x41, 0x19,
        0xcf, 0x4d, 0x85, 0xff, 0x4c, 0x8b, 0x7b, 0x20, 0x4f, 0x8d, 0x3c, 0x1f, 0x49, 0x39, 0xc7, 0xff, 0xc9, 0x75,
        0xa2, 0x4d, 0x39, 0xe8, 0x48, 0xff, 0xc7, 0x4c, 0x29, 0xef, 0x48, 0x8b, 0xbd, 0, 0, 0, 0x40,
    ];
    for start in [0x2_0800u64, 0x2_0fd9, 0x2_0fe3, 0x2_0ff1, 0x2_0ff8, 0x2_0fff, 0x2_1000] {
        both(&code, |bench| {
            for index in 0..0x6000u64 {
                bench.load(0x2_0000 + 8 * index, &(index * 0x0101_0101_0107).to_le_bytes());
            }
            for guest in 8..16 {
                bench.cpu.regs[guest] = (guest as u64).wrapping_mul(0x8765_4321_f00d_cafe);
            }
            bench.cpu.regs[3] = start;
        });
    }
}

#[test]
fn test_translate_faults_find_flags_of_a_comparison_and_of_arithmetic() {
    // mov rbx, 0x40000000 (not mapped); then one of these; what may change its operands; mov rax, [rbx]
    let setters: [&[u8]; 9] = [
        &[0x48, 0x39, 0xd6],                         // cmp rsi, rdx
        &[0x45, 0x38, 0xc1],                         // cmp r9b, r8b
        &[0x66, 0x41, 0x81, 0xf9, 0x34, 0x12],       // cmp r9w, 0x1234
        &[0x4d, 0x85, 0xc9],                         // test r9, r9
        &[0x41, 0x20, 0xf1],                         // and r9b, sil
        &[0x66, 0x44, 0x31, 0xce],                   // xor si, r9w
        &[0x4c, 0x01, 0xce],                         // add rsi, r9
        &[0x45, 0x29, 0xc1],                         // sub r9d, r8d
        &[0x41, 0x81, 0xc1, 0xff, 0xff, 0xff, 0x7f], // add r9d, 0x7fffffff
    ];
    let between: [&[u8]; 3] = [
        &[],
        &[0x4d, 0x8d, 0x49, 1, 0x48, 0x8d, 0x76, 1], // lea r9, [r9+1]; lea rsi, [rsi+1]
        &[0x4c, 0x8b, 0x0f, 0x48, 0x8b, 0xb7, 0, 8, 0, 0], // mov r9, [rdi]; mov rsi, [rdi+0x800]
    ];
    for (setter, between) in setters.into_iter().flat_map(|setter| between.map(|between| (setter, between))) {
        for value in [0u64, 1, 0x7f, 0x80, 0x7fff_ffff, 0x8000_0000, u64::MAX] {
            let code = [&[0xbb, 0, 0, 0, 0x40], setter, between, &[0x48, 0x8b, 3]].concat();
            let translated = both(&code, |bench| {
                (bench.cpu.regs[2], bench.cpu.regs[6], bench.cpu.regs[7]) = (value, 0x80ff, 0x2_0000);
                (bench.cpu.regs[8], bench.cpu.regs[9]) = (0x8000_007f, value);
            });
            assert_eq!(translated.cpu.fault.vector, vector::PF);
        }
    }
}

// ---- AVX: on hosts that lack it the interpreter has no such instruction either --------------------------------------

const PATTERN: [u8; 32] = *b"the lower half..the upper half..";
/// vmovdqu ymm1, [0x20000]
const LOAD: [u8; 9] = [0xc5, 0xfe, 0x6f, 0x0c, 0x25, 0, 0, 2, 0];

fn with_avx(bench: &mut Bench) {
    bench.cpu.cr4 |= cr4::OSXSAVE;
    bench.cpu.xcr0 = 7;
    bench.load(0x2_0000, &PATTERN);
}

#[test]
fn test_translate_call_through_a_register_pushes_on_the_stack_after_a_group_by_rsp() {
    // mov ecx, 1000; lea rdx, [rip+f]; l: mov rbx, [rsp+32]; pop rax; call rdx; push rax; dec ecx; jnz l; ud2; f: ret
    let code = [
        0xb9, 0xe8, 3, 0, 0, 0x48, 0x8d, 0x15, 0x0f, 0, 0, 0, 0x48, 0x8b, 0x5c, 0x24, 0x20, 0x58, 0xff, 0xd2, 0x50,
        0xff, 0xc9, 0x75, 0xf3, 0x0f, 0x0b, 0xc3,
    ];
    let translated = both(&code, |bench| bench.cpu.regs[4] = 0x7f00);
    assert_eq!((translated.cpu.fault.vector, translated.cpu.regs[4]), (vector::UD, 0x7f00));
}

#[test]
fn test_translate_upper_halves_live_over_a_call_of_a_handler() {
    if !host_has_all() {
        return;
    }
    // load; cpuid; vpaddd ymm2, ymm1, ymm1; paddd xmm1, xmm1; vmovdqu [0x20100], ymm2; ud2
    let rest = [
        0x0f, 0xa2, 0xc5, 0xf5, 0xfe, 0xd1, 0x66, 0x0f, 0xfe, 0xc9, 0xc5, 0xfe, 0x7f, 0x14, 0x25, 0, 1, 2, 0, 0x0f,
        0x0b,
    ];
    let translated = both(&[&LOAD[..], &rest].concat(), with_avx);
    assert_eq!(translated.cpu.fp.ymm_high(1).to_le_bytes(), PATTERN[16..]);
    assert_eq!(translated.word(0x2_0100 + 24), translated.cpu.fp.ymm_high(2).wrapping_shr(64) as u64);
}

#[test]
fn test_translate_vex_without_its_state_is_undefined() {
    // paddd xmm1, xmm1; vpaddd xmm1, xmm1, xmm1
    let code = [0x66, 0x0f, 0xfe, 0xc9, 0xc5, 0xf1, 0xfe, 0xc9];
    let translated = both(&code, |bench| {
        with_avx(bench);
        bench.cpu.xcr0 = 3;
    });
    assert_eq!((translated.cpu.fault.vector, translated.cpu.rip), (vector::UD, CODE + 4));
}

#[test]
fn test_translate_vex_fault_in_mid_block_keeps_what_was_loaded() {
    if !host_has_all() {
        return;
    }
    // load; mov ebx, 0x40000000 (not mapped); vpaddd ymm1, ymm1, [rbx]
    let translated = both(&[&LOAD[..], &[0xbb, 0, 0, 0, 0x40, 0xc5, 0xf5, 0xfe, 0x0b]].concat(), with_avx);
    assert_eq!((translated.cpu.fault.vector, translated.cpu.rip), (vector::PF, CODE + 14));
    assert_eq!(translated.cpu.fp.ymm_high(1).to_le_bytes(), PATTERN[16..]);
}

#[test]
fn test_translate_vex_unmasked_exception_is_the_guests() {
    // vxorps xmm0, xmm0, xmm0; vdivps ymm1, ymm1, ymm0
    let translated = both(&[0xc5, 0xf8, 0x57, 0xc0, 0xc5, 0xf4, 0x5e, 0xc8], |bench| {
        with_avx(bench);
        bench.cpu.fp.set_mxcsr(0);
        bench.cpu.fp.set_ymm_high(1, 0x3f80_0000);
    });
    assert_eq!(translated.cpu.fault.vector, if host_has_all() { vector::XM } else { vector::UD });
}

#[test]
fn test_translate_third_operands_that_live_in_memory() {
    // mov r8d, 5; mov r9, …; mov r15, …; andn r10, r8, r9; mulx r8, r8, r15; pdep r11, r9, r15; shlx r9, r10, r8;
    // bextr r15, r15, r9; ud2
    let code = [
        0x41, 0xb8, 5, 0, 0, 0, 0x49, 0xb9, 0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 1, 0x49, 0xbf, 0, 0xff, 0, 0xff,
        0, 0xff, 0, 0xff, 0xc4, 0x42, 0xb8, 0xf2, 0xd1, 0xc4, 0x42, 0xbb, 0xf6, 0xc7, 0xc4, 0x42, 0xb3, 0xf5, 0xdf,
        0xc4, 0x42, 0xb9, 0xf7, 0xca, 0xc4, 0x42, 0xb0, 0xf7, 0xff, 0x0f, 0x0b,
    ];
    let translated = both(&code, |bench| bench.cpu.regs[2] = 1 << 63);
    // The upper half of a product with 2^63.
    assert_eq!(translated.cpu.regs[8], 0xff00_ff00_ff00_ff00 >> 1);
    assert_eq!(translated.cpu.regs[10], 0x0123_4567_89ab_cdef & !5);
}

/// How many traces a translator made.
fn traces(bench: &Bench) -> u64 {
    bench.cpu.translator.as_ref().map_or(0, |translator| translator.stats.traces)
}

#[test]
fn test_translate_fault_within_an_unrolled_loop_is_exact() {
    // l: dec ecx; mov eax, 100; xor edx, edx; add rsi, [rbx]; lea rbx, [rbx+8]; div ecx; inc qword [rbx-8]; jmp l
    let code = [
        0xff, 0xc9, 0xb8, 100, 0, 0, 0, 0x31, 0xd2, 0x48, 3, 0x33, 0x48, 0x8d, 0x5b, 8, 0xf7, 0xf1, 0x48, 0xff, 0x43,
        0xf8, 0xeb, 0xe8,
    ];
    for count in [7u64, 64, 901, 1002] {
        let translated = both(&code, |bench| {
            (bench.cpu.regs[1], bench.cpu.regs[3], bench.cpu.regs[6]) = (count, 0x2_0004, 1);
        });
        assert_eq!((translated.cpu.fault.vector, translated.cpu.rip), (vector::DE, CODE + 16));
        assert!(traces(&translated) > 0);
    }
}

#[test]
fn test_translate_ways_out_of_a_trace_count_as_the_interpreter_does() {
    // l: mov rdx, [rbx]; test cl, 7; jz a; adc [rbx+8], rdx; test cl, 3; jnz b; inc r9; jmp c; a: dec r9; b: xor [rbx], rcx;
    // c: dec ecx; jnz l; ud2
    let code = [
        0x48, 0x8b, 0x13, 0xf6, 0xc1, 7, 0x74, 0x0e, 0x48, 0x11, 0x53, 8, 0xf6, 0xc1, 3, 0x75, 8, 0x49, 0xff, 0xc1,
        0xeb, 6, 0x49, 0xff, 0xc9, 0x48, 0x31, 0x0b, 0xff, 0xc9, 0x75, 0xe0, 0x0f, 0x0b,
    ];
    for start in [0x2_0000u64, 0x2_0ffc, 0x2_0ff4] {
        let translated = both(&code, |bench| {
            bench.load(0x2_0000, &[0x5a; 0x2000]);
            (bench.cpu.regs[1], bench.cpu.regs[3], bench.cpu.regs[9]) = (1000, start, 0);
        });
        assert!(traces(&translated) > 1);
    }
}

#[test]
fn test_translate_store_from_a_trace_into_a_later_block_of_it_executes_the_new_code() {
    // mov ecx, 300; l: cmp ecx, 40; jb s; nop; t: mov al, 1; add rdx, rax; dec ecx; jnz l; ud2; s: mov [rip-14], cl; jmp t
    let code = [
        0xb9, 0x2c, 1, 0, 0, 0x83, 0xf9, 40, 0x72, 0x0c, 0x90, 0xb0, 1, 0x48, 1, 0xc2, 0xff, 0xc9, 0x75, 0xf1, 0x0f,
        0x0b, 0x88, 0x0d, 0xf0, 0xff, 0xff, 0xff, 0xeb, 0xed,
    ];
    let translated = both(&code, |bench| (bench.cpu.regs[0], bench.cpu.regs[2]) = (0, 0));
    assert_eq!(translated.cpu.regs[2], 261 + 39 * 40 / 2);
    assert!(traces(&translated) > 0);
}

#[test]
fn test_translate_two_pages_of_one_tlb_slot_do_not_drive_each_other_out() {
    // mov ecx, 1000; l: add rax, [rbx]; inc qword [rsi]; dec ecx; jnz l; ud2
    let code = [0xb9, 0xe8, 3, 0, 0, 0x48, 3, 3, 0x48, 0xff, 6, 0xff, 0xc9, 0x75, 0xf6, 0x0f, 0x0b];
    let translated = both(&code, |bench| {
        // 16 MiB is where 0 is.
        bench.load(0x3000 + 8 * 8, &0x83u64.to_le_bytes());
        (bench.cpu.regs[0], bench.cpu.regs[3], bench.cpu.regs[6]) = (0, 0x2_0000, 0x102_0000);
    });
    assert_eq!(translated.cpu.regs[0], 999 * 1000 / 2);
    assert!(translated.cpu.counters.tlb_misses < 20, "{}", translated.cpu.counters.tlb_misses);
}

#[test]
fn test_translate_code_of_processes_finds_nothing_in_its_tlb_once_alignment_is_checked() {
    // mov ecx, 1000; l: mov rax, [rbx+1]; mov [rbx+rax+9], rax; dec ecx; jnz l; pushfq; or dword [rsp], 0x40000; popfq;
    // inc rdx; mov rax, [rbx+rax+1]
    let code = [
        0xb9, 0xe8, 3, 0, 0, 0x48, 0x8b, 0x43, 1, 0x48, 0x89, 0x44, 3, 9, 0xff, 0xc9, 0x75, 0xf3, 0x9c, 0x81, 0x0c,
        0x24, 0, 0, 4, 0, 0x9d, 0x48, 0xff, 0xc2, 0x48, 0x8b, 0x44, 3, 1,
    ];
    let [interpreted, translated] = [0, 1].map(|hot| {
        let mut bench = Bench::new(1 << 20).long_mode(CODE, true);
        bench.load(CODE, &code);
        assert!(hot == 0 || bench.cpu.use_translator(hot, Budget::share(MEMORY, 4)));
        (bench.cpu.regs[2], bench.cpu.regs[3], bench.cpu.regs[4]) = (0, 0x2_0000, 0x8000);
        bench.cpu.cr0 |= cr0::AM;
        bench.cpu.cpl = 3;
        bench.cpu.update_modes();
        assert_eq!(bench.cpu.run_raw(10_000_000), Err(Stop::Fault));
        bench
    });
    assert_eq!((translated.cpu.fault.vector, translated.cpu.rip), (vector::AC, CODE + 30));
    assert_eq!(interpreted.cpu.regs[..16], translated.cpu.regs[..16]);
    assert_eq!((interpreted.cpu.rip, interpreted.cpu.retired), (translated.cpu.rip, translated.cpu.retired));
    assert!([0x2_0000, 0x2_0008].iter().all(|&at| interpreted.word(at) == translated.word(at)));
}

#[test]
fn test_translate_near_the_end_of_the_lower_half_a_branch_into_the_hole_faults_and_loops_are_quick() {
    // mov ecx, 100; l: inc rax; dec ecx; jnz l; jmp +64 MiB
    let code = [0xb9, 100, 0, 0, 0, 0x48, 0xff, 0xc0, 0xff, 0xc9, 0x75, 0xf9, 0xe9, 0, 0, 0, 4];
    let start = 0x7fff_fe81_0000;
    let translated = both(&code, |bench| {
        bench.load(0x1000 + 8 * 255, &0x4003u64.to_le_bytes());
        bench.load(0x4000 + 8 * 511, &0x5003u64.to_le_bytes());
        bench.load(0x5000 + 8 * 500, &0x83u64.to_le_bytes());
        (bench.cpu.rip, bench.cpu.regs[0]) = (start, 0);
    });
    assert_eq!((translated.cpu.fault.vector, translated.cpu.rip), (vector::GP, start + 12));
    assert!(traces(&translated) > 0);
}

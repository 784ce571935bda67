//! What the thunks cover, and what must be known of an instruction to run it: one place for every
//! list of opcodes. Rules work on iced's data (CPUID features, operands) wherever these suffice, so
//! that a list holds exceptions only.
//!
//! Left to the interpreter on purpose: integer instructions that share these CPUID bits (CRC32,
//! MOVNTI, fences, prefetches) and FXSAVE, XSAVE and their restores, whose memory is too large for a
//! scratch operand (see `fxsave` and `xsave`).

use std::sync::OnceLock;

use super::vex;
use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// Which of the interpreter's availability checks apply (CR0.EM/TS/MP, CR4.OSFXSR).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// SSE without floating-point exceptions.
    SseInt,
    /// SSE under MXCSR; may raise #XM.
    SseFp,
    /// MMX registers only.
    Mmx,
    /// XMM and MMX registers: both checks apply; may raise #XM and #MF.
    SseMmx,
    /// x87, except FWAIT.
    X87,
    /// FWAIT: #NM only when both CR0.MP and CR0.TS are set.
    Wait,
    /// VEX encodings of vector instructions; may raise #XM.
    Avx,
}

/// Whether thunks cover `code` on this host.
pub fn supported(code: Code) -> bool {
    in_scope(code) && (host_has(code) || super::soft_crypto::function(code).is_some())
}

/// Whether the host's CPU has the instruction.
pub fn host_has(code: Code) -> bool {
    code.cpuid_features().iter().all(|&feature| host_feature(feature))
}

fn in_scope(code: Code) -> bool {
    if code == Code::Wait {
        return true;
    }
    let info = code.op_code();
    matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && !info.fwait()
        && !code.cpuid_features().is_empty()
        && code.cpuid_features().iter().all(|&feature| covered_feature(feature))
        && code.cpuid_features().iter().any(|&feature| feature != CpuidFeature::CMOV)
        && !is_left_out(code)
}

fn covered_feature(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::FPU
            | F::FPU287
            | F::FPU387
            | F::CMOV
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::AVX
            | F::AVX2
            | F::FMA
            | F::F16C
    )
}

fn is_left_out(code: Code) -> bool {
    use Mnemonic as M;
    let mnemonic = code.mnemonic();
    matches!(
        mnemonic,
        M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Lfence
            | M::Mfence
            | M::Sfence
            | M::Movnti
            | M::Crc32
            | M::Pause
    ) || vex::is_selective(mnemonic)
}

fn host_feature(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    static CRYPTO: OnceLock<[bool; 3]> = OnceLock::new();
    let [aes, pclmul, sha] = *CRYPTO.get_or_init(|| {
        [
            std::is_x86_feature_detected!("aes"),
            std::is_x86_feature_detected!("pclmulqdq"),
            std::is_x86_feature_detected!("sha"),
        ]
    });
    match feature {
        F::AES => aes,
        F::PCLMULQDQ => pclmul,
        F::SHA => sha,
        F::SSE3 => std::is_x86_feature_detected!("sse3"),
        F::SSSE3 => std::is_x86_feature_detected!("ssse3"),
        F::SSE4_1 => std::is_x86_feature_detected!("sse4.1"),
        F::SSE4_2 => std::is_x86_feature_detected!("sse4.2"),
        other => vex::host_feature(other).unwrap_or(true),
    }
}

/// Class of a covered instruction.
pub fn class(ins: &Instruction) -> Class {
    let code = ins.code();
    let is_x87 = |f: &CpuidFeature| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387);
    if vex::is_vex(code) {
        Class::Avx
    } else if code == Code::Wait {
        Class::Wait
    } else if code.cpuid_features().iter().any(is_x87) {
        Class::X87
    } else if enters_mmx(ins) || code == Code::Emms {
        if has_register(ins, Register::is_xmm) || uses_mxcsr(code) {
            Class::SseMmx
        } else {
            Class::Mmx
        }
    } else if uses_mxcsr(code) || matches!(code, Code::Ldmxcsr_m32 | Code::Stmxcsr_m32) {
        Class::SseFp
    } else {
        Class::SseInt
    }
}

/// Whether the instruction puts the x87 unit into MMX mode: CVTPI2PS and CVTPI2PD do not when they
/// read memory.
pub fn enters_mmx(ins: &Instruction) -> bool {
    has_register(ins, Register::is_mm)
}

fn has_register(ins: &Instruction, wanted: fn(Register) -> bool) -> bool {
    (0..ins.op_count()).any(|i| ins.op_kind(i) == OpKind::Register && wanted(ins.op_register(i)))
}

/// Whether the instruction obeys MXCSR or sets its flags.
pub fn uses_mxcsr(code: Code) -> bool {
    if vex::is_vex(code) {
        return vex::uses_mxcsr(code);
    }
    // Sse packed compares share their mnemonic with the string instruction CMPSD.
    if code == Code::Cmpsd_xmm_xmmm64_imm8 {
        return true;
    }
    mnemonic_uses_mxcsr(code.mnemonic())
}

/// The same by the name of an instruction of the legacy encodings, scalar compares of doubles left out.
pub(super) fn mnemonic_uses_mxcsr(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    if arithmetic_lanes(mnemonic).is_some() {
        return true;
    }
    matches!(
        mnemonic,
        M::Sqrtps
            | M::Sqrtpd
            | M::Sqrtss
            | M::Sqrtsd
            | M::Rcpps
            | M::Rcpss
            | M::Rsqrtps
            | M::Rsqrtss
            | M::Minps
            | M::Minpd
            | M::Minss
            | M::Minsd
            | M::Maxps
            | M::Maxpd
            | M::Maxss
            | M::Maxsd
            | M::Cmpps
            | M::Cmppd
            | M::Cmpss
            | M::Comiss
            | M::Comisd
            | M::Ucomiss
            | M::Ucomisd
            | M::Roundps
            | M::Roundpd
            | M::Roundss
            | M::Roundsd
            | M::Cvtdq2pd
            | M::Cvtdq2ps
            | M::Cvtpd2dq
            | M::Cvtpd2pi
            | M::Cvtpi2pd
            | M::Cvtpi2ps
            | M::Cvtps2dq
            | M::Cvtps2pd
            | M::Cvtps2pi
            | M::Cvtsd2si
            | M::Cvtsi2sd
            | M::Cvtsi2ss
            | M::Cvtss2sd
            | M::Cvtss2si
            | M::Cvttpd2dq
            | M::Cvttpd2pi
            | M::Cvttps2dq
            | M::Cvttps2pi
            | M::Cvttsd2si
            | M::Cvttss2si
    )
}

/// Lanes of a result that can underflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lanes {
    /// Double instead of single precision.
    pub double: bool,
    /// Number of lanes computed, from the lowest.
    pub count: u8,
}

/// The result lanes of instructions that can raise underflow.
pub fn arithmetic_lanes(mnemonic: Mnemonic) -> Option<Lanes> {
    use Mnemonic as M;
    let (double, count) = match mnemonic {
        M::Addss | M::Subss | M::Mulss | M::Divss | M::Cvtsd2ss => (false, 1),
        M::Addsd | M::Subsd | M::Mulsd | M::Divsd => (true, 1),
        M::Cvtpd2ps => (false, 2),
        M::Addps | M::Subps | M::Mulps | M::Divps => (false, 4),
        M::Addsubps | M::Haddps | M::Hsubps | M::Dpps => (false, 4),
        M::Addpd | M::Subpd | M::Mulpd | M::Divpd => (true, 2),
        M::Addsubpd | M::Haddpd | M::Hsubpd | M::Dppd => (true, 2),
        _ => return None,
    };
    Some(Lanes { double, count })
}

/// The same for VEX encodings too.
pub fn result_lanes(code: Code) -> Option<Lanes> {
    if vex::is_vex(code) {
        vex::arithmetic_lanes(code)
    } else {
        arithmetic_lanes(code.mnemonic())
    }
}

/// Whether a memory operand of the instruction's whole vector must be aligned to its size.
pub fn is_aligned(ins: &Instruction) -> bool {
    if vex::is_vex(ins.code()) {
        vex::is_aligned(ins.mnemonic())
    } else {
        !is_unaligned(ins.mnemonic())
    }
}

/// Whether a memory operand of 16 bytes may be unaligned.
fn is_unaligned(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Pcmpistri
            | M::Pcmpistrm
    )
}

/// Whether the instruction first raises #MF for a pending x87 exception.
pub fn is_waiting(ins: &Instruction) -> bool {
    use Mnemonic as M;
    let no_wait = matches!(
        ins.mnemonic(),
        M::Fninit | M::Fnclex | M::Fnstcw | M::Fnstsw | M::Fnstenv | M::Fnsave | M::Fneni | M::Fndisi | M::Fnsetpm
    );
    match class(ins) {
        Class::X87 => !no_wait,
        Class::Mmx | Class::SseMmx | Class::Wait => true,
        Class::SseInt | Class::SseFp | Class::Avx => false,
    }
}

//! Which instructions are tried: the encodings of every user-mode row of the opcode table that this
//! host's CPU has.

use crate::encode::Form;
use std::sync::OnceLock;

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic};
use ostler_soft::cpu::table::{self, Class};

/// A row of the opcode table with what can be generated of it.
pub struct RowCodes {
    /// The row's instruction.
    pub mnemonic: Mnemonic,
    /// The row's class.
    pub class: Class,
    /// Its encodings in 64-bit mode that this host has.
    pub codes: Vec<Code>,
    /// Its encodings in compatibility mode.
    pub codes32: Vec<Code>,
}

/// All user-mode rows.
pub struct Catalogue {
    /// Rows with at least one encoding.
    pub rows: Vec<RowCodes>,
    /// User-mode rows that cannot be compared here, and why.
    pub left_out: Vec<(Mnemonic, &'static str)>,
}

impl Catalogue {
    /// The catalogue of this build's table and this host.
    pub fn new() -> Self {
        let mut catalogue = Self { rows: Vec::new(), left_out: Vec::new() };
        for row in table::rows() {
            if matches!(row.class, Class::Volatile | Class::System) {
                continue;
            }
            let (mnemonic, class) = (row.mnemonic, row.class);
            match (codes_of(mnemonic, 64), codes_of(mnemonic, 32)) {
                (Err(why), Err(_)) => catalogue.left_out.push((mnemonic, why)),
                (codes, codes32) => {
                    let (codes, codes32) = (codes.unwrap_or_default(), codes32.unwrap_or_default());
                    catalogue.rows.push(RowCodes { mnemonic, class, codes, codes32 });
                }
            }
        }
        catalogue
    }
}

impl Default for Catalogue {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether the host may execute an instruction of this mnemonic: it has a user-mode row.
pub fn is_safe(mnemonic: Mnemonic) -> bool {
    table::row(mnemonic).is_some_and(|row| !matches!(row.class, Class::Volatile | Class::System))
}

fn codes_of(mnemonic: Mnemonic, bits: u32) -> Result<Vec<Code>, &'static str> {
    let mut why = "no encoding for user code";
    let mut codes = Vec::new();
    for code in Code::values().filter(|code| code.mnemonic() == mnemonic) {
        if !usable(code, bits) {
            continue;
        }
        match code.cpuid_features().iter().all(|&feature| host_has(feature)) {
            true => codes.push(code),
            false => why = "the host's CPU lacks it",
        }
    }
    if codes.is_empty() {
        return Err(why);
    }
    Ok(codes)
}

/// Whether an encoding can be generated for user code of 64 or 32 bits.
pub fn usable(code: Code, bits: u32) -> bool {
    static USABLE: [OnceLock<Vec<bool>>; 2] = [OnceLock::new(), OnceLock::new()];
    let all = || Code::values().map(|code| look_usable(code, bits)).collect();
    USABLE[(bits == 32) as usize].get_or_init(all)[code as usize]
}

fn look_usable(code: Code, bits: u32) -> bool {
    let info = code.op_code();
    let encodable = matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    // Forms with FWAIT are two instructions; Intel's and AMD's CPUs disagree on 16-bit near branches.
    let branch16 = info.operand_size() == 16 && is_near_branch(code);
    let form = Form::new(code, bits);
    encodable
        && info.is_instruction()
        && if bits == 64 { info.mode64() } else { info.mode32() }
        && !info.fwait()
        && !info.must_be_cpl0()
        && info.decoder_option() == 0
        && !branch16
        && form.is_some_and(|form| !form.system)
        && !is_far(code)
        // UD0 without ModRM: what some CPUs took it for.
        && code != Code::Ud0
}

/// Far transfers change CS: tests/accel's business.
fn is_far(code: Code) -> bool {
    let far = code.is_jmp_far() || code.is_call_far() || code.is_jmp_far_indirect() || code.is_call_far_indirect();
    far || matches!(code.mnemonic(), Mnemonic::Retf | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq)
}

fn is_near_branch(code: Code) -> bool {
    code.is_jcc_short_or_near()
        || code.is_jmp_short_or_near()
        || code.is_jmp_near_indirect()
        || code.is_call_near()
        || code.is_call_near_indirect()
        || code.is_jcx_short()
        || code.is_loop()
        || code.is_loopcc()
        || matches!(code.mnemonic(), Mnemonic::Ret)
}

/// Whether the host has a CPUID feature; what is not listed is not run.
pub fn host_has(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match feature {
        F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 => true,
        F::FPU | F::FPU287 | F::FPU387 | F::CMOV | F::CX8 | F::MMX | F::MULTIBYTENOP | F::PAUSE => true,
        F::SSE | F::SSE2 | F::CLFSH | F::FXSR => true,
        // Hints that every CPU takes as NOPs.
        F::PREFETCHW | F::CET_IBT => true,
        F::SSE3 => std::is_x86_feature_detected!("sse3"),
        F::SSSE3 => std::is_x86_feature_detected!("ssse3"),
        F::SSE4_1 => std::is_x86_feature_detected!("sse4.1"),
        F::SSE4_2 => std::is_x86_feature_detected!("sse4.2"),
        F::AES => std::is_x86_feature_detected!("aes"),
        F::PCLMULQDQ => std::is_x86_feature_detected!("pclmulqdq"),
        F::SHA => std::is_x86_feature_detected!("sha"),
        F::POPCNT => std::is_x86_feature_detected!("popcnt"),
        F::LZCNT => std::is_x86_feature_detected!("lzcnt"),
        F::BMI1 => std::is_x86_feature_detected!("bmi1"),
        F::BMI2 => std::is_x86_feature_detected!("bmi2"),
        F::ADX => std::is_x86_feature_detected!("adx"),
        F::MOVBE => std::is_x86_feature_detected!("movbe"),
        F::AVX | F::AVX2 | F::FMA | F::F16C => ostler_soft::host::vex::host_has_all(),
        F::XSAVE => std::is_x86_feature_detected!("xsave"),
        F::XSAVEOPT => std::is_x86_feature_detected!("xsaveopt"),
        F::XSAVEC => std::is_x86_feature_detected!("xsavec"),
        F::CMPXCHG16B => std::is_x86_feature_detected!("cmpxchg16b"),
        F::CLFLUSHOPT => leaf7(23),
        F::CLWB => leaf7(24),
        // The native executor demands it.
        F::FSGSBASE => true,
        _ => false,
    }
}

/// A bit of CPUID(7).EBX.
fn leaf7(bit: u32) -> bool {
    std::arch::x86_64::__cpuid_count(7, 0).ebx >> bit & 1 != 0
}

//! What is different about VEX instructions (AVX, AVX2, FMA, F16C): SDM vol. 2A, 2.3 and 2.4.
//!
//! Most are an SSE instruction with another operand and wider registers, named like it with a V in
//! front; what is known of that one ([`plain`]) is not written down twice. Memory operands need no
//! alignment but in moves that are named for it.

use std::collections::HashMap;
use std::sync::OnceLock;

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic};

use super::classify::Lanes;

/// Whether an encoding is a VEX one.
pub fn is_vex(code: Code) -> bool {
    code.op_code().encoding() == EncodingKind::VEX
}

/// Whether this host runs everything that CPU model x86-64-v3 has beyond v2. All or nothing: a guest
/// that sees AVX may use AES and carry-less multiplication in its encodings as well.
pub fn host_has_all() -> bool {
    use CpuidFeature as F;
    static ALL: OnceLock<bool> = OnceLock::new();
    *ALL.get_or_init(|| {
        let needed = [F::XSAVE, F::AVX, F::AVX2, F::FMA, F::F16C, F::AES, F::PCLMULQDQ];
        needed.iter().all(|&feature| host_feature(feature) == Some(true))
    })
}

/// Whether the host has a feature, for those of level 3 and what comes with them.
pub fn host_feature(feature: CpuidFeature) -> Option<bool> {
    use CpuidFeature as F;
    Some(match feature {
        F::XSAVE => std::is_x86_feature_detected!("xsave"),
        F::AES => std::is_x86_feature_detected!("aes"),
        F::PCLMULQDQ => std::is_x86_feature_detected!("pclmulqdq"),
        F::AVX => std::is_x86_feature_detected!("avx"),
        F::AVX2 => std::is_x86_feature_detected!("avx2"),
        F::FMA => std::is_x86_feature_detected!("fma"),
        F::F16C => std::is_x86_feature_detected!("f16c"),
        F::BMI1 => std::is_x86_feature_detected!("bmi1"),
        F::BMI2 => std::is_x86_feature_detected!("bmi2"),
        F::ADX => std::is_x86_feature_detected!("adx"),
        F::MOVBE => std::is_x86_feature_detected!("movbe"),
        _ => return None,
    })
}

/// What an instruction's name says.
#[derive(Clone, Copy)]
struct Facts {
    plain: Mnemonic,
    fused: Option<(bool, bool)>,
}

fn facts(mnemonic: Mnemonic) -> Facts {
    static FACTS: OnceLock<Vec<Facts>> = OnceLock::new();
    FACTS.get_or_init(all_facts)[mnemonic as usize]
}

fn all_facts() -> Vec<Facts> {
    let name = |mnemonic: Mnemonic| format!("{mnemonic:?}").to_lowercase();
    let by_name: HashMap<String, Mnemonic> = Mnemonic::values().map(|mnemonic| (name(mnemonic), mnemonic)).collect();
    let of = |mnemonic| {
        let name = name(mnemonic);
        let plain = name.strip_prefix('v').and_then(|rest| by_name.get(rest)).copied().unwrap_or(mnemonic);
        let is_fused = ["vfmadd", "vfmsub", "vfnmadd", "vfnmsub"].iter().any(|start| name.starts_with(start));
        let fused = is_fused.then(|| (name.ends_with('d'), name.ends_with("ss") || name.ends_with("sd")));
        Facts { plain, fused }
    };
    Mnemonic::values().map(of).collect()
}

/// The instruction of the legacy encodings that has this one's name without the V; itself if none has.
pub fn plain(mnemonic: Mnemonic) -> Mnemonic {
    facts(mnemonic).plain
}

/// A fused multiplication and addition: whether of doubles, whether of scalars.
fn fused(mnemonic: Mnemonic) -> Option<(bool, bool)> {
    facts(mnemonic).fused
}

/// Whether a VEX instruction obeys MXCSR or sets its flags.
pub fn uses_mxcsr(code: Code) -> bool {
    use Mnemonic as M;
    let mnemonic = code.mnemonic();
    // The plain name of VCMPSD is also the string instruction's.
    matches!(mnemonic, M::Vcmpsd | M::Vcvtph2ps | M::Vcvtps2ph)
        || fused(mnemonic).is_some()
        || super::classify::mnemonic_uses_mxcsr(plain(mnemonic))
}

/// The result lanes of VEX instructions that can raise underflow.
pub fn arithmetic_lanes(code: Code) -> Option<Lanes> {
    let wide = code.op_code().l() == 1;
    if let Some((double, scalar)) = fused(code.mnemonic()) {
        let count = match (scalar, double) {
            (true, _) => 1,
            (_, true) => 2 << wide as u8,
            _ => 4 << wide as u8,
        };
        return Some(Lanes { double, count });
    }
    let lanes = super::classify::arithmetic_lanes(plain(code.mnemonic()))?;
    let count = if lanes.count > 1 { lanes.count << wide as u8 } else { 1 };
    Some(Lanes { count, ..lanes })
}

/// The moves whose memory operand must be aligned to its size.
pub fn is_aligned(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa)
}

/// Loads and stores of chosen elements, which `cpu::exec::avx` does itself: elements that are not
/// chosen must not fault.
pub fn is_selective(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq) || is_gather(mnemonic)
}

/// Whether the memory operand's index is a vector.
pub fn is_gather(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_plain_drops_the_v_where_there_is_such_an_instruction() {
        assert_eq!(plain(Mnemonic::Vaddps), Mnemonic::Addps);
        assert_eq!(plain(Mnemonic::Vpermd), Mnemonic::Vpermd);
    }

    #[test]
    fn test_lanes_follow_the_vector_length() {
        let lanes = |code| arithmetic_lanes(code).map(|lanes| (lanes.double, lanes.count));
        assert_eq!(lanes(Code::VEX_Vaddps_ymm_ymm_ymmm256), Some((false, 8)));
        assert_eq!(lanes(Code::VEX_Vaddsd_xmm_xmm_xmmm64), Some((true, 1)));
        assert_eq!(lanes(Code::VEX_Vcvtpd2ps_xmm_ymmm256), Some((false, 4)));
        assert_eq!(lanes(Code::VEX_Vfnmsub231pd_ymm_ymm_ymmm256), Some((true, 4)));
        assert_eq!(lanes(Code::VEX_Vpaddd_ymm_ymm_ymmm256), None);
    }
}

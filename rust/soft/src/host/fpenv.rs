//! FNSTENV, FLDENV, FNSAVE and FRSTOR images (SDM volume 1, 8.1.10): 14 or 28 bytes of environment
//! in real or protected layout, followed by 80 bytes of registers for FNSAVE.
//!
//! Virtual-8086 mode uses the real-mode layout. Selectors are stored as zero (CPUID bit
//! "FCS and FDS deprecated"); in the real-mode layouts the pointers are linear addresses.

use super::fpstate::{array, FpState, ST};

/// Layout of an environment image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnvFormat {
    /// 32-bit operand size: 28 bytes instead of 14.
    pub wide: bool,
    /// Real-address or virtual-8086 mode.
    pub real_mode: bool,
}

impl EnvFormat {
    /// Bytes of the environment.
    pub fn bytes(self) -> usize {
        if self.wide {
            28
        } else {
            14
        }
    }
}

/// FNSTENV writes the environment, then masks all exceptions, which also ends a pending one.
pub fn fnstenv(state: &mut FpState, image: &mut [u8], format: EnvFormat) {
    store_environment(state, image, format);
    state.set_fcw(state.fcw() | 0x003F);
}

/// FNSAVE writes environment and registers, then initialises the FPU.
pub fn fnsave(state: &mut FpState, image: &mut [u8], format: EnvFormat) {
    store_environment(state, image, format);
    for index in 0..8 {
        let at = format.bytes() + 10 * index;
        image[at..at + 10].copy_from_slice(&state.st(index));
    }
    state.fninit();
}

/// FLDENV: physical registers keep their values, so the slots follow the new TOP.
pub fn fldenv(state: &mut FpState, image: &[u8], format: EnvFormat) {
    let fields = Fields::parse(image, format);
    state.set_top_keeping_registers((fields.fsw >> 11 & 7) as u8);
    load_fields(state, &fields);
}

/// FRSTOR: environment and registers.
pub fn frstor(state: &mut FpState, image: &[u8], format: EnvFormat) {
    load_fields(state, &Fields::parse(image, format));
    for index in 0..8 {
        let at = format.bytes() + 10 * index;
        state.set_st(index, array(&image[at..at + 10]));
    }
}

struct Fields {
    fcw: u16,
    fsw: u16,
    ftw: u16,
    fip: u32,
    fop: u16,
    fdp: u32,
}

impl Fields {
    fn parse(image: &[u8], format: EnvFormat) -> Self {
        let stride = format.bytes() / 7;
        let low = |word: usize| u16::from_le_bytes(array(&image[word * stride..]));
        let (fcw, fsw, ftw) = (low(0), low(1), low(2));
        let (fip, fop, fdp) = match format {
            EnvFormat { wide: true, real_mode: false } => {
                let dword = |word: usize| u32::from_le_bytes(array(&image[word * 4..]));
                (dword(3), (dword(4) >> 16) as u16, dword(5))
            }
            EnvFormat { wide: true, real_mode: true } => {
                let dword = |word: usize| u32::from_le_bytes(array(&image[word * 4..]));
                let high = |word: usize| (dword(word) >> 12 & 0xFFFF) << 16;
                (u32::from(low(3)) | high(4), dword(4) as u16, u32::from(low(5)) | high(6))
            }
            EnvFormat { wide: false, real_mode: false } => (u32::from(low(3)), 0, u32::from(low(5))),
            EnvFormat { wide: false, real_mode: true } => {
                let high = |word: usize| u32::from(low(word) >> 12) << 16;
                (u32::from(low(3)) | high(4), low(4), u32::from(low(5)) | high(6))
            }
        };
        Self { fcw, fsw, ftw, fip, fop, fdp }
    }
}

fn load_fields(state: &mut FpState, fields: &Fields) {
    state.set_control_and_status(fields.fcw, fields.fsw);
    let used = (0..8).filter(|i| fields.ftw >> (2 * i) & 3 != 3);
    state.set_ftw_abridged(used.fold(0, |tags, i| tags | 1 << i));
    state.set_fip(u64::from(fields.fip));
    state.set_fop(fields.fop);
    state.set_fdp(u64::from(fields.fdp));
}

fn store_environment(state: &FpState, image: &mut [u8], format: EnvFormat) {
    let (fip, fdp, fop) = (state.fip() as u32, state.fdp() as u32, u32::from(state.fop()));
    let control = [state.fcw(), state.fsw(), full_tag_word(state)];
    let pointers = match format {
        EnvFormat { wide: true, real_mode: false } => [fip, fop << 16, fdp, 0xFFFF_0000],
        EnvFormat { wide: true, real_mode: true } => {
            [0xFFFF_0000 | fip & 0xFFFF, (fip >> 16) << 12 | fop, 0xFFFF_0000 | fdp & 0xFFFF, (fdp >> 16) << 12]
        }
        EnvFormat { wide: false, real_mode: false } => [fip, 0, fdp, 0],
        EnvFormat { wide: false, real_mode: true } => [fip, (fip >> 16) << 12 | fop, fdp, (fdp >> 16) << 12],
    };
    let words = control.map(|word| 0xFFFF_0000 | u32::from(word));
    let stride = format.bytes() / 7;
    for (index, word) in words.iter().chain(&pointers).enumerate() {
        image[index * stride..][..stride].copy_from_slice(&word.to_le_bytes()[..stride]);
    }
}

/// The 16-bit tag word: the abridged one says empty or not, the registers say the rest.
pub fn full_tag_word(state: &FpState) -> u16 {
    let top = usize::from(state.top());
    (0..8).fold(0, |tags, physical| {
        let used = state.ftw_abridged() >> physical & 1 != 0;
        let tag = if used { tag_of(state, (physical + 8 - top) & 7) } else { 3 };
        tags | tag << (2 * physical)
    })
}

/// 0 valid, 1 zero, 2 special (NaN, infinity, denormal, unsupported).
fn tag_of(state: &FpState, slot: usize) -> u16 {
    let at = ST + 16 * slot;
    let significand = u64::from_le_bytes(array(&state.bytes()[at..at + 8]));
    match (state.u16_at(at + 8) & 0x7FFF, significand) {
        (0, 0) => 1,
        (0 | 0x7FFF, _) => 2,
        (_, normal) if normal >> 63 != 0 => 0,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROTECTED_32: EnvFormat = EnvFormat { wide: true, real_mode: false };

    /// 1.0, pi, 0, infinity pushed in this order.
    fn sample() -> FpState {
        let mut state = FpState::initial();
        state.set_fsw(4 << 11);
        state.set_ftw_abridged(0xF0);
        state.set_st(3, [0, 0, 0, 0, 0, 0, 0, 0x80, 0xFF, 0x3F]);
        state.set_st(2, [0x35, 0xC2, 0x68, 0x21, 0xA2, 0xDA, 0x0F, 0xC9, 0x00, 0x40]);
        state.set_st(0, [0, 0, 0, 0, 0, 0, 0, 0x80, 0xFF, 0x7F]);
        state.set_fip(0xABCD_1234);
        state
    }

    #[test]
    fn full_tag_word_tells_valid_zero_special_and_empty_apart() {
        assert_eq!(full_tag_word(&sample()), 0b00_00_01_10_11_11_11_11);
    }

    #[test]
    fn fnstenv_stores_the_hosts_layout_and_masks_exceptions() {
        let mut state = sample();
        state.set_fcw(0x0340);
        let mut image = [0; 28];

        fnstenv(&mut state, &mut image, PROTECTED_32);

        let words: Vec<u32> = image.chunks(4).map(|c| u32::from_le_bytes(array(c))).collect();
        let expected = [0xFFFF_0340, 0xFFFF_2000, 0xFFFF_06FF, 0xABCD_1234, 0, 0, 0xFFFF_0000];
        assert_eq!(words, expected);
        assert_eq!(state.fcw(), 0x037F);
    }

    #[test]
    fn fnsave_then_frstor_returns_the_same_state_in_every_layout() {
        for (wide, real_mode) in [(false, false), (false, true), (true, false), (true, true)] {
            let format = EnvFormat { wide, real_mode };
            let mut state = sample();
            state.set_fip(0x1234);
            let before = state.clone();
            let mut image = [0; 108];

            fnsave(&mut state, &mut image, format);
            assert_eq!((state.fcw(), state.fsw(), state.ftw_abridged()), (0x037F, 0, 0));
            frstor(&mut state, &image, format);

            assert_eq!(state.bytes()[..512], before.bytes()[..512], "{format:?}");
        }
    }

    #[test]
    fn fldenv_changing_top_keeps_physical_registers() {
        let mut state = sample();
        let pi = state.st(2); // physical 6
        let mut image = [0; 28];
        fnstenv(&mut state, &mut image, PROTECTED_32);
        image[5] = 6 << 3;

        fldenv(&mut state, &image, PROTECTED_32);

        assert_eq!((state.top(), state.st(0)), (6, pi));
    }
}

//! FXSAVE and FXRSTOR images (SDM volume 1, 10.5.1): 512 bytes in two layouts of the pointers.
//!
//! Left out on purpose: AMD's fast FXSAVE (EFER.FFXSR), which the guest CPU models do not offer.

use super::fpstate::{array, mxcsr_is_valid, FpState, MXCSR_MASK, XMM};

/// Bytes of an image; the last 48 belong to software and are never written.
pub const FXSAVE_BYTES: usize = 512;
/// Bytes FXSAVE writes at most.
pub const FXSAVE_WRITTEN: usize = 416;

/// Which of the layouts of the legacy region an instruction uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// REX.W: 64-bit FIP and FDP instead of 32-bit offsets with selectors.
    pub wide_pointers: bool,
    /// 64-bit mode: XMM8 to XMM15 take part.
    pub sixteen_registers: bool,
}

impl Format {
    /// Bytes of the XMM registers that take part.
    pub(super) fn xmm_bytes(self) -> usize {
        if self.sixteen_registers {
            256
        } else {
            128
        }
    }
}

/// The image is one for which the instruction raises #GP(0); nothing was loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the state image sets bits that the CPU must refuse")]
pub struct BadImage;

/// FXSAVE: writes the state to the image's first 416 bytes (288 outside 64-bit mode).
pub fn fxsave(state: &FpState, image: &mut [u8], format: Format) {
    save_x87(state, image, format);
    save_mxcsr(state, image);
    save_xmm(state, image, format);
}

/// FXRSTOR: all or nothing.
pub fn fxrstor(state: &mut FpState, image: &[u8], format: Format) -> Result<(), BadImage> {
    let mxcsr = u32::from_le_bytes(array(&image[24..28]));
    if !mxcsr_is_valid(mxcsr) {
        return Err(BadImage);
    }
    load_x87(state, image, format);
    state.set_mxcsr(mxcsr);
    load_xmm(state, image, format);
    Ok(())
}

/// The x87 part: bytes 0 to 23 and 32 to 159. Selectors are written as zero (CPUID bit
/// "FCS and FDS deprecated").
pub(super) fn save_x87(state: &FpState, image: &mut [u8], format: Format) {
    image[..24].copy_from_slice(&state.bytes()[..24]);
    if !format.wide_pointers {
        image[12..16].fill(0);
        image[20..24].fill(0);
    }
    image[32..160].copy_from_slice(&state.bytes()[32..160]);
}

pub(super) fn load_x87(state: &mut FpState, image: &[u8], format: Format) {
    state.set_control_and_status(u16::from_le_bytes(array(&image[0..2])), u16::from_le_bytes(array(&image[2..4])));
    state.set_ftw_abridged(image[4]);
    state.set_fop(u16::from_le_bytes(array(&image[6..8])));
    let pointer_mask = if format.wide_pointers { u64::MAX } else { 0xFFFF_FFFF };
    state.set_fip(u64::from_le_bytes(array(&image[8..16])) & pointer_mask);
    state.set_fdp(u64::from_le_bytes(array(&image[16..24])) & pointer_mask);
    for index in 0..8 {
        let at = 32 + 16 * index;
        state.set_st(index, array(&image[at..at + 10]));
    }
}

/// MXCSR and its mask: bytes 24 to 31.
pub(super) fn save_mxcsr(state: &FpState, image: &mut [u8]) {
    image[24..28].copy_from_slice(&state.mxcsr().to_le_bytes());
    image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
}

/// The XMM registers the mode has.
pub(super) fn save_xmm(state: &FpState, image: &mut [u8], format: Format) {
    let range = XMM..XMM + format.xmm_bytes();
    image[range.clone()].copy_from_slice(&state.bytes()[range]);
}

pub(super) fn load_xmm(state: &mut FpState, image: &[u8], format: Format) {
    let range = XMM..XMM + format.xmm_bytes();
    state.bytes_mut()[range.clone()].copy_from_slice(&image[range]);
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Format = Format { wide_pointers: true, sixteen_registers: true };
    const LEGACY: Format = Format { wide_pointers: false, sixteen_registers: false };

    fn sample() -> FpState {
        let mut state = FpState::initial();
        state.set_fcw(0x027F);
        state.set_fsw(0x2841);
        state.set_ftw_abridged(0xE0);
        state.set_fop(0x0144);
        state.set_fip(0x0000_7FFF_1234_5678);
        state.set_fdp(0xFFFF_8000_9ABC_DEF0);
        state.set_mxcsr(0x9FC1);
        (0..16).for_each(|i| state.set_xmm(i, 0x1111_1111_1111_1111_1111 * (i as u128 + 1)));
        (0..8).for_each(|i| state.set_st(i, [i as u8 + 1; 10]));
        state
    }

    #[test]
    fn fxsave_then_fxrstor_returns_the_same_state() {
        let state = sample();
        let mut image = [0xAA; FXSAVE_BYTES];
        fxsave(&state, &mut image, LONG);
        let mut loaded = FpState::new();

        fxrstor(&mut loaded, &image, LONG).expect("a valid image");

        assert_eq!(loaded.bytes()[..512], state.bytes()[..512]);
        assert!(image[FXSAVE_WRITTEN..].iter().all(|&b| b == 0xAA));
    }

    #[test]
    fn fxsave_outside_long_mode_writes_eight_registers_and_short_pointers() {
        let state = sample();
        let mut image = [0xAA; FXSAVE_BYTES];

        fxsave(&state, &mut image, LEGACY);

        assert_eq!(image[8..16], 0x1234_5678_u64.to_le_bytes());
        assert_eq!(image[16..24], 0x9ABC_DEF0_u64.to_le_bytes());
        assert!(image[288..].iter().all(|&b| b == 0xAA));
    }

    #[test]
    fn fxrstor_with_reserved_mxcsr_bit_is_refused_and_loads_nothing() {
        let mut image = [0; FXSAVE_BYTES];
        image[26] = 1;
        let mut state = sample();

        assert_eq!(fxrstor(&mut state, &image, LONG), Err(BadImage));

        assert_eq!(state.bytes(), sample().bytes());
    }

    #[test]
    fn fxsave_equals_the_hosts_for_a_state_the_host_loaded() {
        #[repr(align(16))]
        struct Image([u8; FXSAVE_BYTES]);
        let mut guest = Image([0; FXSAVE_BYTES]);
        fxsave(&sample(), &mut guest.0, LONG);
        guest.0[2..4].copy_from_slice(&0xFFFF_u16.to_le_bytes());
        let mut host = Image([0; FXSAVE_BYTES]);
        let mut mxcsr = 0_u32;
        // SAFETY: both images are 16-byte aligned and 512 bytes long, MXCSR in `guest` is valid, the
        // XMM registers are declared clobbered, and x87 and MXCSR are put back to the ABI's state.
        unsafe {
            std::arch::asm!(
                "stmxcsr [{csr}]", "fxrstor64 [{from}]", "fxsave64 [{to}]", "fninit", "ldmxcsr [{csr}]",
                csr = in(reg) &raw mut mxcsr, from = in(reg) &raw const guest, to = in(reg) &raw mut host,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            );
        }
        let mut state = FpState::new();
        fxrstor(&mut state, &guest.0, LONG).expect("a valid image");
        let mut ours = Image([0; FXSAVE_BYTES]);

        fxsave(&state, &mut ours.0, LONG);

        assert_eq!(ours.0[..FXSAVE_WRITTEN], host.0[..FXSAVE_WRITTEN]);
    }
}

//! How many bits of its last instruction's offset the host's x87 unit keeps: as many as its linear addresses
//! can have, 48 or, on processors with five-level paging, 57 (SDM volume 1, 8.1.8 and volume 3, 4.5), whatever
//! CPUID says of the latter to a guest. Found by asking the unit.

use super::fpstate::{FCW_INIT, MXCSR, MXCSR_INIT};
use std::sync::OnceLock;

/// Bytes of an FXSAVE image, and where the offset is in it.
const IMAGE: usize = 512;
const FIP: usize = 8;

#[repr(align(16))]
struct Image([u8; IMAGE]);

/// 48 or 57.
#[inline]
pub fn offset_bits() -> u32 {
    static BITS: OnceLock<u32> = OnceLock::new();
    *BITS.get_or_init(|| if keeps(1 << 48) { 57 } else { 48 })
}

/// Whether an offset goes through the unit unchanged.
fn keeps(offset: u64) -> bool {
    let (mut own, mut seen, mut asked) = (Image([0; IMAGE]), Image([0; IMAGE]), Image([0; IMAGE]));
    asked.0[..2].copy_from_slice(&FCW_INIT.to_le_bytes());
    asked.0[MXCSR..MXCSR + 4].copy_from_slice(&MXCSR_INIT.to_le_bytes());
    asked.0[FIP..FIP + 8].copy_from_slice(&offset.to_le_bytes());
    // SAFETY: the images are as large and as aligned as the instructions demand, the one that is asked has
    // valid control words, and the unit's own state is back at the end, vector registers included.
    unsafe {
        std::arch::asm!(
            "fxsave64 [{own}]", "fxrstor64 [{asked}]", "fxsave64 [{seen}]", "fxrstor64 [{own}]",
            own = in(reg) own.0.as_mut_ptr(), asked = in(reg) asked.0.as_ptr(), seen = in(reg) seen.0.as_mut_ptr(),
            options(nostack, preserves_flags),
        );
    }
    seen.0[FIP..FIP + 8] == offset.to_le_bytes()
}

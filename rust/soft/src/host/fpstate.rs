//! The guest's x87, MMX, SSE and AVX state in the XSAVE *standard* format (SDM volume 1, 13.4).
//!
//! Invariant: the bytes are always an image that the host's FXRSTOR accepts. MXCSR has no reserved
//! bit set, FCW and FSW hold only what the hardware can hold, and FSW.ES agrees with the flags and
//! masks. Every setter keeps it, so a thunk may load the image without a check.
//!
//! ST slots are in *stack* order (slot 0 is ST(0)), MMX registers in *physical* order; the two agree
//! only while TOP is 0. Whatever moves TOP without running on the host must therefore turn the slots
//! ([`FpState::set_top_keeping_registers`]).
//!
//! The XSAVE header is not kept up to date here: XSTATE_BV is computed when an image is written.

use super::pointer::offset_bits;

/// Bytes of the state; the AVX component ends at 832, the rest is room.
pub const STATE_BYTES: usize = 1024;
/// MXCSR bits a guest may set; also the mask FXSAVE reports.
pub const MXCSR_MASK: u32 = 0xFFFF;
/// MXCSR after reset: all exceptions masked, round to nearest.
pub const MXCSR_INIT: u32 = 0x1F80;
/// FCW after FNINIT.
pub const FCW_INIT: u16 = 0x037F;
/// FCW after a hardware reset (not INIT, which leaves the state alone).
pub const FCW_RESET: u16 = 0x0040;

/// FSW exception flags IE, DE, ZE, OE, UE, PE.
pub const FSW_FLAGS: u16 = 0x003F;
/// FSW exception summary.
pub const FSW_ES: u16 = 1 << 7;
/// FSW busy: a copy of ES.
pub const FSW_B: u16 = 1 << 15;
const FSW_TOP_SHIFT: u16 = 11;
const FSW_TOP: u16 = 7 << FSW_TOP_SHIFT;
/// FCW bits that exist: masks, precision, rounding, infinity control.
const FCW_WRITABLE: u16 = 0x1F3F;
/// FCW bit 6 has no function and reads as one.
const FCW_FIXED: u16 = 0x0040;

const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;
/// Offset of MXCSR; thunks address it directly.
pub const MXCSR: usize = 24;
/// Offset of the first ST/MM slot; slots are 16 bytes, 10 of them used.
pub const ST: usize = 32;
/// Offset of XMM0.
pub const XMM: usize = 160;
/// Offset of the upper half of YMM0.
pub const YMM_HIGH: usize = 576;

/// Extended state of one vCPU; the layout is that of an XSAVE area in standard format.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct FpState {
    bytes: [u8; STATE_BYTES],
}

impl Default for FpState {
    fn default() -> Self {
        Self::new()
    }
}

impl FpState {
    /// State after a hardware reset.
    pub fn new() -> Self {
        let mut state = Self { bytes: [0; STATE_BYTES] };
        state.put_u16(FCW, FCW_RESET);
        // Reset leaves every tag at "zero", that is: valid.
        state.bytes[FTW] = 0xFF;
        state.put_u32(MXCSR, MXCSR_INIT);
        state
    }

    /// State after XRSTOR of nothing: what Linux calls the init state.
    pub fn initial() -> Self {
        let mut state = Self { bytes: [0; STATE_BYTES] };
        state.put_u16(FCW, FCW_INIT);
        state.put_u32(MXCSR, MXCSR_INIT);
        state
    }

    /// The raw image.
    pub fn bytes(&self) -> &[u8; STATE_BYTES] {
        &self.bytes
    }

    /// Raw access for the modules that parse images; they keep the invariant of this file.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8; STATE_BYTES] {
        &mut self.bytes
    }

    pub(super) fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    fn u32_at(&self, offset: usize) -> u32 {
        u32::from_le_bytes(array(&self.bytes[offset..offset + 4]))
    }

    fn u64_at(&self, offset: usize) -> u64 {
        u64::from_le_bytes(array(&self.bytes[offset..offset + 8]))
    }

    fn put_u16(&mut self, offset: usize, value: u16) {
        self.bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn put_u32(&mut self, offset: usize, value: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn put_u64(&mut self, offset: usize, value: u64) {
        self.bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// x87 control word.
    #[inline]
    pub fn fcw(&self) -> u16 {
        self.u16_at(FCW)
    }

    /// x87 status word, with TOP.
    #[inline]
    pub fn fsw(&self) -> u16 {
        self.u16_at(FSW)
    }

    /// Loads control and status word as FXRSTOR does: reserved bits are dropped and ES and B follow
    /// from flags and masks. TOP changes without moving the slots.
    pub fn set_control_and_status(&mut self, fcw: u16, fsw: u16) {
        let fcw = fcw & FCW_WRITABLE | FCW_FIXED;
        let mut fsw = fsw & !(FSW_ES | FSW_B);
        if fsw & !fcw & FSW_FLAGS != 0 {
            fsw |= FSW_ES | FSW_B;
        }
        self.put_u16(FCW, fcw);
        self.put_u16(FSW, fsw);
    }

    /// FLDCW.
    pub fn set_fcw(&mut self, fcw: u16) {
        self.set_control_and_status(fcw, self.fsw());
    }

    /// Replaces the status word; see [`Self::set_control_and_status`].
    pub fn set_fsw(&mut self, fsw: u16) {
        self.set_control_and_status(self.fcw(), fsw);
    }

    /// Top of stack: the physical register that is ST(0).
    #[inline]
    pub fn top(&self) -> u8 {
        ((self.fsw() & FSW_TOP) >> FSW_TOP_SHIFT) as u8
    }

    /// Moves TOP while every physical register keeps its value.
    pub fn set_top_keeping_registers(&mut self, top: u8) {
        let turn = usize::from(top.wrapping_sub(self.top()) & 7);
        self.bytes[ST..ST + 128].rotate_left(turn * 16);
        let fsw = self.fsw() & !FSW_TOP | u16::from(top & 7) << FSW_TOP_SHIFT;
        self.put_u16(FSW, fsw);
    }

    /// Abridged tag word: bit *i* set means *physical* register *i* is in use.
    #[inline]
    pub fn ftw_abridged(&self) -> u8 {
        self.bytes[FTW]
    }

    /// Sets the abridged tag word.
    #[inline]
    pub fn set_ftw_abridged(&mut self, tags: u8) {
        self.bytes[FTW] = tags;
    }

    /// Opcode of the last instruction with an unmasked x87 exception (11 bits).
    pub fn fop(&self) -> u16 {
        self.u16_at(FOP)
    }

    /// Sets the last opcode.
    pub fn set_fop(&mut self, opcode: u16) {
        self.put_u16(FOP, opcode & 0x07FF);
    }

    /// Offset of the last x87 instruction that was not a control instruction.
    pub fn fip(&self) -> u64 {
        self.u64_at(FIP)
    }

    /// Sets the last instruction's offset; as many bits are kept, sign-extended, as the host's own unit keeps
    /// ([`offset_bits`]): an image goes through it and through here.
    #[inline]
    pub fn set_fip(&mut self, offset: u64) {
        self.put_u64(FIP, sign_extended(offset, offset_bits()));
    }

    /// Offset of the memory operand of the last x87 instruction with an unmasked exception.
    pub fn fdp(&self) -> u64 {
        self.u64_at(FDP)
    }

    /// Sets the last operand's offset; unlike FIP it keeps all its bits.
    pub fn set_fdp(&mut self, offset: u64) {
        self.put_u64(FDP, offset);
    }

    /// SSE control and status.
    #[inline]
    pub fn mxcsr(&self) -> u32 {
        self.u32_at(MXCSR)
    }

    /// Sets MXCSR; reserved bits are dropped, because the host would fault on them.
    /// Instructions that must raise #GP for them check with [`mxcsr_is_valid`] before.
    #[inline]
    pub fn set_mxcsr(&mut self, value: u32) {
        self.put_u32(MXCSR, value & MXCSR_MASK);
    }

    /// XMM register `index` (0 to 15).
    #[inline]
    pub fn xmm(&self, index: usize) -> u128 {
        let at = XMM + 16 * (index & 15);
        u128::from_le_bytes(array(&self.bytes[at..at + 16]))
    }

    /// Sets XMM register `index`; the upper half of the YMM register stays.
    #[inline]
    pub fn set_xmm(&mut self, index: usize, value: u128) {
        let at = XMM + 16 * (index & 15);
        self.bytes[at..at + 16].copy_from_slice(&value.to_le_bytes());
    }

    /// Upper half of YMM register `index`.
    pub fn ymm_high(&self, index: usize) -> u128 {
        let at = YMM_HIGH + 16 * (index & 15);
        u128::from_le_bytes(array(&self.bytes[at..at + 16]))
    }

    /// Sets the upper half of YMM register `index`.
    pub fn set_ymm_high(&mut self, index: usize, value: u128) {
        let at = YMM_HIGH + 16 * (index & 15);
        self.bytes[at..at + 16].copy_from_slice(&value.to_le_bytes());
    }

    /// The 80 bits of ST(`index`).
    pub fn st(&self, index: usize) -> [u8; 10] {
        let at = ST + 16 * (index & 7);
        array(&self.bytes[at..at + 10])
    }

    /// Sets the 80 bits of ST(`index`); tags stay.
    pub fn set_st(&mut self, index: usize, value: [u8; 10]) {
        let at = ST + 16 * (index & 7);
        self.bytes[at..at + 10].copy_from_slice(&value);
    }

    /// MMX register `index`: the significand of physical register `index`.
    pub fn mm(&self, index: usize) -> u64 {
        self.u64_at(ST + 16 * self.slot_of_mm(index))
    }

    /// Sets MMX register `index` and its exponent to all ones, as MMX instructions do; TOP and tags
    /// stay.
    pub fn set_mm(&mut self, index: usize, value: u64) {
        let at = ST + 16 * self.slot_of_mm(index);
        self.put_u64(at, value);
        self.put_u16(at + 8, 0xFFFF);
    }

    fn slot_of_mm(&self, index: usize) -> usize {
        (index + 8 - usize::from(self.top())) & 7
    }

    /// What every MMX instruction but EMMS does first: TOP becomes 0 and all tags valid.
    #[inline]
    pub fn enter_mmx(&mut self) {
        if self.top() != 0 {
            self.set_top_keeping_registers(0);
        }
        self.bytes[FTW] = 0xFF;
    }

    /// FNINIT: the data registers keep their values.
    pub fn fninit(&mut self) {
        self.set_top_keeping_registers(0);
        self.bytes[..ST - 8].fill(0);
        self.put_u16(FCW, FCW_INIT);
    }

    /// FNCLEX: clears the exception flags, SF, ES and B.
    pub fn fnclex(&mut self) {
        let fsw = self.fsw() & !(FSW_FLAGS | 1 << 6 | FSW_ES | FSW_B);
        self.put_u16(FSW, fsw);
    }
}

/// Whether an unmasked x87 exception waits for the next waiting x87 or MMX instruction (#MF).
#[inline]
pub fn x87_pending(state: &FpState) -> bool {
    state.fsw() & FSW_ES != 0
}

/// Whether MXCSR may hold `value`; if not, LDMXCSR, FXRSTOR and XRSTOR raise #GP(0).
#[inline]
pub fn mxcsr_is_valid(value: u32) -> bool {
    value & !MXCSR_MASK == 0
}

/// Sign-extends the lowest `bits` of an offset.
fn sign_extended(offset: u64, bits: u32) -> u64 {
    let above = 64 - bits;
    ((offset << above) as i64 >> above) as u64
}

/// The first `N` bytes of a slice that is at least that long.
pub(super) fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[..N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_fcw_unmasking_a_raised_flag_sets_the_summary() {
        let mut state = FpState::initial();
        state.set_fsw(0x0001);
        assert!(!x87_pending(&state));

        state.set_fcw(0x0340);

        assert_eq!((state.fcw(), state.fsw()), (0x0340, 0x8081));
        assert!(x87_pending(&state));
    }

    #[test]
    fn set_control_and_status_with_all_ones_keeps_what_hardware_keeps() {
        let mut state = FpState::initial();

        state.set_control_and_status(0xFFFF, 0xFFFF);

        assert_eq!((state.fcw(), state.fsw()), (0x1F7F, 0x7F7F));
    }

    #[test]
    fn fninit_with_top_not_zero_keeps_physical_registers() {
        let mut state = FpState::initial();
        state.set_fsw(3 << 11);
        state.set_st(0, [3; 10]); // physical 3

        state.fninit();

        assert_eq!(state.st(3), [3; 10]);
        assert_eq!((state.fcw(), state.fsw(), state.ftw_abridged()), (FCW_INIT, 0, 0));
    }

    #[test]
    fn mm_is_the_physical_register_whatever_top_is() {
        let mut state = FpState::initial();
        state.set_fsw(5 << 11);
        state.set_mm(6, 0x1122_3344_5566_7788);

        assert_eq!(state.st(1)[..8], 0x1122_3344_5566_7788_u64.to_le_bytes());
        state.enter_mmx();
        assert_eq!(state.mm(6), 0x1122_3344_5566_7788);
        assert_eq!((state.top(), state.ftw_abridged()), (0, 0xFF));
    }

    #[test]
    fn set_mxcsr_drops_reserved_bits() {
        let mut state = FpState::new();

        state.set_mxcsr(0xFFFF_FFFF);

        assert_eq!(state.mxcsr(), 0xFFFF);
    }

    #[test]
    fn set_fip_sign_extends_what_the_host_keeps() {
        assert_eq!(sign_extended(0xFFFF_12FF_FFFF_FF01, 48), 0x0000_12FF_FFFF_FF01);
        assert_eq!(sign_extended(0x1234_92FF_FFFF_FF01, 48), 0xFFFF_92FF_FFFF_FF01);
        assert_eq!(sign_extended(0x1234_92FF_FFFF_FF01, 57), 0x0034_92FF_FFFF_FF01);
        let mut state = FpState::new();

        state.set_fip(0x1234_92FF_FFFF_FF01);

        assert_eq!(state.fip(), sign_extended(0x1234_92FF_FFFF_FF01, offset_bits()));
    }
}

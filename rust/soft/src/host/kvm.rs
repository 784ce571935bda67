//! The extended state as KVM's structures: `kvm_fpu`, and `kvm_xsave`'s region (api.rst, KVM_GET_FPU
//! and KVM_GET_XSAVE). Setting validates as the instructions do, because a state may come from
//! anywhere.

use kvm_bindings::kvm_fpu;

use super::fpstate::{mxcsr_is_valid, FpState};
use super::fxsave::{BadImage, Format};
use super::xsave::{xrstor, xsave, Restore, Save, SSE, X87};

/// Bytes of `kvm_xsave`.
pub const KVM_XSAVE_BYTES: usize = 4096;
const LONG: Format = Format { wide_pointers: true, sixteen_registers: true };

/// KVM_GET_FPU. `ftwx` is the abridged tag word, `fpr` in stack order.
pub fn get_fpu(state: &FpState) -> kvm_fpu {
    let mut fpu = kvm_fpu {
        fcw: state.fcw(),
        fsw: state.fsw(),
        ftwx: state.ftw_abridged(),
        last_opcode: state.fop(),
        last_ip: state.fip(),
        last_dp: state.fdp(),
        mxcsr: state.mxcsr(),
        ..kvm_fpu::default()
    };
    for (index, register) in fpu.fpr.iter_mut().enumerate() {
        register[..10].copy_from_slice(&state.st(index));
    }
    for (index, register) in fpu.xmm.iter_mut().enumerate() {
        *register = state.xmm(index).to_le_bytes();
    }
    fpu
}

/// KVM_SET_FPU; refuses reserved MXCSR bits. The upper halves of YMM registers stay.
pub fn set_fpu(state: &mut FpState, fpu: &kvm_fpu) -> Result<(), BadImage> {
    if !mxcsr_is_valid(fpu.mxcsr) {
        return Err(BadImage);
    }
    state.set_control_and_status(fpu.fcw, fpu.fsw);
    state.set_ftw_abridged(fpu.ftwx);
    state.set_fop(fpu.last_opcode);
    state.set_fip(fpu.last_ip);
    state.set_fdp(fpu.last_dp);
    state.set_mxcsr(fpu.mxcsr);
    for (index, register) in fpu.fpr.iter().enumerate() {
        state.set_st(index, super::fpstate::array(register));
    }
    for (index, register) in fpu.xmm.iter().enumerate() {
        state.set_xmm(index, u128::from_le_bytes(*register));
    }
    Ok(())
}

/// KVM_GET_XSAVE: standard format with every component of `supported`, whatever the guest's XCR0.
pub fn get_xsave(state: &FpState, supported: u64) -> [u8; KVM_XSAVE_BYTES] {
    let mut region = [0; KVM_XSAVE_BYTES];
    xsave(state, &mut region, supported | X87 | SSE, LONG, Save::Plain);
    region
}

/// KVM_SET_XSAVE: components missing from XSTATE_BV take their initial values.
pub fn set_xsave(state: &mut FpState, region: &[u8; KVM_XSAVE_BYTES], supported: u64) -> Result<(), BadImage> {
    let components = supported | X87 | SSE;
    xrstor(state, region, components, components, LONG, Restore::User)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> FpState {
        let mut state = FpState::initial();
        state.set_control_and_status(0x027F, 0x2841);
        state.set_ftw_abridged(0xE0);
        state.set_fip(0x1234);
        state.set_mxcsr(0x9FC1);
        (0..8).for_each(|i| state.set_st(i, [i as u8 + 1; 10]));
        (0..16).for_each(|i| state.set_xmm(i, 0x1111_1111 * (i as u128 + 1)));
        state
    }

    #[test]
    fn fpu_got_and_set_is_the_same_state() {
        let mut state = FpState::new();

        set_fpu(&mut state, &get_fpu(&sample())).expect("a valid state");

        assert_eq!(state.bytes(), sample().bytes());
    }

    #[test]
    fn xsave_got_and_set_is_the_same_state() {
        let mut state = FpState::new();

        set_xsave(&mut state, &get_xsave(&sample(), 7), 7).expect("a valid state");

        assert_eq!(state.bytes(), sample().bytes());
    }

    #[test]
    fn reserved_mxcsr_bits_are_refused_and_nothing_changes() {
        let fpu = kvm_fpu { mxcsr: 0x8000_1F80, ..get_fpu(&FpState::initial()) };
        let mut region = get_xsave(&FpState::initial(), 3);
        region[27] = 0x80;
        let mut state = sample();

        assert_eq!(set_fpu(&mut state, &fpu), Err(BadImage));
        assert_eq!(set_xsave(&mut state, &region, 3), Err(BadImage));

        assert_eq!(state.bytes(), sample().bytes());
    }
}

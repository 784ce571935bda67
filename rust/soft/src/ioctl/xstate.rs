//! Extended state: KVM_GET/SET_FPU, XSAVE, XCRS.

use super::{get, get_at, put, put_at, Answer};
use crate::cpu::Cpu;
use crate::host::fpstate::YMM_HIGH;
use crate::host::kvm::{self, KVM_XSAVE_BYTES};
use crate::host::xsave::{xcr0_is_valid, COMPONENTS};
use kvm_bindings::{kvm_xcr, kvm_xcrs};

/// Where XSTATE_BV lies in an image.
const XSTATE_BV: usize = 512;
/// Behind the last component the engine has.
const COMPONENTS_END: usize = YMM_HIGH + 256;

/// KVM_GET_FPU.
pub(crate) fn get_fpu(cpu: &Cpu, arg: &mut [u8]) -> Answer {
    put(arg, &kvm::get_fpu(&cpu.fp))
}

/// KVM_SET_FPU.
pub(crate) fn set_fpu(cpu: &mut Cpu, arg: &[u8]) -> Answer {
    kvm::set_fpu(&mut cpu.fp, &get(arg)?).map_err(|_| libc::EINVAL)?;
    Ok(0)
}

/// KVM_GET_XSAVE and KVM_GET_XSAVE2.
pub(crate) fn get_xsave(cpu: &Cpu, arg: &mut [u8]) -> Answer {
    let region = arg.get_mut(..KVM_XSAVE_BYTES).ok_or(libc::EFAULT)?;
    region.copy_from_slice(&kvm::get_xsave(&cpu.fp, COMPONENTS));
    Ok(0)
}

/// KVM_SET_XSAVE. An image from another host may say that components are in use which the guest's
/// model does not have (KVM's says so of PKRU): without content they are no loss.
pub(crate) fn set_xsave(cpu: &mut Cpu, arg: &[u8]) -> Answer {
    let region = arg.get(..KVM_XSAVE_BYTES).and_then(|region| region.try_into().ok()).ok_or(libc::EFAULT)?;
    let mut region: [u8; KVM_XSAVE_BYTES] = region;
    if region[COMPONENTS_END..].iter().all(|&byte| byte == 0) {
        let known = get_at::<u64>(&region, XSTATE_BV)? & COMPONENTS;
        put_at(&mut region, XSTATE_BV, &known)?;
    }
    kvm::set_xsave(&mut cpu.fp, &region, COMPONENTS).map_err(|_| libc::EINVAL)?;
    Ok(0)
}

/// KVM_GET_XCRS.
pub(crate) fn get_xcrs(cpu: &Cpu, arg: &mut [u8]) -> Answer {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: cpu.xcr0 };
    put(arg, &xcrs)
}

/// KVM_SET_XCRS: only XCR0 is looked at, as in KVM.
pub(crate) fn set_xcrs(cpu: &mut Cpu, arg: &[u8]) -> Answer {
    let xcrs: kvm_xcrs = get(arg)?;
    if xcrs.flags != 0 || xcrs.nr_xcrs as usize > xcrs.xcrs.len() {
        return Err(libc::EINVAL);
    }
    let given = xcrs.xcrs[..xcrs.nr_xcrs as usize].iter().find(|xcr| xcr.xcr == 0);
    if let Some(xcr) = given {
        if !xcr0_is_valid(xcr.value, COMPONENTS) {
            return Err(libc::EINVAL);
        }
        cpu.xcr0 = xcr.value;
    }
    Ok(0)
}

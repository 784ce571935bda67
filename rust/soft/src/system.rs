//! What `/dev/kvm` answers.

use crate::clock::host_tsc_khz;
use crate::ioctl::requests::*;
use crate::ioctl::{caps, cpuid, int, msrs, put, Answer};
use crate::vcpu::RUN_PAGE_BYTES;
use crate::vm::Vm;
use kvm_bindings::KVM_API_VERSION;

/// Plays `/dev/kvm`.
pub struct System {
    host_khz: u32,
}

impl Default for System {
    fn default() -> Self {
        Self::new()
    }
}

impl System {
    /// Looks at the host.
    pub fn new() -> Self {
        crate::cpu::table::prepare();
        Self { host_khz: host_tsc_khz() }
    }

    /// One request; `arg` holds its structure and is updated in place. Errors are errno values.
    pub fn ioctl(&self, request: u32, arg: &mut [u8]) -> Answer {
        match request {
            KVM_GET_API_VERSION => Ok(KVM_API_VERSION as i64),
            KVM_CHECK_EXTENSION => Ok(caps::check(int(arg)?)),
            KVM_GET_VCPU_MMAP_SIZE => Ok(RUN_PAGE_BYTES as i64),
            KVM_GET_SUPPORTED_CPUID => cpuid::supported(arg, self.host_khz),
            KVM_GET_MSR_INDEX_LIST => msrs::saved(arg),
            KVM_GET_MSR_FEATURE_INDEX_LIST => msrs::features(arg),
            KVM_GET_MSRS => msrs::get_features(arg),
            KVM_X86_GET_MCE_CAP_SUPPORTED => put(arg, &crate::mce::SUPPORTED),
            _ => Err(libc::EINVAL),
        }
    }

    /// KVM_CREATE_VM.
    pub fn create_vm(&self) -> Vm {
        Vm::new(self.host_khz)
    }
}

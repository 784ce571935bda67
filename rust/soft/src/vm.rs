//! A virtual machine: memory slots, interrupt hardware, clock, vCPUs.

use crate::vcpu::Vcpu;

/// A virtual machine; clones are handles on the same one.
#[derive(Clone)]
pub struct Vm {}

impl Vm {
    /// One request; `arg` holds its structure and is updated in place. Errors are errno values.
    pub fn ioctl(&self, _request: u32, _arg: &mut [u8]) -> Result<i64, i32> {
        Err(libc::ENOTTY)
    }

    /// KVM_CREATE_VCPU.
    pub fn create_vcpu(&self, _id: u32) -> Result<Vcpu, i32> {
        Err(libc::ENOTTY)
    }

    /// The host wrote `[gpa, gpa + size)`: code decoded from there is forgotten.
    pub fn invalidate(&self, _gpa: u64, _size: u64) {}
}

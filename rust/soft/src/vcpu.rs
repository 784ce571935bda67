//! A virtual CPU as user space drives it: `run` and the shared `kvm_run` page.

/// A virtual CPU; clones are handles on the same one. Every method may be called from any thread;
/// requests wait while `run` runs.
#[derive(Clone)]
pub struct Vcpu {}

impl Vcpu {
    /// One request; `arg` holds its structure and is updated in place. Errors are errno values.
    pub fn ioctl(&self, _request: u32, _arg: &mut [u8]) -> Result<i64, i32> {
        Err(libc::EINVAL)
    }

    /// KVM_RUN: `Ok` with an exit in the page, `Err(EINTR)` when kicked.
    pub fn run(&self) -> Result<(), i32> {
        Err(libc::EINTR)
    }

    /// `struct kvm_run` and the port-data page behind it: address and bytes. They live as long as
    /// any handle on this vCPU.
    pub fn run_page(&self) -> (*mut u8, usize) {
        (std::ptr::null_mut(), 0)
    }

    /// Makes the running `run`, or else the next, return EINTR.
    pub fn kick(&self) {}
}

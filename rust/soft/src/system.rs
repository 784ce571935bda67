//! What `/dev/kvm` answers.

use crate::vm::Vm;

/// Plays `/dev/kvm`.
#[derive(Default)]
pub struct System {}

impl System {
    /// Looks at the host.
    pub fn new() -> Self {
        Self::default()
    }

    /// One request; `arg` holds its structure and is updated in place. Errors are errno values.
    pub fn ioctl(&self, _request: u32, _arg: &mut [u8]) -> Result<i64, i32> {
        Err(libc::EINVAL)
    }

    /// KVM_CREATE_VM.
    pub fn create_vm(&self) -> Vm {
        Vm {}
    }
}

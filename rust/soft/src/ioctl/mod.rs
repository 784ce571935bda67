//! KVM's requests: their numbers, and how they read and write KVM's structures.
//!
//! A request is a number and a byte buffer. The buffer comes from user space and is not trusted:
//! it may be short, and every field is checked by the request that uses it. Errors are errno
//! values, those that Documentation/virt/kvm/api.rst or the kernel's own code give.

pub(crate) mod caps;
pub(crate) mod cpuid;
pub(crate) mod events;
pub(crate) mod irq;
pub(crate) mod memory;
pub(crate) mod msrs;
pub(crate) mod regs;
pub mod requests;
pub(crate) mod sregs;
pub(crate) mod xstate;

use kvm_bindings::*;
use std::mem::size_of;

/// An errno value.
pub type Errno = i32;
/// What a request gives.
pub type Answer<T = i64> = Result<T, Errno>;

/// KVM structures: any bytes are valid, and they have no padding that is not a field.
///
/// # Safety
/// Implement it only for such types.
pub(crate) unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($name:ty),* $(,)?) => {
        // SAFETY: integers, arrays and unions of them, laid out by the kernel with named padding.
        $(unsafe impl Plain for $name {})*
    };
}
plain!(
    u32,
    u64,
    kvm_regs,
    kvm_sregs,
    kvm_sregs2,
    kvm_fpu,
    kvm_xcrs,
    kvm_msr_entry,
    kvm_cpuid_entry2,
    kvm_debugregs,
    kvm_vcpu_events,
    kvm_mp_state,
    kvm_guest_debug,
    kvm_translation,
    kvm_interrupt,
    kvm_lapic_state,
    kvm_userspace_memory_region,
    kvm_dirty_log,
    kvm_clear_dirty_log,
    kvm_enable_cap,
    kvm_clock_data,
    kvm_irq_level,
    kvm_irqfd,
    kvm_ioeventfd,
    kvm_msi,
    kvm_x86_mce,
    kvm_irqchip,
    kvm_pit_config,
    kvm_pit_state2,
    kvm_irq_routing_entry,
);

/// Reads a structure at a byte offset of the argument.
pub(crate) fn get_at<T: Plain>(arg: &[u8], offset: usize) -> Answer<T> {
    let bytes = arg.get(offset..).and_then(|rest| rest.get(..size_of::<T>())).ok_or(libc::EFAULT)?;
    // SAFETY: the slice holds size_of::<T>() bytes and any bytes are a valid Plain.
    Ok(unsafe { std::ptr::read_unaligned(bytes.as_ptr() as *const T) })
}

/// Writes a structure at a byte offset of the argument.
pub(crate) fn put_at<T: Plain>(arg: &mut [u8], offset: usize, value: &T) -> Answer<()> {
    let bytes = arg.get_mut(offset..).and_then(|rest| rest.get_mut(..size_of::<T>())).ok_or(libc::EFAULT)?;
    // SAFETY: the slice holds size_of::<T>() bytes.
    unsafe { std::ptr::write_unaligned(bytes.as_mut_ptr() as *mut T, *value) };
    Ok(())
}

/// Reads the argument's structure.
pub(crate) fn get<T: Plain>(arg: &[u8]) -> Answer<T> {
    get_at(arg, 0)
}

/// Writes the argument's structure.
pub(crate) fn put<T: Plain>(arg: &mut [u8], value: &T) -> Answer<i64> {
    put_at(arg, 0, value).map(|()| 0)
}

/// An argument that is a number.
pub(crate) fn int(arg: &[u8]) -> Answer<u64> {
    get::<u64>(arg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_get_short_argument_is_a_fault() {
        assert_eq!(get::<u64>(&[0; 7]), Err(libc::EFAULT));
        assert_eq!(get_at::<u64>(&[0; 16], usize::MAX), Err(libc::EFAULT));
        assert_eq!(put(&mut [0; 3], &7u32), Err(libc::EFAULT));
    }

    #[test]
    fn test_get_unaligned_reads_little_endian() {
        assert_eq!(get_at::<u32>(&[0, 1, 2, 0, 0], 1), Ok(0x0201));
    }
}

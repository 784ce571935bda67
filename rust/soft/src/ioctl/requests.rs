//! KVM's request numbers, computed from direction, number and argument size as `asm/ioctl.h` does.
//!
//! Source: include/uapi/linux/kvm.h. A number holds the argument's size, so a structure whose
//! layout went wrong would give a number nobody sends.

use kvm_bindings::*;
use std::mem::size_of;

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

/// `_IOC(direction, KVMIO, number, size)`.
const fn ioc(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | KVMIO << 8 | number
}

macro_rules! requests {
    ($($name:ident = $direction:expr, $number:literal, $size:expr;)*) => {
        $(#[allow(missing_docs)] pub const $name: u32 = ioc($direction, $number, $size);)*
    };
}

// Of the system.
requests! {
    KVM_GET_API_VERSION = NONE, 0x00, 0;
    KVM_CREATE_VM = NONE, 0x01, 0;
    KVM_GET_MSR_INDEX_LIST = READ | WRITE, 0x02, 4;
    KVM_CHECK_EXTENSION = NONE, 0x03, 0;
    KVM_GET_VCPU_MMAP_SIZE = NONE, 0x04, 0;
    KVM_GET_SUPPORTED_CPUID = READ | WRITE, 0x05, 8;
    KVM_GET_MSR_FEATURE_INDEX_LIST = READ | WRITE, 0x0a, 4;
    KVM_X86_GET_MCE_CAP_SUPPORTED = READ, 0x9d, 8;
}

// Of a VM.
requests! {
    KVM_CREATE_VCPU = NONE, 0x41, 0;
    KVM_GET_DIRTY_LOG = WRITE, 0x42, size_of::<kvm_dirty_log>();
    KVM_SET_USER_MEMORY_REGION = WRITE, 0x46, size_of::<kvm_userspace_memory_region>();
    KVM_SET_TSS_ADDR = NONE, 0x47, 0;
    KVM_SET_IDENTITY_MAP_ADDR = WRITE, 0x48, 8;
    KVM_CREATE_IRQCHIP = NONE, 0x60, 0;
    KVM_IRQ_LINE = WRITE, 0x61, size_of::<kvm_irq_level>();
    KVM_GET_IRQCHIP = READ | WRITE, 0x62, size_of::<kvm_irqchip>();
    KVM_SET_IRQCHIP = READ, 0x63, size_of::<kvm_irqchip>();
    KVM_IRQ_LINE_STATUS = READ | WRITE, 0x67, size_of::<kvm_irq_level>();
    KVM_SET_GSI_ROUTING = WRITE, 0x6a, 8;
    KVM_REINJECT_CONTROL = NONE, 0x71, 0;
    KVM_IRQFD = WRITE, 0x76, size_of::<kvm_irqfd>();
    KVM_CREATE_PIT2 = WRITE, 0x77, size_of::<kvm_pit_config>();
    KVM_SET_BOOT_CPU_ID = NONE, 0x78, 0;
    KVM_IOEVENTFD = WRITE, 0x79, size_of::<kvm_ioeventfd>();
    KVM_SET_CLOCK = WRITE, 0x7b, size_of::<kvm_clock_data>();
    KVM_GET_CLOCK = READ, 0x7c, size_of::<kvm_clock_data>();
    KVM_GET_PIT2 = READ, 0x9f, size_of::<kvm_pit_state2>();
    KVM_SET_PIT2 = WRITE, 0xa0, size_of::<kvm_pit_state2>();
    KVM_SIGNAL_MSI = WRITE, 0xa5, size_of::<kvm_msi>();
    KVM_CLEAR_DIRTY_LOG = READ | WRITE, 0xc0, size_of::<kvm_clear_dirty_log>();
}

// Of a virtual CPU (some numbers serve VMs too).
requests! {
    KVM_GET_REGS = READ, 0x81, size_of::<kvm_regs>();
    KVM_SET_REGS = WRITE, 0x82, size_of::<kvm_regs>();
    KVM_GET_SREGS = READ, 0x83, size_of::<kvm_sregs>();
    KVM_SET_SREGS = WRITE, 0x84, size_of::<kvm_sregs>();
    KVM_TRANSLATE = READ | WRITE, 0x85, size_of::<kvm_translation>();
    KVM_INTERRUPT = WRITE, 0x86, size_of::<kvm_interrupt>();
    KVM_GET_MSRS = READ | WRITE, 0x88, 8;
    KVM_SET_MSRS = WRITE, 0x89, 8;
    KVM_SET_SIGNAL_MASK = WRITE, 0x8b, 4;
    KVM_GET_FPU = READ, 0x8c, size_of::<kvm_fpu>();
    KVM_SET_FPU = WRITE, 0x8d, size_of::<kvm_fpu>();
    KVM_GET_LAPIC = READ, 0x8e, size_of::<kvm_lapic_state>();
    KVM_SET_LAPIC = WRITE, 0x8f, size_of::<kvm_lapic_state>();
    KVM_SET_CPUID2 = WRITE, 0x90, 8;
    KVM_GET_CPUID2 = READ | WRITE, 0x91, 8;
    KVM_GET_MP_STATE = READ, 0x98, size_of::<kvm_mp_state>();
    KVM_SET_MP_STATE = WRITE, 0x99, size_of::<kvm_mp_state>();
    KVM_NMI = NONE, 0x9a, 0;
    KVM_X86_SETUP_MCE = WRITE, 0x9c, 8;
    KVM_X86_SET_MCE = WRITE, 0x9e, size_of::<kvm_x86_mce>();
    KVM_SET_GUEST_DEBUG = WRITE, 0x9b, size_of::<kvm_guest_debug>();
    KVM_GET_VCPU_EVENTS = READ, 0x9f, size_of::<kvm_vcpu_events>();
    KVM_SET_VCPU_EVENTS = WRITE, 0xa0, size_of::<kvm_vcpu_events>();
    KVM_GET_DEBUGREGS = READ, 0xa1, size_of::<kvm_debugregs>();
    KVM_SET_DEBUGREGS = WRITE, 0xa2, size_of::<kvm_debugregs>();
    KVM_SET_TSC_KHZ = NONE, 0xa2, 0;
    KVM_GET_TSC_KHZ = NONE, 0xa3, 0;
    KVM_ENABLE_CAP = WRITE, 0xa3, size_of::<kvm_enable_cap>();
    KVM_GET_XSAVE = READ, 0xa4, 4096;
    KVM_SET_XSAVE = WRITE, 0xa5, 4096;
    KVM_GET_XCRS = READ, 0xa6, size_of::<kvm_xcrs>();
    KVM_SET_XCRS = WRITE, 0xa7, size_of::<kvm_xcrs>();
    KVM_KVMCLOCK_CTRL = NONE, 0xad, 0;
    KVM_GET_SREGS2 = READ, 0xcc, size_of::<kvm_sregs2>();
    KVM_SET_SREGS2 = WRITE, 0xcd, size_of::<kvm_sregs2>();
    KVM_GET_XSAVE2 = READ, 0xcf, 4096;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values as they appear in traces of real programs.
    #[test]
    fn test_request_numbers_equal_the_kernels() {
        assert_eq!(KVM_GET_API_VERSION, 0xae00);
        assert_eq!(KVM_GET_SUPPORTED_CPUID, 0xc008_ae05);
        assert_eq!(KVM_SET_USER_MEMORY_REGION, 0x4020_ae46);
        assert_eq!(KVM_GET_REGS, 0x8090_ae81);
        assert_eq!(KVM_SET_SREGS, 0x4138_ae84);
        assert_eq!(KVM_IRQFD, 0x4020_ae76);
        assert_eq!(KVM_IOEVENTFD, 0x4040_ae79);
        assert_eq!(KVM_SET_GSI_ROUTING, 0x4008_ae6a);
        assert_eq!(KVM_GET_LAPIC, 0x8400_ae8e);
        assert_eq!(KVM_GET_XSAVE, 0x9000_aea4);
        assert_eq!(KVM_SET_IRQCHIP, 0x8208_ae63);
    }
}

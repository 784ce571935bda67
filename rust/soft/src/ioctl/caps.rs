//! KVM_CHECK_EXTENSION and KVM_ENABLE_CAP.

use crate::mce::MAX_BANKS;
use kvm_bindings::*;

/// vCPUs of a VM; the local APIC's 8-bit identity bounds what guests without x2APIC can use.
pub(crate) const MAX_VCPUS: u32 = 288;
/// Highest vCPU id, exclusive.
pub(crate) const MAX_VCPU_ID: u32 = 1024;
/// Memory slots of a VM.
pub(crate) const MAX_SLOTS: u32 = 512;

/// What a capability is worth; 0 when it is not there.
pub(crate) fn check(capability: u64) -> i64 {
    let Ok(capability) = u32::try_from(capability) else { return 0 };
    match capability {
        KVM_CAP_IRQCHIP
        | KVM_CAP_USER_MEMORY
        | KVM_CAP_SET_TSS_ADDR
        | KVM_CAP_EXT_CPUID
        | KVM_CAP_CLOCKSOURCE
        | KVM_CAP_MP_STATE
        | KVM_CAP_DESTROY_MEMORY_REGION_WORKS
        | KVM_CAP_USER_NMI
        | KVM_CAP_SET_GUEST_DEBUG
        | KVM_CAP_REINJECT_CONTROL
        | KVM_CAP_JOIN_MEMORY_REGIONS_WORKS
        | KVM_CAP_IRQFD
        | KVM_CAP_PIT2
        | KVM_CAP_SET_BOOT_CPU_ID
        | KVM_CAP_PIT_STATE2
        | KVM_CAP_IOEVENTFD
        | KVM_CAP_SET_IDENTITY_MAP_ADDR
        | KVM_CAP_VCPU_EVENTS
        | KVM_CAP_DEBUGREGS
        | KVM_CAP_X86_ROBUST_SINGLESTEP
        | KVM_CAP_ENABLE_CAP
        | KVM_CAP_XSAVE
        | KVM_CAP_XCRS
        | KVM_CAP_TSC_CONTROL
        | KVM_CAP_GET_TSC_KHZ
        | KVM_CAP_KVMCLOCK_CTRL
        | KVM_CAP_TSC_DEADLINE_TIMER
        | KVM_CAP_SIGNAL_MSI
        | KVM_CAP_READONLY_MEM
        | KVM_CAP_IRQFD_RESAMPLE
        | KVM_CAP_ENABLE_CAP_VM
        | KVM_CAP_IOEVENTFD_NO_LENGTH
        | KVM_CAP_CHECK_EXTENSION_VM
        | KVM_CAP_IOEVENTFD_ANY_LENGTH
        | KVM_CAP_IMMEDIATE_EXIT
        | KVM_CAP_GET_MSR_FEATURES
        | KVM_CAP_EXCEPTION_PAYLOAD
        | KVM_CAP_SREGS2 => 1,
        KVM_CAP_NR_VCPUS => std::thread::available_parallelism().map_or(1, |count| count.get() as i64),
        KVM_CAP_MAX_VCPUS => MAX_VCPUS as i64,
        KVM_CAP_MAX_VCPU_ID => MAX_VCPU_ID as i64,
        KVM_CAP_NR_MEMSLOTS => MAX_SLOTS as i64,
        KVM_CAP_IRQ_ROUTING => 4096,
        KVM_CAP_SYNC_MMU => 1,
        KVM_CAP_ADJUST_CLOCK => CLOCK_FLAGS as i64,
        KVM_CAP_X2APIC_API => (KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK) as i64,
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => MANUAL_PROTECT_FLAGS as i64,
        KVM_CAP_XSAVE2 => 4096,
        KVM_CAP_MCE => MAX_BANKS as i64,
        _ => 0,
    }
}

/// Flags of KVM_GET_CLOCK and KVM_SET_CLOCK.
pub(crate) const CLOCK_FLAGS: u32 = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
/// Flags of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
pub(crate) const MANUAL_PROTECT_FLAGS: u32 = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;

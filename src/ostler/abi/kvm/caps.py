"""KVM_CAP_*: what may be asked with KVM_CHECK_EXTENSION (include/uapi/linux/kvm.h)."""

import enum


class Cap(enum.IntEnum):
    """The capabilities Ostler asks for; the numbers are the kernel's."""

    IRQCHIP = 0
    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    EXT_CPUID = 7
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    MP_STATE = 14
    COALESCED_MMIO = 15
    USER_NMI = 22
    SET_GUEST_DEBUG = 23
    IRQ_ROUTING = 25
    IRQFD = 32
    PIT2 = 33
    PIT_STATE2 = 35
    IOEVENTFD = 36
    SET_IDENTITY_MAP_ADDR = 37
    ADJUST_CLOCK = 39
    VCPU_EVENTS = 41
    DEBUGREGS = 50
    XSAVE = 55
    XCRS = 56
    TSC_CONTROL = 60
    GET_TSC_KHZ = 61
    MAX_VCPUS = 66
    TSC_DEADLINE_TIMER = 72
    KVMCLOCK_CTRL = 76
    SIGNAL_MSI = 77
    READONLY_MEM = 81
    IRQFD_RESAMPLE = 82
    IOEVENTFD_NO_LENGTH = 100
    CHECK_EXTENSION_VM = 105
    X2APIC_API = 129
    IMMEDIATE_EXIT = 136
    GET_MSR_FEATURES = 153
    COALESCED_PIO = 162
    EXCEPTION_PAYLOAD = 164
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    ENFORCE_PV_FEATURE_CPUID = 190
    DIRTY_LOG_RING = 192
    XSAVE2 = 208
    X86_TRIPLE_FAULT_EVENT = 218


# Without any one of these a guest cannot be run or its state not be moved.
REQUIRED = (
    Cap.IRQCHIP,
    Cap.USER_MEMORY,
    Cap.EXT_CPUID,
    Cap.MP_STATE,
    Cap.USER_NMI,
    Cap.SET_GUEST_DEBUG,
    Cap.IRQ_ROUTING,
    Cap.IRQFD,
    Cap.PIT2,
    Cap.PIT_STATE2,
    Cap.IOEVENTFD,
    Cap.ADJUST_CLOCK,
    Cap.VCPU_EVENTS,
    Cap.DEBUGREGS,
    Cap.XSAVE,
    Cap.XCRS,
    Cap.GET_TSC_KHZ,
    Cap.TSC_DEADLINE_TIMER,
    Cap.SIGNAL_MSI,
    Cap.READONLY_MEM,
    Cap.IRQFD_RESAMPLE,
    Cap.IOEVENTFD_NO_LENGTH,
    Cap.IMMEDIATE_EXIT,
)

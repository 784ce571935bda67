"""`struct kvm_run`: the page a virtual CPU shares with user space (include/uapi/linux/kvm.h).

Only the exits an x86 machine of this kind sees are taken apart; `padding` fixes the union's size.
"""

from ctypes import Structure, Union, c_char, c_uint8, c_uint64

from ostler.abi.fields import u8s, u16s, u32s, u64s

KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1

KVM_PIO_PAGE_OFFSET = 1
KVM_COALESCED_MMIO_PAGE_OFFSET = 2
KVM_DIRTY_LOG_PAGE_OFFSET = 64

KVM_DIRTY_GFN_F_DIRTY = 1
KVM_DIRTY_GFN_F_RESET = 2

KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4


class RunHw(Structure):
    """KVM_EXIT_UNKNOWN."""

    _fields_ = u64s("hardware_exit_reason")


class RunFailEntry(Structure):
    """KVM_EXIT_FAIL_ENTRY."""

    _fields_ = (*u64s("hardware_entry_failure_reason"), *u32s("cpu"))


class RunIo(Structure):
    """KVM_EXIT_IO: `count` items of `size` bytes at `data_offset` from the page's start."""

    _fields_ = (*u8s("direction size"), *u16s("port"), *u32s("count"), *u64s("data_offset"))


class RunDebug(Structure):
    """KVM_EXIT_DEBUG (`struct kvm_debug_exit_arch`)."""

    _fields_ = (*u32s("exception pad"), *u64s("pc dr6 dr7"))


class RunMmio(Structure):
    """KVM_EXIT_MMIO."""

    _fields_ = (*u64s("phys_addr"), ("data", c_uint8 * 8), *u32s("len"), *u8s("is_write"))


class RunInternal(Structure):
    """KVM_EXIT_INTERNAL_ERROR: `ndata` words of `data`."""

    _fields_ = (*u32s("suberror ndata"), ("data", c_uint64 * 16))


class RunSystemEvent(Structure):
    """KVM_EXIT_SYSTEM_EVENT: `type` is KVM_SYSTEM_EVENT_*; `ndata` words of `data`."""

    _fields_ = (*u32s("type ndata"), ("data", c_uint64 * 16))


class _Exits(Union):
    _fields_ = (
        ("hw", RunHw),
        ("fail_entry", RunFailEntry),
        ("io", RunIo),
        ("debug", RunDebug),
        ("mmio", RunMmio),
        ("internal", RunInternal),
        ("system_event", RunSystemEvent),
        ("padding", c_char * 256),
    )


class Run(Structure):
    """`struct kvm_run`. The members of the exit union are reached without naming it."""

    _anonymous_ = ("exits",)
    _fields_ = (
        *u8s("request_interrupt_window immediate_exit"),
        ("padding1", c_uint8 * 6),
        *u32s("exit_reason"),
        *u8s("ready_for_interrupt_injection if_flag"),
        *u16s("flags"),
        *u64s("cr8 apic_base"),
        ("exits", _Exits),
        *u64s("kvm_valid_regs kvm_dirty_regs"),
        ("s", c_uint64 * 256),
    )

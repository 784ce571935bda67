"""Structures of a virtual machine: memory slots, interrupt chips and routes, timers, clock, eventfds.

From include/uapi/linux/kvm.h and arch/x86/include/uapi/asm/kvm.h; field names are the kernel's.
"""

from ctypes import Structure, Union, c_char, c_int32, c_int64, c_uint8, c_uint32, c_uint64

from ostler.abi.fields import u8s, u16s, u32s, u64s

KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1

KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2
KVM_IOAPIC_NUM_PINS = 24

KVM_IRQ_ROUTING_IRQCHIP = 1
KVM_IRQ_ROUTING_MSI = 2

KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
KVM_IRQFD_FLAG_RESAMPLE = 1 << 1

KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
KVM_IOEVENTFD_FLAG_PIO = 1 << 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2

KVM_PIT_SPEAKER_DUMMY = 1

KVM_CLOCK_TSC_STABLE = 1 << 1
KVM_CLOCK_REALTIME = 1 << 2
KVM_CLOCK_HOST_TSC = 1 << 3


class UserspaceMemoryRegion(Structure):
    """`struct kvm_userspace_memory_region`: a slot of guest memory; size 0 removes it."""

    _fields_ = (*u32s("slot flags"), *u64s("guest_phys_addr memory_size userspace_addr"))


class DirtyLog(Structure):
    """`struct kvm_dirty_log`: `dirty_bitmap` is a host address, a bit for each 4 KiB page."""

    _fields_ = (*u32s("slot padding1"), *u64s("dirty_bitmap"))


class ClearDirtyLog(Structure):
    """`struct kvm_clear_dirty_log`: `first_page` and `num_pages` are multiples of 64."""

    _fields_ = (*u32s("slot num_pages"), *u64s("first_page dirty_bitmap"))


class IrqLevel(Structure):
    """`struct kvm_irq_level`: `irq` is a GSI."""

    _fields_ = u32s("irq level")


class CoalescedMmioZone(Structure):
    """`struct kvm_coalesced_mmio_zone`: where writes are collected; `pio` for ports."""

    _fields_ = (*u64s("addr"), *u32s("size pio"))


class CoalescedMmio(Structure):
    """`struct kvm_coalesced_mmio`: one collected write."""

    _fields_ = (*u64s("phys_addr"), *u32s("len pio"), ("data", c_uint8 * 8))


class DirtyGfn(Structure):
    """`struct kvm_dirty_gfn`: one entry of a dirty ring; `slot` has the address space in its upper half."""

    _fields_ = (*u32s("flags slot"), *u64s("offset"))


class PicState(Structure):
    """`struct kvm_pic_state`: one of the two 8259s."""

    _fields_ = u8s(
        "last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state "
        "auto_eoi rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask"
    )


class IoapicState(Structure):
    """`struct kvm_ioapic_state`: `redirtbl` holds the 64-bit redirection entries."""

    _fields_ = (
        *u64s("base_address"),
        *u32s("ioregsel id irr pad"),
        ("redirtbl", c_uint64 * KVM_IOAPIC_NUM_PINS),
    )


class _Chip(Union):
    _fields_ = (("dummy", c_char * 512), ("pic", PicState), ("ioapic", IoapicState))


class Irqchip(Structure):
    """`struct kvm_irqchip`: `chip_id` (KVM_IRQCHIP_*) says which member of `chip` counts."""

    _fields_ = (*u32s("chip_id pad"), ("chip", _Chip))


class PitConfig(Structure):
    """`struct kvm_pit_config`."""

    _fields_ = (*u32s("flags"), ("pad", c_uint32 * 15))


class PitChannelState(Structure):
    """`struct kvm_pit_channel_state`; `count_load_time` is in the host's monotonic nanoseconds."""

    _fields_ = (
        *u32s("count"),
        *u16s("latched_count"),
        *u8s("count_latched status_latched status read_state write_state write_latch"),
        *u8s("rw_mode mode bcd gate"),
        ("count_load_time", c_int64),
    )


class PitState2(Structure):
    """`struct kvm_pit_state2`."""

    _fields_ = (("channels", PitChannelState * 3), *u32s("flags"), ("reserved", c_uint32 * 9))


class IrqRoutingIrqchip(Structure):
    """`struct kvm_irq_routing_irqchip`."""

    _fields_ = u32s("irqchip pin")


class IrqRoutingMsi(Structure):
    """`struct kvm_irq_routing_msi`."""

    _fields_ = u32s("address_lo address_hi data devid")


class _Route(Union):
    _fields_ = (("irqchip", IrqRoutingIrqchip), ("msi", IrqRoutingMsi), ("pad", c_uint32 * 8))


class IrqRoutingEntry(Structure):
    """`struct kvm_irq_routing_entry`: `type` (KVM_IRQ_ROUTING_*) chooses the member of `u`."""

    _fields_ = (*u32s("gsi type flags pad"), ("u", _Route))


class IrqRouting(Structure):
    """`struct kvm_irq_routing`: header of `nr` IrqRoutingEntry."""

    _fields_ = u32s("nr flags")


class Irqfd(Structure):
    """`struct kvm_irqfd`: an eventfd that raises a GSI."""

    _fields_ = (*u32s("fd gsi flags resamplefd"), ("pad", c_uint8 * 16))


class Ioeventfd(Structure):
    """`struct kvm_ioeventfd`: an eventfd signalled by a guest's write; `len` 0 is any length."""

    _fields_ = (
        *u64s("datamatch addr"),
        *u32s("len"),
        ("fd", c_int32),
        *u32s("flags"),
        ("pad", c_uint8 * 36),
    )


class Msi(Structure):
    """`struct kvm_msi`: a message-signalled interrupt."""

    _fields_ = (*u32s("address_lo address_hi data flags devid"), ("pad", c_uint8 * 12))


class ClockData(Structure):
    """`struct kvm_clock_data`: kvmclock, nanoseconds; `flags` are KVM_CLOCK_*."""

    _fields_ = (
        *u64s("clock"),
        *u32s("flags pad0"),
        *u64s("realtime host_tsc"),
        ("pad", c_uint32 * 4),
    )


class DeviceAttr(Structure):
    """`struct kvm_device_attr`: `addr` is the host address of the attribute's value."""

    _fields_ = (*u32s("flags group"), *u64s("attr addr"))

"""KVM's ioctl numbers (include/uapi/linux/kvm.h), each computed from its argument's layout."""

from ctypes import Structure, c_uint8, c_uint64

from ostler.abi.fields import u32s
from ostler.abi.ioc import io, ior, iow, iowr
from ostler.abi.kvm import board, state

KVMIO = 0xAE
KVM_API_VERSION = 12


class SignalMask(Structure):
    """`struct kvm_signal_mask`: header of a set of `len` bytes."""

    _fields_ = u32s("len")


class SignalMask8(Structure):
    """`struct kvm_signal_mask` with the kernel's 8-byte set behind it."""

    _pack_ = 1
    _fields_ = (*u32s("len"), ("sigset", c_uint8 * 8))


# of /dev/kvm
KVM_GET_API_VERSION = io(KVMIO, 0x00)
KVM_CREATE_VM = io(KVMIO, 0x01)
KVM_GET_MSR_INDEX_LIST = iowr(KVMIO, 0x02, state.MsrList)
KVM_CHECK_EXTENSION = io(KVMIO, 0x03)
KVM_GET_VCPU_MMAP_SIZE = io(KVMIO, 0x04)
KVM_GET_SUPPORTED_CPUID = iowr(KVMIO, 0x05, state.Cpuid2)
KVM_GET_MSR_FEATURE_INDEX_LIST = iowr(KVMIO, 0x0A, state.MsrList)

# of a VM
KVM_CREATE_VCPU = io(KVMIO, 0x41)
KVM_GET_DIRTY_LOG = iow(KVMIO, 0x42, board.DirtyLog)
KVM_SET_USER_MEMORY_REGION = iow(KVMIO, 0x46, board.UserspaceMemoryRegion)
KVM_SET_TSS_ADDR = io(KVMIO, 0x47)
KVM_SET_IDENTITY_MAP_ADDR = iow(KVMIO, 0x48, c_uint64)
KVM_CREATE_IRQCHIP = io(KVMIO, 0x60)
KVM_IRQ_LINE = iow(KVMIO, 0x61, board.IrqLevel)
KVM_GET_IRQCHIP = iowr(KVMIO, 0x62, board.Irqchip)
KVM_SET_IRQCHIP = ior(KVMIO, 0x63, board.Irqchip)
KVM_IRQ_LINE_STATUS = iowr(KVMIO, 0x67, board.IrqLevel)
KVM_REGISTER_COALESCED_MMIO = iow(KVMIO, 0x67, board.CoalescedMmioZone)
KVM_UNREGISTER_COALESCED_MMIO = iow(KVMIO, 0x68, board.CoalescedMmioZone)
KVM_SET_GSI_ROUTING = iow(KVMIO, 0x6A, board.IrqRouting)
KVM_IRQFD = iow(KVMIO, 0x76, board.Irqfd)
KVM_CREATE_PIT2 = iow(KVMIO, 0x77, board.PitConfig)
KVM_SET_BOOT_CPU_ID = io(KVMIO, 0x78)
KVM_IOEVENTFD = iow(KVMIO, 0x79, board.Ioeventfd)
KVM_SET_CLOCK = iow(KVMIO, 0x7B, board.ClockData)
KVM_GET_CLOCK = ior(KVMIO, 0x7C, board.ClockData)
KVM_GET_PIT2 = ior(KVMIO, 0x9F, board.PitState2)
KVM_SET_PIT2 = iow(KVMIO, 0xA0, board.PitState2)
KVM_SIGNAL_MSI = iow(KVMIO, 0xA5, board.Msi)
KVM_CLEAR_DIRTY_LOG = iowr(KVMIO, 0xC0, board.ClearDirtyLog)
KVM_RESET_DIRTY_RINGS = io(KVMIO, 0xC7)

# of a virtual CPU
KVM_RUN = io(KVMIO, 0x80)
KVM_GET_REGS = ior(KVMIO, 0x81, state.Regs)
KVM_SET_REGS = iow(KVMIO, 0x82, state.Regs)
KVM_GET_SREGS = ior(KVMIO, 0x83, state.Sregs)
KVM_SET_SREGS = iow(KVMIO, 0x84, state.Sregs)
KVM_TRANSLATE = iowr(KVMIO, 0x85, state.Translation)
KVM_GET_MSRS = iowr(KVMIO, 0x88, state.Msrs)
KVM_SET_MSRS = iow(KVMIO, 0x89, state.Msrs)
KVM_SET_SIGNAL_MASK = iow(KVMIO, 0x8B, SignalMask)
KVM_GET_FPU = ior(KVMIO, 0x8C, state.Fpu)
KVM_SET_FPU = iow(KVMIO, 0x8D, state.Fpu)
KVM_GET_LAPIC = ior(KVMIO, 0x8E, state.LapicState)
KVM_SET_LAPIC = iow(KVMIO, 0x8F, state.LapicState)
KVM_SET_CPUID2 = iow(KVMIO, 0x90, state.Cpuid2)
KVM_GET_CPUID2 = iowr(KVMIO, 0x91, state.Cpuid2)
KVM_GET_MP_STATE = ior(KVMIO, 0x98, state.MpState)
KVM_SET_MP_STATE = iow(KVMIO, 0x99, state.MpState)
KVM_NMI = io(KVMIO, 0x9A)
KVM_X86_SETUP_MCE = iow(KVMIO, 0x9C, c_uint64)
KVM_X86_SET_MCE = iow(KVMIO, 0x9E, state.X86Mce)
KVM_SET_GUEST_DEBUG = iow(KVMIO, 0x9B, state.GuestDebug)
KVM_GET_VCPU_EVENTS = ior(KVMIO, 0x9F, state.VcpuEvents)
KVM_SET_VCPU_EVENTS = iow(KVMIO, 0xA0, state.VcpuEvents)
KVM_GET_DEBUGREGS = ior(KVMIO, 0xA1, state.Debugregs)
KVM_SET_DEBUGREGS = iow(KVMIO, 0xA2, state.Debugregs)
KVM_SET_TSC_KHZ = io(KVMIO, 0xA2)
KVM_GET_TSC_KHZ = io(KVMIO, 0xA3)
KVM_ENABLE_CAP = iow(KVMIO, 0xA3, state.EnableCap)
KVM_GET_XSAVE = ior(KVMIO, 0xA4, state.Xsave)
KVM_SET_XSAVE = iow(KVMIO, 0xA5, state.Xsave)
KVM_GET_XCRS = ior(KVMIO, 0xA6, state.Xcrs)
KVM_SET_XCRS = iow(KVMIO, 0xA7, state.Xcrs)
KVM_KVMCLOCK_CTRL = io(KVMIO, 0xAD)

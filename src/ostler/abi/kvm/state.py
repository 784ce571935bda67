"""State of one virtual CPU, as KVM hands it out: arch/x86/include/uapi/asm/kvm.h.

Field names are the kernel's. Structures KVM ends in a flexible array are the header only; their
entries follow it in the same buffer (see `ostler.accel.tables`).
Left out: SMM-only ioctls, nested state, PMU filters, Xen and Hyper-V.
"""

from ctypes import Structure, c_uint8, c_uint16, c_uint32, c_uint64

from ostler.abi.fields import u8s, u16s, u32s, u64s

KVM_NR_INTERRUPTS = 256
KVM_APIC_REG_SIZE = 0x400
XSAVE_SIZE_BYTES = 4096
KVM_MAX_XCRS = 16

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0

KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4

KVM_VCPUEVENT_VALID_NMI_PENDING = 1 << 0
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 1 << 1
KVM_VCPUEVENT_VALID_SHADOW = 1 << 2
KVM_VCPUEVENT_VALID_SMM = 1 << 3
KVM_VCPUEVENT_VALID_PAYLOAD = 1 << 4
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 1 << 5

KVM_X86_SHADOW_INT_MOV_SS = 1 << 0
KVM_X86_SHADOW_INT_STI = 1 << 1

KVM_GUESTDBG_ENABLE = 1 << 0
KVM_GUESTDBG_SINGLESTEP = 1 << 1
KVM_GUESTDBG_USE_SW_BP = 1 << 16
KVM_GUESTDBG_USE_HW_BP = 1 << 17
KVM_GUESTDBG_INJECT_DB = 1 << 18
KVM_GUESTDBG_INJECT_BP = 1 << 19
KVM_GUESTDBG_BLOCKIRQ = 1 << 20


class Regs(Structure):
    """`struct kvm_regs`: general registers, RIP, RFLAGS."""

    _fields_ = u64s("rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags")


class Segment(Structure):
    """`struct kvm_segment`: a segment register with its hidden part; `limit` is in bytes."""

    _fields_ = (
        *u64s("base"),
        *u32s("limit"),
        *u16s("selector"),
        *u8s("type present dpl db s l g avl unusable padding"),
    )


class Dtable(Structure):
    """`struct kvm_dtable`: GDTR or IDTR."""

    _fields_ = (*u64s("base"), *u16s("limit"), ("padding", c_uint16 * 3))


class Sregs(Structure):
    """`struct kvm_sregs`: segments, tables, control registers, EFER and the APIC base."""

    _fields_ = (
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, Dtable) for name in ("gdt", "idt")),
        *u64s("cr0 cr2 cr3 cr4 cr8 efer apic_base"),
        ("interrupt_bitmap", c_uint64 * (KVM_NR_INTERRUPTS // 64)),
    )


class Fpu(Structure):
    """`struct kvm_fpu`: the FXSAVE image, taken apart."""

    _fields_ = (
        ("fpr", c_uint8 * 16 * 8),
        *u16s("fcw fsw"),
        *u8s("ftwx pad1"),
        *u16s("last_opcode"),
        *u64s("last_ip last_dp"),
        ("xmm", c_uint8 * 16 * 16),
        *u32s("mxcsr pad2"),
    )


class Xsave(Structure):
    """`struct kvm_xsave`: an XSAVE area in the standard format, 4096 bytes."""

    _fields_ = (("region", c_uint32 * (XSAVE_SIZE_BYTES // 4)),)


class Xcr(Structure):
    """`struct kvm_xcr`."""

    _fields_ = (*u32s("xcr reserved"), *u64s("value"))


class Xcrs(Structure):
    """`struct kvm_xcrs`: the extended control registers, `nr_xcrs` of them."""

    _fields_ = (*u32s("nr_xcrs flags"), ("xcrs", Xcr * KVM_MAX_XCRS), ("padding", c_uint64 * 16))


class MsrEntry(Structure):
    """`struct kvm_msr_entry`."""

    _fields_ = (*u32s("index reserved"), *u64s("data"))


class Msrs(Structure):
    """`struct kvm_msrs`: header of `nmsrs` MsrEntry."""

    _fields_ = u32s("nmsrs pad")


class MsrList(Structure):
    """`struct kvm_msr_list`: header of `nmsrs` 32-bit indices."""

    _fields_ = u32s("nmsrs")


class CpuidEntry2(Structure):
    """`struct kvm_cpuid_entry2`: one CPUID leaf; `index` counts if the flag says so."""

    _fields_ = (*u32s("function index flags eax ebx ecx edx"), ("padding", c_uint32 * 3))


class Cpuid2(Structure):
    """`struct kvm_cpuid2`: header of `nent` CpuidEntry2."""

    _fields_ = u32s("nent padding")


class LapicState(Structure):
    """`struct kvm_lapic_state`: the xAPIC register page's first KiB."""

    _fields_ = (("regs", c_uint8 * KVM_APIC_REG_SIZE),)


class Debugregs(Structure):
    """`struct kvm_debugregs`: DR0-DR3, DR6, DR7."""

    _fields_ = (
        ("db", c_uint64 * 4),
        *u64s("dr6 dr7 flags"),
        ("reserved", c_uint64 * 9),
    )


class GuestDebug(Structure):
    """`struct kvm_guest_debug`: what the host debugs in the guest (KVM_GUESTDBG_*)."""

    _fields_ = (*u32s("control pad"), ("debugreg", c_uint64 * 8))


class _ExceptionEvent(Structure):
    _fields_ = (*u8s("injected nr has_error_code pending"), *u32s("error_code"))


class _InterruptEvent(Structure):
    _fields_ = u8s("injected nr soft shadow")


class _NmiEvent(Structure):
    _fields_ = u8s("injected pending masked pad")


class _SmiEvent(Structure):
    _fields_ = u8s("smm pending smm_inside_nmi latched_init")


class _TripleFaultEvent(Structure):
    _fields_ = u8s("pending")


class VcpuEvents(Structure):
    """`struct kvm_vcpu_events`: what is being, or waits to be, injected."""

    _fields_ = (
        ("exception", _ExceptionEvent),
        ("interrupt", _InterruptEvent),
        ("nmi", _NmiEvent),
        *u32s("sipi_vector flags"),
        ("smi", _SmiEvent),
        ("triple_fault", _TripleFaultEvent),
        ("reserved", c_uint8 * 26),
        *u8s("exception_has_payload"),
        *u64s("exception_payload"),
    )


class X86Mce(Structure):
    """`struct kvm_x86_mce`: an error for one bank of IA32_MCi registers."""

    _fields_ = (
        *u64s("status addr misc mcg_status"),
        *u8s("bank"),
        ("pad1", c_uint8 * 7),
        ("pad2", c_uint64 * 3),
    )


class MpState(Structure):
    """`struct kvm_mp_state`: KVM_MP_STATE_*."""

    _fields_ = u32s("mp_state")


class Translation(Structure):
    """`struct kvm_translation`: `physical_address` means something only if `valid`."""

    _fields_ = (
        *u64s("linear_address physical_address"),
        *u8s("valid writeable usermode"),
        ("pad", c_uint8 * 5),
    )


class EnableCap(Structure):
    """`struct kvm_enable_cap`."""

    _fields_ = (*u32s("cap flags"), ("args", c_uint64 * 4), ("pad", c_uint8 * 64))

"""The accelerator contract: KVM's own interface, whoever implements it.

Semantics are those of Linux's Documentation/virt/kvm/api.rst; only what a Python caller has to
know besides is said here. The state structures are `ostler.abi.kvm.state` and `.board`.

The irqchip (PIC, IOAPIC, local APICs), the PIT, kvmclock and HLT live inside the accelerator. GSIs
are as on a PC: 0-15 reach PIC and IOAPIC, 16-23 the IOAPIC, anything above is for MSI routes.

A failing request raises `AccelError`, whose text names the request and the value.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from ostler.abi.kvm.board import ClockData, IoapicState, Irqchip, PitState2
from ostler.abi.kvm.caps import Cap
from ostler.abi.kvm.state import (
    CpuidEntry2,
    Debugregs,
    Fpu,
    LapicState,
    Regs,
    Sregs,
    Translation,
    VcpuEvents,
    X86Mce,
    Xcrs,
    Xsave,
)
from ostler.accel.exits import (
    DebugStop,
    ExitReason,
    FailEntry,
    InternalError,
    Mmio,
    PortIo,
    SystemEvent,
)
from ostler.accel.rings import CollectedWrite, DirtyRing

__all__ = [
    "VCPU",
    "VM",
    "Accel",
    "Cap",
    "ClockData",
    "CollectedWrite",
    "CpuidEntry2",
    "DebugStop",
    "Debugregs",
    "DirtyRing",
    "ExitReason",
    "ExitView",
    "FailEntry",
    "Fpu",
    "InternalError",
    "IoapicState",
    "IrqRoute",
    "Irqchip",
    "LapicState",
    "Mmio",
    "MsiRoute",
    "PitState2",
    "PortIo",
    "Regs",
    "Route",
    "Sregs",
    "SystemEvent",
    "Translation",
    "VcpuEvents",
    "Xcrs",
    "Xsave",
]


@dataclass(frozen=True, slots=True)
class IrqRoute:
    """GSI to a pin of an interrupt chip (KVM_IRQCHIP_*); a GSI may have several such routes."""

    gsi: int
    chip: int
    pin: int


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """GSI to a message: what an irqfd of that GSI then sends."""

    gsi: int
    address: int
    data: int


Route = IrqRoute | MsiRoute


class ExitView(Protocol):
    """The current exit's data. Each property means something for its own ExitReason only."""

    @property
    def io(self) -> PortIo:
        """ExitReason.IO; completed by the next `run()`."""

    @property
    def mmio(self) -> Mmio:
        """ExitReason.MMIO; completed by the next `run()`."""

    @property
    def debug(self) -> DebugStop:
        """ExitReason.DEBUG."""

    @property
    def system_event(self) -> SystemEvent:
        """ExitReason.SYSTEM_EVENT."""

    @property
    def internal(self) -> InternalError:
        """ExitReason.INTERNAL_ERROR."""

    @property
    def fail_entry(self) -> FailEntry:
        """ExitReason.FAIL_ENTRY."""

    @property
    def hardware_reason(self) -> int:
        """ExitReason.UNKNOWN: the hardware's own number."""


class VCPU(Protocol):
    """One virtual CPU.

    Threading: everything but `kick()` and `nmi()` belongs to the thread that runs it, or to any
    thread while it is known not to run. A vCPU's own memory of an unfinished port or MMIO read ends
    with the next `run()`; run once with `immediate_exit` set before reading state to be saved.
    """

    @property
    def id(self) -> int:
        """The number given at creation, which is also the APIC ID."""

    @property
    def exit(self) -> ExitView:
        """Data of the last exit, in the shared page; valid until the next `run()`."""

    @property
    def immediate_exit(self) -> bool:
        """While true, `run()` finishes a pending exit and returns INTR before any instruction."""

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None: ...

    def run(self) -> ExitReason:
        """Run until user space is wanted. Halts wait inside. Releases the GIL."""

    def kick(self) -> None:
        """Make `run()` return INTR: the running one, or else the next. From any thread."""

    def nmi(self) -> None:
        """Queue a non-maskable interrupt. From any thread."""

    def setup_mce(self, mcg_cap: int) -> None:
        """Give the processor banks for machine checks: IA32_MCG_CAP. Raises AccelError for what is not there."""

    def set_mce(self, mce: X86Mce) -> None:
        """Put an error into a bank; one that was not corrected interrupts the guest, or shuts it down."""

    def get_regs(self) -> Regs:
        """General registers, RIP, RFLAGS."""

    def set_regs(self, regs: Regs) -> None:
        """Set general registers; drops a queued exception, as KVM does."""

    def get_sregs(self) -> Sregs:
        """Segments, tables, control registers, EFER, APIC base."""

    def set_sregs(self, sregs: Sregs) -> None:
        """Set segments and control registers. Raises for an impossible combination."""

    def get_fpu(self) -> Fpu:
        """x87 and SSE state."""

    def set_fpu(self, fpu: Fpu) -> None:
        """Set x87 and SSE state."""

    def get_xsave(self) -> Xsave:
        """Extended state in the standard XSAVE format, 4096 bytes."""

    def set_xsave(self, xsave: Xsave) -> None:
        """Set extended state. Raises for reserved bits."""

    def get_xcrs(self) -> Xcrs:
        """XCR0."""

    def set_xcrs(self, xcrs: Xcrs) -> None:
        """Set XCR0. Raises for bits the CPU model lacks."""

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Values by index. Raises for the first MSR that cannot be read."""

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Set MSRs in the mapping's order. Raises for the first one refused."""

    def get_debugregs(self) -> Debugregs:
        """DR0-DR3, DR6, DR7."""

    def set_debugregs(self, debugregs: Debugregs) -> None:
        """Set the guest's debug registers."""

    def get_lapic(self) -> LapicState:
        """Local APIC registers; needs the irqchip."""

    def set_lapic(self, lapic: LapicState) -> None:
        """Set local APIC registers; set APIC_BASE (`set_sregs`) first."""

    def get_vcpu_events(self) -> VcpuEvents:
        """Pending exceptions, interrupts, NMI, SIPI, interrupt shadow."""

    def set_vcpu_events(self, events: VcpuEvents) -> None:
        """Set pending events; `flags` says which optional parts count."""

    def get_mp_state(self) -> int:
        """KVM_MP_STATE_*: runnable, waiting for INIT or SIPI, halted."""

    def set_mp_state(self, mp_state: int) -> None:
        """Set KVM_MP_STATE_*."""

    def get_cpuid2(self) -> list[CpuidEntry2]:
        """The CPUID leaves the guest sees."""

    def set_cpuid2(self, entries: Sequence[CpuidEntry2]) -> None:
        """Set the CPUID leaves; before the first `run()` only."""

    def get_tsc_khz(self) -> int:
        """Frequency of the guest's TSC."""

    def set_tsc_khz(self, khz: int) -> None:
        """Set the TSC's frequency. Raises where the host cannot scale it."""

    def set_guest_debug(self, control: int, debugreg: Sequence[int] = ()) -> None:
        """Debug the guest from outside (KVM_GUESTDBG_*); `debugreg` is DR0 to DR7, short is padded."""

    def translate(self, linear: int) -> Translation:
        """Walk the guest's page tables as they are now."""

    def kvmclock_ctrl(self) -> None:
        """Tell the guest's soft-lockup watchdog that it was paused on purpose."""

    def collected_writes(self) -> list[CollectedWrite]:
        """Take the VM's writes that `collect_writes` asked for, in order; before the exit at hand is served."""

    def dirty_ring(self, size_bytes: int) -> DirtyRing:
        """Map this vCPU's ring; needs Cap.DIRTY_LOG_RING enabled with that size before the vCPU was made."""

    def close(self) -> None:
        """Give the vCPU up. It must not be running."""


class VM(Protocol):
    """A virtual machine; a context manager that closes it with its vCPUs.

    Threading: every method may be called from any thread while vCPUs run.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def close(self) -> None:
        """Close vCPUs and VM. No vCPU may be running."""

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION on the VM: 0 is no, otherwise the capability's value."""

    def set_user_memory_region(self, slot: int, gpa: int, size: int, host_address: int, flags: int = 0) -> None:
        """Create, move, re-flag (KVM_MEM_*) or, with size 0, remove a slot; all page-aligned."""

    def create_irqchip(self) -> None:
        """PIC, IOAPIC and a local APIC for every vCPU; before the first vCPU."""

    def create_pit2(self) -> None:
        """The PIT, with a dummy speaker port 0x61; after the irqchip."""

    def create_vcpu(self, vcpu_id: int) -> VCPU:
        """A vCPU; 0 boots, the others wait for INIT and SIPI if there is an irqchip."""

    def set_gsi_routing(self, routes: Iterable[Route]) -> None:
        """Replace the whole routing table."""

    def irq_line(self, gsi: int, level: int) -> None:
        """Set a GSI's line to 0 or 1."""

    def signal_msi(self, address: int, data: int) -> bool:
        """Send a message-signalled interrupt; false if no processor took it."""

    def irqfd(self, fd: int, gsi: int, *, resample_fd: int | None = None, deassign: bool = False) -> None:
        """Tie an eventfd to a GSI; with `resample_fd` level-triggered, signalled at each EOI."""

    def ioeventfd(
        self,
        fd: int,
        address: int,
        size: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
        deassign: bool = False,
    ) -> None:
        """Turn a guest write of `size` bytes (0: any) at `address` into an eventfd signal."""

    def get_dirty_log(self, slot: int) -> bytearray:
        """Fetch and clear: a bit for every 4 KiB page written since the last call, padded to 64."""

    def clear_dirty_log(self, slot: int, first_page: int, page_count: int, bitmap: bytes | bytearray) -> None:
        """Clear and re-protect the pages of the bitmap; needs Cap.MANUAL_DIRTY_LOG_PROTECT2."""

    def collect_writes(self, address: int, size: int, *, pio: bool = False, stop: bool = False) -> None:
        """Collect writes within the range instead of leaving the guest for them; needs Cap.COALESCED_MMIO or _PIO.

        They wait until somebody asks: for registers whose writes nobody but the next reader has to see.
        """

    def reset_dirty_rings(self) -> int:
        """Re-arm the pages harvested from all vCPUs' rings; how many. Needs Cap.DIRTY_LOG_RING."""

    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP on the VM."""

    def get_clock(self) -> ClockData:
        """kvmclock now, nanoseconds."""

    def set_clock(self, clock: ClockData) -> None:
        """Set kvmclock."""

    def get_irqchip(self, chip_id: int) -> Irqchip:
        """State of one of the three chips (KVM_IRQCHIP_*)."""

    def set_irqchip(self, chip: Irqchip) -> None:
        """Set the state of the chip that `chip_id` names."""

    def get_pit2(self) -> PitState2:
        """The PIT's three channels."""

    def set_pit2(self, pit: PitState2) -> None:
        """Set the PIT's channels."""

    def memory_written(self, gpa: int, size: int) -> None:
        """The host wrote guest memory behind the accelerator's back: code there is stale.

        Needed after every write that may hit code (loading a kernel, a device's DMA).
        """

    def statistics(self) -> dict[str, int]:
        """What the accelerator counted for all vCPUs so far, by name; empty where it does not count."""


class Accel(Protocol):
    """An opened accelerator."""

    @property
    def name(self) -> str:
        """`kvm` or `soft`, for messages and logs only."""

    @property
    def pays_huge_pages(self) -> bool:
        """Whether guest memory in the host's huge pages makes guests faster: its page tables are the processor's."""

    def close(self) -> None:
        """Close it; VMs made from it stay alive."""

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 is no, otherwise the capability's value."""

    def create_vm(self) -> VM:
        """A new, empty VM."""

    def get_supported_cpuid(self) -> list[CpuidEntry2]:
        """The CPUID features this accelerator can give a guest."""

    def get_msr_index_list(self) -> list[int]:
        """MSRs worth saving."""

    def get_feature_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Feature MSRs (such as ARCH_CAPABILITIES) as far as the accelerator can give them."""

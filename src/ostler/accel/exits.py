"""Why a virtual CPU stopped: KVM's exit reasons and the data that come with them."""

import enum
from dataclasses import dataclass
from typing import NamedTuple


class ExitReason(enum.IntEnum):
    """KVM_EXIT_*; the numbers are the kernel's.

    `INTR` also stands for a run that a kick, a signal or `immediate_exit` ended.
    """

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    X86_BUS_LOCK = 33
    NOTIFY = 37


class PortIo(NamedTuple):
    """A port access: `count` items of `size` bytes, all at `port`.

    `data` is a view of the shared page, `size * count` bytes: read it for a write of the guest,
    fill it for a read before the next `run()`. It is valid until then and no longer.
    """

    is_write: bool
    port: int
    size: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody counts with
    data: memoryview


class Mmio(NamedTuple):
    """An access to guest-physical `address`; `data` (1 to 8 bytes) as in PortIo."""

    is_write: bool
    address: int
    data: memoryview


class DebugStop(NamedTuple):
    """A KVM_GUESTDBG stop: vector 1 or 3, linear address, and DR6 and DR7 as they would be."""

    exception: int
    pc: int
    dr6: int
    dr7: int


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """A request to the machine: `kind` is KVM_SYSTEM_EVENT_*."""

    kind: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InternalError:
    """The accelerator could not go on: KVM_INTERNAL_ERROR_* and what it says about it."""

    suberror: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FailEntry:
    """The processor refused the guest's state; the reason is the hardware's number."""

    reason: int
    cpu: int

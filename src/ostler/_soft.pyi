# ruff: noqa: PYI021 - this stub is the contract, and its docstrings say it
"""The software CPU: KVM in user space. This file is the native part's contract.

Requests carry KVM's ioctl numbers and structures (`ostler.abi.kvm`). A `bytearray` holds the
structure, with the entries of a variable-size one behind its header, and is updated in place; an
`int` is passed as eight little-endian bytes. Host addresses inside structures (memory slots, dirty
bitmaps) are used as they are: the caller keeps what they point to alive and in place.
Every method raises OSError with KVM's errno; a defect of the engine itself raises RuntimeError.
Every object may be used from every thread; `Vcpu.run` from one at a time.
"""

from typing import final

__version__: str

@final
class System:
    """Plays /dev/kvm."""

    def __init__(self) -> None: ...
    def ioctl(self, request: int, arg: bytearray | int = 0) -> int:
        """KVM_GET_API_VERSION, KVM_CHECK_EXTENSION, KVM_GET_SUPPORTED_CPUID, ..."""
    def create_vm(self) -> Vm:
        """KVM_CREATE_VM."""
    def close(self) -> None:
        """Give it up; every later call raises OSError(EBADF). VMs made from it stay."""

@final
class Vm:
    """A virtual machine; it lives as long as it or one of its vCPUs is referred to."""

    def ioctl(self, request: int, arg: bytearray | int = 0) -> int:
        """Memory slots, irqchip, PIT, routing, eventfds, dirty log, clock."""
    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU."""
    def stats(self) -> dict[str, int]:
        """What the engine did for all vCPUs together: a measure, no part of KVM's API. Never waits.

        instructions retired, blocks decoded, translations, code_bytes made, flushes of all code, entries of
        translated code, tlb_misses, epochs (all that is known of where code is became
        void), invalidations of code by stores, exits to user space. A running vCPU's
        share is as of its last interrupt.
        """
    def invalidate(self, gpa: int, size: int) -> None:
        """The host wrote guest memory: forget code decoded from there."""
    def close(self) -> None:
        """Give it up; its vCPUs stay usable until they are closed."""

@final
class Vcpu:
    """A virtual CPU."""

    def ioctl(self, request: int, arg: bytearray | int = 0) -> int:
        """Every KVM_GET_* and KVM_SET_* of a vCPU."""
    def run(self) -> None:
        """KVM_RUN: returns with the exit in `run_page`, or raises InterruptedError. No GIL held."""
    @property
    def run_page(self) -> memoryview:
        """`struct kvm_run` and the port-data page behind it, writable, shared with the engine."""
    @property
    def instructions(self) -> int:
        """Instructions retired so far: a measure, no part of KVM's API. Waits for a running `run()`."""
    def kick(self) -> None:
        """Make the running `run()`, or else the next, raise InterruptedError."""
    def close(self) -> None:
        """Give it up; a `run()` under way goes on, views of `run_page` stay valid."""

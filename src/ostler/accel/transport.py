"""What an accelerator's two carriers have in common: ioctl-shaped objects, as `_soft.pyi` describes.

The kernel's carrier (`ostler.accel.kvm`) and the engine (`ostler._soft`) both fit these Protocols,
so that there is one implementation of VM and VCPU above them.
"""

import os
from typing import Protocol

from ostler.abi.kvm import requests
from ostler.abi.kvm.caps import REQUIRED
from ostler.errors import AccelError, AccelUnavailable

_NAMES = {
    number: name for name, number in vars(requests).items() if name.startswith("KVM_") and isinstance(number, int)
}


class Channel(Protocol):
    """Anything that answers requests; raises OSError with KVM's errno."""

    def ioctl(self, request: int, arg: bytearray | int = 0) -> int:
        """One request; a bytearray is updated in place."""


class VcpuTransport(Channel, Protocol):
    """Carries one vCPU."""

    def run(self) -> None:
        """KVM_RUN; raises InterruptedError when kicked."""

    @property
    def run_page(self) -> memoryview:
        """`struct kvm_run` with the port-data page."""

    def kick(self) -> None:
        """Make the running `run()`, or else the next, raise InterruptedError."""

    def close(self) -> None:
        """Release it."""


class VmTransport(Channel, Protocol):
    """Carries one VM."""

    def create_vcpu(self, vcpu_id: int) -> VcpuTransport:
        """KVM_CREATE_VCPU."""

    def invalidate(self, gpa: int, size: int) -> None:
        """The host wrote guest memory."""

    def stats(self) -> dict[str, int]:
        """Counters, as far as there are any."""

    def close(self) -> None:
        """Release it."""


class SystemTransport(Channel, Protocol):
    """Carries the accelerator itself."""

    def create_vm(self) -> VmTransport:
        """KVM_CREATE_VM."""

    def close(self) -> None:
        """Release it."""


def request_name(request: int) -> str:
    """The kernel's name of an ioctl number, for messages."""
    return _NAMES.get(request, f"request {request:#010x}")


def call(channel: Channel, request: int, arg: bytearray | int = 0, *, subject: str = "") -> int:
    """`channel.ioctl`, with failures as AccelError: "KVM_SET_SREGS (vCPU 1): Invalid argument"."""
    try:
        return channel.ioctl(request, arg)
    except OSError as error:
        where = f" ({subject})" if subject else ""
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise AccelError(f"{request_name(request)}{where}: {reason}") from error


def require_features(channel: Channel, name: str) -> None:
    """See that what calls itself KVM has what Ostler cannot do without. Raises AccelUnavailable, naming it."""
    try:
        version = channel.ioctl(requests.KVM_GET_API_VERSION)
    except OSError as error:
        raise AccelUnavailable(f"{name} is not KVM: {error.strerror}") from error
    if version != requests.KVM_API_VERSION:
        raise AccelUnavailable(f"{name} speaks API version {version}, expected {requests.KVM_API_VERSION}")
    missing = [f"KVM_CAP_{cap.name}" for cap in REQUIRED if channel.ioctl(requests.KVM_CHECK_EXTENSION, cap) <= 0]
    if missing:
        raise AccelUnavailable(f"{name} is too old: it lacks {', '.join(missing)}")

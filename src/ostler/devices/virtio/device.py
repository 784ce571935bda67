"""What a virtio device is to a transport, virtio 1.2 chapter 2 from the device's side.

A device knows its features, its configuration and its queues, and nothing of PCI, file descriptors
or threads. The transport calls it under the board's lock: `activate` when the driver has set
DRIVER_OK, `kicked` when it notified a queue, `reset` when it starts anew. A back end that
completes later calls the device on the event loop's thread, under the same lock.

A kick may come for an empty queue, and one kick may stand for several: drain the queue, then `flush` once. A device
that has served a ring's worth of chains and finds more leaves them for `kick_again`, so that the loop gets on.
QueueError may leave `kicked` and `activate`; elsewhere a device hands it to `broken`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from ostler.devices.state import Saved
from ostler.devices.virtio.chain import QueueError
from ostler.devices.virtio.queue import Virtqueue
from ostler.errors import StateError


def _unconnected() -> None:
    """No transport yet: nobody has been told anything that could have changed."""


def _unconnected_error(error: QueueError) -> None:
    raise error


def _unconnected_kick(index: int) -> None:
    """Nobody to come back: tests without a transport kick by themselves."""


class VirtioDevice(ABC):
    """One device behind a transport."""

    device_type: ClassVar[int]
    """Its number in chapter 5 of the specification."""

    queue_sizes: tuple[int, ...]
    """Largest size of each queue, powers of two."""
    features: int = 0
    """Device-specific bits on offer; the transport adds VERSION_1, EVENT_IDX and INDIRECT_DESC."""

    shares_memory: ClassVar[bool] = False
    """Another program serves it and maps guest memory, which then must be a memfd."""

    def __init__(self) -> None:
        self.config_changed: Callable[[], None] = _unconnected
        """Raises a configuration-change interrupt; set by the transport."""
        self.broken: Callable[[QueueError], None] = _unconnected_error
        """Stops the device until the driver resets it; set by the transport."""
        self.kick_again: Callable[[int], None] = _unconnected_kick
        """Have `kicked` called once more, in a later round of the event loop; set by the transport."""

    @abstractmethod
    def activate(self, queues: Sequence[Virtqueue], features: int) -> None:
        """The driver is ready: DRIVER_OK. A queue the driver left alone has `enabled` false and stays empty."""

    @abstractmethod
    def kicked(self, index: int) -> None:
        """The driver notified the queue `index`. Raises QueueError."""

    @abstractmethod
    def reset(self) -> None:
        """Forget queues, views and what the driver negotiated; completions on their way must do nothing."""

    def read_config(self, offset: int, size: int) -> int:  # noqa: ARG002
        """Device-specific configuration, little-endian; zero beyond its end."""
        return 0

    def write_config(self, offset: int, size: int, value: int) -> None:  # noqa: B027
        """Most devices have no field a driver may write: count it, or ignore it as the specification says."""

    def drain(self) -> None:  # noqa: B027
        """Finish what is under way at the back end, before `save`."""

    def save(self) -> Saved:
        """State beyond queues and features, which the transport saves."""
        return {}

    def restore(self, data: Mapping[str, object]) -> None:
        """Between `reset` and `activate`, which is followed by a kick of every queue. Raises StateError."""
        if data:
            raise StateError(f"virtio device {self.device_type}: saved state has unknown entries {sorted(data)[:8]}")


def read_field(config: bytes, offset: int, size: int) -> int:
    """`size` bytes of a configuration structure from `offset` on; zero beyond its end."""
    return int.from_bytes(config[offset : offset + size], "little")

"""What the back ends of a guest's devices are given by the process they live in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ostler.backends.loop import Host
from ostler.devices.virtio.rate_limit import RateLimit
from ostler.devices.wiring import Clock
from ostler.machine.board import BoardTimer

if TYPE_CHECKING:
    from ostler.backends.disk_layers import DiskImage


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Handed down from the VM process."""

    host: Host
    folder: Path | None
    """The guest's runtime folder, where its sockets are; None where it has none, and then it has no vsock."""
    report: Callable[[str, str], None]
    """Tell the user of a device's trouble: the device, one line. On the loop's thread."""
    clock: Clock
    new_timer: Callable[[], BoardTimer]
    disks: Mapping[str, DiskImage] = field(default_factory=dict)
    """What throw-away disks begin with, by the devices' names, where that is more than their base."""
    is_incoming: bool = False
    """The guest still runs elsewhere: what only one may hold is not taken yet."""
    when_moved: list[Callable[[Path], None]] = field(default_factory=list)
    """Called with another runtime folder when that is the guest's from now on. Before the loop runs."""
    goes_on: bool = False
    """Whether the guest goes on from somewhere: milliseconds count, and nobody waits for what it does not need yet."""

    def limit(self, bytes_per_s: int | None) -> RateLimit | None:
        """What holds a device to so much; None for one that is not held."""
        if bytes_per_s is None:
            return None
        timer = self.new_timer()
        limit = RateLimit(bytes_per_s, clock=self.clock, timer=timer)
        timer.call(limit.expired)
        return limit

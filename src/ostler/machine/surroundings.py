"""What the back ends of a guest's devices are given by the process they live in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ostler.backends.loop import Host
from ostler.devices.wiring import Clock
from ostler.machine.board import BoardTimer


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

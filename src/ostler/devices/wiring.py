"""What a device is given instead of reaching for it: interrupt lines, clocks, timers, power.

A device never sees an accelerator, a thread or a file descriptor. The machine injects these;
tests inject fakes. All calls into one device are serialised by whoever owns the board.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

NS_PER_SECOND = 1_000_000_000


class IrqLine:
    """One wire into the interrupt controllers; tells them only of changes."""

    __slots__ = ("_drive", "level")

    def __init__(self, drive: Callable[[int], None]) -> None:
        """`drive(level)` sets the wire of a GSI to 0 or 1."""
        self._drive = drive
        self.level = 0

    def set(self, level: int) -> None:
        """Drive the wire; a repeated level costs nothing."""
        if level != self.level:
            self.level = level
            self._drive(level)


class Clock(Protocol):
    """Both clocks a board has, in nanoseconds."""

    def monotonic_ns(self) -> int:
        """Time that only moves on: for counters and timers."""

    def wall_ns(self) -> int:
        """Time of day since 1970 in UTC: for the real-time clock."""


class Timer(Protocol):
    """One alarm of one device. Its expiry calls what the machine was told, on the event loop."""

    def arm(self, deadline_ns: int) -> None:
        """Expire at this monotonic time; replaces an earlier deadline."""

    def disarm(self) -> None:
        """Forget the deadline."""


class PowerEvent(Enum):
    """How a guest ends its run through a device."""

    POWER_OFF = "power-off"
    RESET = "reset"
    PANIC = "panic"
    CRASH_LOADED = "crash kernel loaded"
    DEBUG_EXIT = "debug exit"
    HANG = "watchdog expired"


class PowerSink(Protocol):
    """Where devices announce the end of the guest. Later announcements do not undo the first."""

    def __call__(self, event: PowerEvent, code: int = 0) -> None:
        """`code` is the exit status of DEBUG_EXIT and 0 otherwise."""

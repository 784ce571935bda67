"""The watchdog, as the ACPI table WDAT describes it to Linux's `wdat_wdt` (`ostler.boot.acpi.wdat`).

The table names an instruction for each action, so the registers are the board's own choice: five of 32 bits each.

    0x00 COUNT    how many periods the guest has until it must write RELOAD
    0x04 LEFT     periods left, read only
    0x08 CONTROL  RUNNING
    0x0C RELOAD   a write begins the count anew
    0x10 STATUS   FIRED: it ended the previous run; written ones clear

It is chosen before a PCI watchdog because stock kernels for virtual machines have its driver and no other.
Left out on purpose: doing anything by itself. When the time is over, whoever owns the guest decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ostler.devices.state import Saved, load, save, uint
from ostler.devices.wiring import Clock, Timer
from ostler.registers import Register, bit

WATCHDOG_PORT, WATCHDOG_SIZE = 0x620, 0x14
COUNT, LEFT, CONTROL, RELOAD, STATUS = 0x00, 0x04, 0x08, 0x0C, 0x10
PERIOD_MS = 100
NS_PER_PERIOD = PERIOD_MS * 1_000_000
MIN_COUNT, MAX_COUNT = 1, 0xFFFF
REGISTER_BYTES = 4


class Control(Register):
    """What the guest switches."""

    RUNNING = bit(0)


class Status(Register):
    """What happened."""

    FIRED = bit(0)


@dataclass(slots=True)
class WatchdogState:
    """The registers; how much time was left is not kept: who goes on elsewhere gets all of it again."""

    count: int = uint(16, 300)
    control: int = uint(1)
    status: int = uint(1)


class Watchdog:
    """Calls back when a guest that started it does not feed it."""

    def __init__(self, *, clock: Clock, timer: Timer, fired: Callable[[], None]) -> None:
        self._clock, self._timer, self._fired = clock, timer, fired
        self._state = WatchdogState()
        self._deadline_ns = 0

    @property
    def is_running(self) -> bool:
        """Whether the guest has started it."""
        return bool(self._state.control & Control.RUNNING)

    @property
    def timeout_s(self) -> float:
        """How long the guest has."""
        return self._state.count * PERIOD_MS / 1000

    def feed(self) -> None:
        """All of the time again, if it is running."""
        if self.is_running:
            self._deadline_ns = self._clock.monotonic_ns() + self._state.count * NS_PER_PERIOD
            self._timer.arm(self._deadline_ns)
        else:
            self._timer.disarm()

    def read(self, offset: int, size: int) -> int:
        register = offset & ~(REGISTER_BYTES - 1)
        values = {COUNT: self._state.count, LEFT: self._left(), CONTROL: self._state.control,
                  STATUS: self._state.status}  # fmt: skip
        return values.get(register, 0) >> 8 * (offset - register) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        # Whole registers only, as the table says; a part of one is no instruction of it.
        if size != REGISTER_BYTES or offset % REGISTER_BYTES:
            return
        if offset == COUNT:
            self._state.count = min(max(value, MIN_COUNT), MAX_COUNT)
            self.feed()
        elif offset == CONTROL:
            self._state.control = value & Control.RUNNING
            self.feed()
        elif offset == RELOAD:
            self.feed()
        elif offset == STATUS:
            self._state.status &= ~value

    def expired(self) -> None:
        """The timer's deadline has come."""
        if self.is_running:
            self._state.status |= Status.FIRED
            self._fired()

    def save(self) -> Saved:
        return save(self._state)

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing."""
        self._state = load(WatchdogState, "watchdog", data)
        self.feed()

    def _left(self) -> int:
        if not self.is_running:
            return self._state.count
        return max(self._deadline_ns - self._clock.monotonic_ns(), 0) // NS_PER_PERIOD

"""How a guest talks to its hypervisor without a driver: exit port, console port, panic port.

Conventions of QEMU's isa-debug-exit, Bochs' port 0xE9 and QEMU's pvpanic (docs/specs/pvpanic).
"""

from __future__ import annotations

from collections.abc import Callable

from ostler.devices.wiring import PowerEvent, PowerSink
from ostler.registers import Register, bit

DEBUG_EXIT_PORT, DEBUG_EXIT_SIZE = 0xF4, 4
DEBUG_CONSOLE_PORT = 0xE9
PVPANIC_PORT = 0x505


class PanicEvents(Register):
    """pvpanic's one register: what is supported when read, what happened when written."""

    PANICKED = bit(0)
    CRASH_LOADED = bit(1)
    SHUTDOWN = bit(2)


class DebugExit:
    """Ends the run with status `value << 1 | 1`, never zero and so never mistaken for success."""

    def __init__(self, power: PowerSink) -> None:
        self._power = power

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        return 0

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        self._power(PowerEvent.DEBUG_EXIT, (value << 1 | 1) & 0xFF)


class DebugConsole:
    """Every byte written is output; reading gives the port's number, which says it is there."""

    def __init__(self, sink: Callable[[int], None]) -> None:
        self._sink = sink

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        return DEBUG_CONSOLE_PORT

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        self._sink(value & 0xFF)


class PvPanic:
    """The guest's kernel reports its panic, or that a crash kernel takes over."""

    def __init__(self, power: PowerSink) -> None:
        self._power = power

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        return PanicEvents.declared()

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        if value & PanicEvents.PANICKED:
            self._power(PowerEvent.PANIC)
        elif value & PanicEvents.SHUTDOWN:
            self._power(PowerEvent.POWER_OFF)
        elif value & PanicEvents.CRASH_LOADED:
            self._power(PowerEvent.CRASH_LOADED)

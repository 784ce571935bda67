"""WDAT, the watchdog action table: Microsoft's Hardware Watchdog Timers Design Specification, revision 1.01, section 3.

Each entry says how an action is done: read or write a register, with a value or the driver's count.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

READ_VALUE, READ_COUNTDOWN, WRITE_VALUE, WRITE_COUNTDOWN = range(4)
RESET, GET_CURRENT_COUNTDOWN, GET_COUNTDOWN, SET_COUNTDOWN = 0x01, 0x04, 0x05, 0x06
GET_RUNNING, SET_RUNNING, GET_STOPPED, SET_STOPPED = 0x08, 0x09, 0x0A, 0x0B
GET_STATUS, SET_STATUS = 0x20, 0x21
ENABLED = 1
NO_PCI_SEGMENT, NO_PCI = 0x00FF, 0xFF
HEADER = struct.Struct("<IHBBB3xIIIB3xI")
ENTRY = struct.Struct("<BBxxBBBBQII")
IO_SPACE, DWORD_BITS, DWORD_ACCESS = 1, 32, 3
ALL = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class AcpiWatchdog:
    """Ports of its registers, and how it counts."""

    count_port: int
    left_port: int
    control_port: int
    reload_port: int
    status_port: int
    period_ms: int
    min_count: int
    max_count: int


def wdat_body(watchdog: AcpiWatchdog) -> bytes:
    """The table behind its header."""
    control = watchdog.control_port
    entries = [
        _entry(RESET, WRITE_VALUE, watchdog.reload_port, 1),
        _entry(GET_CURRENT_COUNTDOWN, READ_COUNTDOWN, watchdog.left_port, 0),
        _entry(GET_COUNTDOWN, READ_COUNTDOWN, watchdog.count_port, 0),
        _entry(SET_COUNTDOWN, WRITE_COUNTDOWN, watchdog.count_port, 0),
        _entry(GET_RUNNING, READ_VALUE, control, 1, mask=1),
        _entry(SET_RUNNING, WRITE_VALUE, control, 1),
        _entry(GET_STOPPED, READ_VALUE, control, 0, mask=1),
        _entry(SET_STOPPED, WRITE_VALUE, control, 0),
        _entry(GET_STATUS, READ_VALUE, watchdog.status_port, 1, mask=1),
        _entry(SET_STATUS, WRITE_VALUE, watchdog.status_port, 1),
    ]
    header = HEADER.pack(
        HEADER.size, NO_PCI_SEGMENT, NO_PCI, NO_PCI, NO_PCI, watchdog.period_ms, watchdog.max_count,
        watchdog.min_count, ENABLED, len(entries),
    )  # fmt: skip
    return header + b"".join(entries)


def _entry(action: int, instruction: int, port: int, value: int, *, mask: int = ALL) -> bytes:
    return ENTRY.pack(action, instruction, IO_SPACE, DWORD_BITS, 0, DWORD_ACCESS, port, value, mask)

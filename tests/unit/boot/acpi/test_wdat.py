"""The watchdog action table, entry by entry as Linux's drivers/watchdog/wdat_wdt.c reads it."""

from __future__ import annotations

import struct

from ostler.boot.acpi import AcpiWatchdog
from ostler.boot.acpi.wdat import wdat_body


def test_wdat_names_every_action_with_its_register() -> None:
    body = wdat_body(
        AcpiWatchdog(count_port=0x620, left_port=0x624, control_port=0x628, reload_port=0x62C, status_port=0x630,
                     period_ms=100, min_count=1, max_count=0xFFFF)
    )  # fmt: skip
    length, segment, bus, device, function = struct.unpack_from("<IHBBB", body)
    assert (length, segment, bus, device, function) == (32, 0xFF, 0xFF, 0xFF, 0xFF)
    period, most, least, flags, count = struct.unpack_from("<IIIB3xI", body, 12)
    assert (period, most, least, flags, count) == (100, 0xFFFF, 1, 1, 10)
    assert len(body) == 32 + 24 * count
    entries = {}
    for action, instruction, space, width, offset, access, address, value, mask in struct.iter_unpack(
        "<BBxxBBBBQII", body[32:]
    ):
        assert (space, width, offset, access) == (1, 32, 0, 3)
        entries[action] = (instruction, address, value, mask)
    assert entries[0x01] == (2, 0x62C, 1, 0xFFFF_FFFF)
    assert entries[0x06] == (3, 0x620, 0, 0xFFFF_FFFF)
    assert entries[0x04] == (1, 0x624, 0, 0xFFFF_FFFF)
    assert entries[0x08] == (0, 0x628, 1, 1)
    assert entries[0x0B] == (2, 0x628, 0, 0xFFFF_FFFF)
    assert entries[0x20] == (0, 0x630, 1, 1)

"""Where boot structures lie in the first 640 KiB, and the memory map kernels are given.

    0x0500     GDT                       0x9000   page tables, six pages
    0x6000     PVH or multiboot info     0x2_0000 command line, up to 64 KiB
    0x7000     Linux zero page

A kernel copies what it needs before it takes low memory for itself.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ostler.errors import BadRequest
from ostler.memory import Gpa, GuestMemory
from ostler.memory.layout import (
    ACPI_LIMIT,
    ACPI_START,
    EBDA_START,
    HIGH_MEMORY_START,
    PAGE_SIZE,
    PCI_ECAM_BASE,
    PCI_ECAM_SIZE,
)

GDT_BASE = Gpa(0x500)
INFO_BASE = Gpa(0x6000)
ZERO_PAGE = Gpa(0x7000)
PAGE_TABLES = Gpa(0x9000)
CMDLINE_BASE = Gpa(0x2_0000)
CMDLINE_MAX = 0x1_0000

BOOT_CODE, BOOT_DATA, BOOT_TSS = 0x10, 0x18, 0x20

E820_RAM, E820_RESERVED = 1, 2

_FLAT_CODE_32, _FLAT_CODE_64 = 0x00CF_9B00_0000_FFFF, 0x00AF_9B00_0000_FFFF
_FLAT_DATA, _TSS = 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067


@dataclass(frozen=True, slots=True)
class MapEntry:
    """One entry of the e820 map."""

    start: Gpa
    size_bytes: int
    kind: int


def memory_map(memory: GuestMemory) -> list[MapEntry]:
    """RAM as an operating system may use it: without the EBDA and the ACPI tables."""
    entries = [MapEntry(Gpa(0), EBDA_START, E820_RAM)]
    entries.append(MapEntry(EBDA_START, 0xA_0000 - EBDA_START, E820_RESERVED))
    entries.append(MapEntry(ACPI_START, ACPI_LIMIT - ACPI_START, E820_RESERVED))
    for region in memory.regions:
        start = max(region.start, HIGH_MEMORY_START)
        if region.end > start:
            entries.append(MapEntry(Gpa(start), region.end - start, E820_RAM))
    # Linux believes in the ECAM of the MCFG table only where the memory map or the DSDT reserves it.
    entries.append(MapEntry(PCI_ECAM_BASE, PCI_ECAM_SIZE, E820_RESERVED))
    return entries


def reserved_ranges(*, long_mode: bool) -> list[tuple[int, int]]:
    """Where no segment may go: boot structures, which the guest still needs, and the PC's own areas."""
    structures_end = PAGE_TABLES + 6 * PAGE_SIZE if long_mode else ZERO_PAGE
    return [
        (0, GDT_BASE + PAGE_SIZE - GDT_BASE % PAGE_SIZE),
        (INFO_BASE, structures_end),
        (CMDLINE_BASE, CMDLINE_BASE + CMDLINE_MAX),
        (EBDA_START, ACPI_LIMIT),
    ]


def write_gdt(memory: GuestMemory, *, long_mode: bool) -> int:
    """The flat segments both boot protocols ask for; returns the table's size in bytes."""
    code = _FLAT_CODE_64 if long_mode else _FLAT_CODE_32
    table = struct.pack("<5Q", 0, 0, code, _FLAT_DATA, _TSS)
    memory.write(GDT_BASE, table)
    return len(table)


def write_cmdline(memory: GuestMemory, cmdline: str, *, limit: int = CMDLINE_MAX - 1) -> Gpa:
    """Zero-terminated. Raises BadRequest beyond `limit` bytes or with a zero inside."""
    data = cmdline.encode("utf-8", "surrogateescape")
    if len(data) > limit:
        raise BadRequest(f"kernel command line of {len(data)} bytes: this kernel takes at most {limit}")
    if b"\0" in data:
        raise BadRequest("kernel command line: contains a zero byte, expected text")
    memory.write(CMDLINE_BASE, data + b"\0")
    return CMDLINE_BASE

"""The guest-physical address map of Ostler's board.

    0x0000_0000 .. up to 3 GiB   RAM below the hole
    0xC000_0000 .. 0xFFFF_FFFF   the hole:
        0xC000_0000 .. 0xDFFF_FFFF   windows of PCI devices
        0xE000_0000 .. 0xE00F_FFFF   PCI configuration space of bus 0 (ECAM)
        0xFEC0_0000, 0xFEE0_0000     IOAPIC, LAPIC; 0xFF00_0000 memory of test devices
    0x1_0000_0000 ..             RAM above 4 GiB, what did not fit below
    0x78_0000_0000 .. 0x7F_FFFF_FFFF   windows of PCI devices, 64 bits wide

The PC's own areas inside low RAM (0x9_FC00 to 0x10_0000) are plain RAM to the accelerator
and reserved in the map a kernel is given; the ACPI tables live there. Left out on purpose:
a video frame buffer at 0xA_0000 and firmware at the top of 4 GiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NewType

Gpa = NewType("Gpa", int)

PAGE_SIZE = 0x1000

LOW_RAM_LIMIT = Gpa(0xC000_0000)
HIGH_RAM_START = Gpa(0x1_0000_0000)
# The narrowest processor model we offer has 39 physical address bits.
PHYSICAL_LIMIT = Gpa(1 << 39)
PCI_LOW_START, PCI_LOW_SIZE = Gpa(0xC000_0000), 0x2000_0000
PCI_ECAM_BASE, PCI_ECAM_SIZE = Gpa(0xE000_0000), 0x10_0000
PCI_HIGH_SIZE = 0x8_0000_0000
PCI_HIGH_START = Gpa(PHYSICAL_LIMIT - PCI_HIGH_SIZE)

EBDA_START = Gpa(0x9_FC00)
ACPI_START = Gpa(0xE_0000)
ACPI_LIMIT = Gpa(0x10_0000)
# The last page of the tables' area: sixteen bytes that differ whenever the guest is another than it was.
GENERATION_ID, GENERATION_ID_BYTES = Gpa(0xF_F000), 16
HIGH_MEMORY_START = Gpa(0x10_0000)

IOAPIC_BASE = Gpa(0xFEC0_0000)
LAPIC_BASE = Gpa(0xFEE0_0000)
TEST_MEMORY_BASE = Gpa(0xFF00_0000)


class RegionKind(Enum):
    """What an accelerator must do with writes to a region."""

    RAM = "ram"
    ROM = "rom"


@dataclass(frozen=True, slots=True)
class Region:
    """`size_bytes` of memory at `start`, backed from `offset` of the memfd on."""

    start: Gpa
    size_bytes: int
    offset: int
    kind: RegionKind = RegionKind.RAM

    @property
    def end(self) -> Gpa:
        """The first address behind the region."""
        return Gpa(self.start + self.size_bytes)


def ram_regions(size_bytes: int) -> tuple[Region, ...]:
    """Place `size_bytes` of RAM around the hole. Pages only; raises ValueError otherwise."""
    if size_bytes <= 0 or size_bytes % PAGE_SIZE:
        raise ValueError(f"guest memory of {size_bytes} bytes: expected whole pages")
    low = min(size_bytes, LOW_RAM_LIMIT)
    regions = [Region(Gpa(0), low, 0)]
    if size_bytes > low:
        regions.append(Region(HIGH_RAM_START, size_bytes - low, low))
    if regions[-1].end > PCI_HIGH_START:
        raise ValueError(f"guest memory of {size_bytes} bytes: reaches beyond {PCI_HIGH_START:#x}")
    return tuple(regions)

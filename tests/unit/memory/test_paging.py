"""Page-table walks over tables made by hand: one of each shape the SDM's chapter 4 knows."""

from __future__ import annotations

import pytest

from ostler.memory.guest import MemoryFault
from ostler.memory.paging import (
    CR0_PG,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    EFER_NXE,
    EXECUTE_DISABLE,
    Mode,
    Paging,
    Walker,
)

MEMORY_BYTES = 1 << 20
RW = 0b111
LARGE = 1 << 7


class Tables:
    """A megabyte of memory and the registers that make it paging's."""

    def __init__(self, *, cr3: int = 0x1000, cr4: int = CR4_PAE, efer: int = EFER_LMA | EFER_NXE) -> None:
        self.memory = bytearray(MEMORY_BYTES)
        self.paging = Paging(CR0_PG, cr3, cr4, efer, 39)

    def put(self, gpa: int, value: int, size: int = 8) -> None:
        self.memory[gpa : gpa + size] = value.to_bytes(size, "little")

    def read(self, gpa: int, size: int) -> bytes:
        if gpa + size > MEMORY_BYTES:
            raise MemoryFault(gpa, size)
        return bytes(self.memory[gpa : gpa + size])

    @property
    def walker(self) -> Walker:
        return Walker(self.paging, self.read, outside=MemoryFault)


def four_levels() -> Tables:
    """0x7f12_3456_7000 leads to 0x8_9000 by tables at 0x1000, 0x2000, 0x3000 and 0x4000."""
    tables = Tables()
    tables.put(0x1000 + 8 * 0xFE, 0x2000 | RW)
    tables.put(0x2000 + 8 * 0x48, 0x3000 | RW)
    tables.put(0x3000 + 8 * 0x1A2, 0x4000 | RW)
    tables.put(0x4000 + 8 * 0x167, 0x8_9000 | 0b1 | 1 << 5 | 1 << 6 | EXECUTE_DISABLE)
    return tables


LINEAR = 0x7F12_3456_7ABC


def test_walk_of_four_levels_finds_the_byte_and_its_rights() -> None:
    found = four_levels().walker.walk(LINEAR)
    assert (found.physical, found.page_bytes) == (0x8_9ABC, 0x1000)
    assert (found.writable, found.user, found.executable) == (False, False, False)
    assert (found.accessed, found.dirty) == (True, True)
    assert [each.name for each in found.entries] == ["PML4E", "PDPTE", "PDE", "PTE"]
    assert [each.gpa for each in found.entries] == [0x17F0, 0x2240, 0x3D10, 0x4B38]


def test_walk_of_large_pages_keeps_the_offset_in_them() -> None:
    tables = four_levels()
    tables.put(0x3000 + 8 * 0x1A2, 0x1234_0000_0000 & 0x7F_FFE0_0000 | 0x20_0000 | RW | LARGE)
    found = tables.walker.walk(LINEAR)
    assert found.page_bytes == 2 << 20
    assert found.physical == (0x1234_0000_0000 & 0x7F_FFE0_0000 | 0x20_0000) + (LINEAR & 0x1F_FFFF)
    tables.put(0x2000 + 8 * 0x48, 0x4000_0000 | RW | LARGE)
    found = tables.walker.walk(LINEAR)
    assert (found.page_bytes, found.physical) == (1 << 30, 0x4000_0000 + (LINEAR & 0x3FFF_FFFF))


@pytest.mark.parametrize(
    ("gpa", "value", "fault"),
    [
        (0x4B38, 0x8_9000, "PTE at 0x4b38: not present"),
        (0x3D10, 0, "PDE at 0x3d10: not present"),
        (0x17F0, 0x2000 | RW | LARGE, "PML4E at 0x17f0: reserved bits set"),
        (0x4B38, 1 << 40 | 0x8_9000 | RW, "PTE at 0x4b38: reserved bits set"),
        (0x3D10, 0x20_0000 | RW | LARGE | 1 << 14, "PDE at 0x3d10: reserved bits set"),
        (0x17F0, 0x40_0000_0000 | RW, "PDPTE at 0x4000000240: outside of memory"),
    ],
)
def test_walk_that_comes_to_nothing_says_where(gpa: int, value: int, fault: str) -> None:
    tables = four_levels()
    tables.put(gpa, value)
    found = tables.walker.walk(LINEAR)
    assert (found.physical, found.fault) == (None, fault)


def test_walk_without_nxe_refuses_the_bit() -> None:
    tables = four_levels()
    tables.paging = Paging(CR0_PG, 0x1000, CR4_PAE, EFER_LMA, 39)
    assert tables.walker.walk(LINEAR).fault.endswith("reserved bits set")


def test_walk_of_address_that_is_not_canonical_reads_nothing() -> None:
    assert four_levels().walker.walk(0x8000_0000_0000).fault == "not canonical in 4-level paging"
    assert four_levels().walker.walk(0xFFFF_8000_0000_0000).fault.endswith("not present")
    assert four_levels().walker.walk(1 << 64).fault.startswith("not canonical")


def test_walk_of_five_levels_begins_one_higher() -> None:
    tables = four_levels()
    tables.paging = Paging(CR0_PG, 0x5000, CR4_PAE | CR4_LA57, EFER_LMA | EFER_NXE, 39)
    tables.put(0x5000 + 8 * 3, 0x1000 | RW)
    linear = 3 << 48 | LINEAR & (1 << 48) - 1
    assert tables.walker.mode is Mode.LEVEL_5
    assert tables.walker.walk(linear).physical == 0x8_9ABC


def test_walk_of_pae_takes_the_root_from_32_byte_steps_and_no_rights_from_it() -> None:
    tables = Tables(cr3=0x1020, efer=0)
    tables.put(0x1020 + 8 * 3, 0x2001)
    tables.put(0x2000 + 8 * 0x1FF, 0x3000 | RW)
    tables.put(0x3000 + 8 * 0x1F0, 0xA000 | RW)
    found = tables.walker.walk(0xFFFF_0123)
    assert (found.physical, found.writable, found.user) == (0xA123, True, True)
    tables.put(0x1020 + 8 * 3, 0x2001 | 0b10)
    assert tables.walker.walk(0xFFFF_0123).fault == "PDPTE at 0x1038: reserved bits set"


def test_walk_of_32_bits_has_small_pages_and_with_pse_large_ones_above_4_gib() -> None:
    tables = Tables(cr4=CR4_PSE, efer=0)
    tables.put(0x1000 + 4 * 0x301, 0x3000 | RW, 4)
    tables.put(0x3000 + 4 * 0x5, 0xB000 | 0b101, 4)
    found = tables.walker.walk(0xC040_5678)
    assert (found.physical, found.writable, found.page_bytes) == (0xB678, False, 0x1000)
    tables.put(0x1000 + 4 * 0x301, 0x0140_0000 | 0x12 << 13 | RW | LARGE, 4)
    assert tables.walker.walk(0xC040_5678).physical == 0x12_0140_5678
    tables.put(0x1000 + 4 * 0x301, 0x0140_0000 | 0x80 << 13 | RW | LARGE, 4)
    assert tables.walker.walk(0xC040_5678).fault.endswith("reserved bits set")
    tables.paging = Paging(CR0_PG, 0x1000, 0, 0, 39)
    assert tables.walker.walk(0xC040_5678).fault.startswith("PTE")


def test_walk_without_paging_is_the_address_itself() -> None:
    tables = Tables()
    tables.paging = Paging(0, 0, 0, 0)
    assert tables.walker.walk(0x1234).physical == 0x1234


def test_physical_pages_go_through_a_large_page_in_one_walk() -> None:
    tables = four_levels()
    tables.put(0x3000 + 8 * 0x1A1, 0x60_0000 | RW | LARGE)
    first = (LINEAR & -0x20_0000) - 0x2000
    found = [*tables.walker.physical_pages(first, 0x16A)]
    assert found[:2] == [0x7F_E000, 0x7F_F000]
    assert set(found[2:0x169]) == {None}
    assert found[0x169] == 0x8_9000

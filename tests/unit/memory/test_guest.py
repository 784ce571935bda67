"""Guest memory: placement around the hole, bounds, announcements, slots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.memory import Gpa, GuestMemory, MemoryFault, Region, ram_regions
from ostler.memory.layout import HIGH_RAM_START, LOW_RAM_LIMIT, PAGE_SIZE

MIB = 1 << 20


class Slots:
    """Records what a VM would be told."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int, int, int]] = []

    def set_user_memory_region(self, slot: int, gpa: int, size: int, host_address: int, flags: int = 0) -> None:
        self.calls.append((slot, gpa, size, host_address, flags))


def test_ram_regions_more_than_hole_continues_above_4g() -> None:
    low, high = ram_regions(LOW_RAM_LIMIT + 16 * MIB)
    assert (low.start, low.size_bytes) == (0, LOW_RAM_LIMIT)
    assert (high.start, high.size_bytes, high.offset) == (HIGH_RAM_START, 16 * MIB, LOW_RAM_LIMIT)


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, PAGE_SIZE + 1, 1 << 41])
def test_ram_regions_impossible_size_raises(size: int) -> None:
    with pytest.raises(ValueError, match="guest memory"):
        ram_regions(size)


def test_guest_memory_overlapping_regions_raises() -> None:
    with pytest.raises(ValueError, match="overlap"):
        GuestMemory([Region(Gpa(0), 2 * PAGE_SIZE, 0), Region(Gpa(PAGE_SIZE), PAGE_SIZE, 2 * PAGE_SIZE)])


def test_write_then_read_both_sides_of_hole() -> None:
    regions = [Region(Gpa(0), MIB, 0), Region(HIGH_RAM_START, MIB, MIB)]
    with GuestMemory(regions) as memory:
        memory.write(0x1000, b"low")
        memory.write(HIGH_RAM_START + 0x1000, b"high")
        memory.write_int(0x2000, 8, 0x1122_3344_5566_7788)
        assert memory.read(0x1000, 3) == b"low"
        assert memory.read(HIGH_RAM_START + 0x1000, 4) == b"high"
        assert memory.read_int(0x2000, 4) == 0x5566_7788


@given(gpa=st.integers(-8, 1 << 66), size=st.integers(-8, 1 << 66))
def test_access_any_range_is_served_whole_or_faults(gpa: int, size: int) -> None:
    with GuestMemory.of_size(PAGE_SIZE) as memory:
        inside = gpa >= 0 and size >= 0 and gpa + size <= PAGE_SIZE
        assert memory.contains(gpa, size) is inside
        if inside:
            assert memory.read(gpa, size) == bytes(size)
        else:
            with pytest.raises(MemoryFault):
                memory.read(gpa, size)


def test_write_announces_range_to_hooks() -> None:
    seen: list[tuple[int, int]] = []
    with GuestMemory.of_size(PAGE_SIZE) as memory:
        memory.on_write(lambda gpa, size: seen.append((gpa, size)))
        memory.write(0x10, b"abc")
        with memory.view(0x20, 4) as view:
            view[:] = b"view"
        memory.written(0x20, 4)
        assert memory.read(0x20, 4) == b"view"
    assert seen == [(0x10, 3), (0x20, 4)]


@pytest.mark.parametrize("shared", [True, False])
def test_discard_frees_pages_on_both_sides_of_the_hole_and_announces_them(*, shared: bool) -> None:
    seen: list[tuple[int, int]] = []
    regions = [Region(Gpa(0), MIB, 0), Region(HIGH_RAM_START, MIB, MIB)]
    with GuestMemory(regions, shared=shared) as memory:
        for start in (0x1000, 0x2000, HIGH_RAM_START):
            memory.write(start, b"x" * PAGE_SIZE)
        memory.on_write(lambda gpa, size: seen.append((gpa, size)))
        assert memory.discard(0x2000, HIGH_RAM_START) == MIB - 0x2000 + 0x2000
        assert memory.discard(2 * MIB, PAGE_SIZE) == 0
        kept, *gone = (memory.read(start, 1) for start in (0x1000, 0x2000, HIGH_RAM_START))
    assert (kept, gone) == (b"x", [b"\0", b"\0"])
    assert seen == [(0x2000, MIB - 0x2000), (HIGH_RAM_START, 0x2000)]


def test_register_gives_every_region_as_slot() -> None:
    slots = Slots()
    regions = [Region(Gpa(0), MIB, 0), Region(HIGH_RAM_START, MIB, MIB)]
    with GuestMemory(regions) as memory:
        assert memory.register(slots, first_slot=3) == 5
        base = memory.host_address(0, 1)
    assert slots.calls == [(3, 0, MIB, base, 0), (4, HIGH_RAM_START, MIB, base + MIB, 0)]

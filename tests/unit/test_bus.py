"""Buses: routing, splitting, open-bus reads, overlap checks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.bus import MAX_COUNTED_ADDRESSES, MmioBus, PortBus


class Recorder:
    """Remembers accesses; reads give the offset in every byte."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("r", offset, size, 0))
        return int.from_bytes(bytes([offset]) * size, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("w", offset, size, value))


def test_port_read_unclaimed_gives_ones_and_counts() -> None:
    bus = PortBus()
    assert bus.read(0x1234, 4) == 0xFFFF_FFFF
    assert bus.unclaimed.total == 4
    assert sorted(bus.unclaimed.by_address) == [0x1234, 0x1235, 0x1236, 0x1237]


def test_port_wide_access_to_byte_device_is_split_lowest_first() -> None:
    bus, device = PortBus(), Recorder()
    bus.claim("bytes", 0x70, 4, device)
    assert bus.read(0x70, 4) == 0x0302_0100
    bus.write(0x70, 2, 0xBBAA)
    assert [entry[1] for entry in device.log] == [0, 1, 2, 3, 0, 1]
    assert device.log[4:] == [("w", 0, 1, 0xAA), ("w", 1, 1, 0xBB)]


def test_port_access_across_end_of_claim_mixes_device_and_open_bus() -> None:
    bus, device = PortBus(), Recorder()
    bus.claim("wide", 0x10, 2, device, max_width=4)
    assert bus.read(0x11, 2) == 0xFF01
    assert bus.read(0xFFFF, 2) == 0xFFFF


def test_port_claim_overlap_raises_naming_holder() -> None:
    bus = PortBus()
    bus.claim("first", 0x10, 4, Recorder())
    with pytest.raises(ValueError, match="belongs to first"):
        bus.claim("second", 0x13, 1, Recorder())
    with pytest.raises(ValueError, match="outside"):
        bus.claim("end", 0xFFFF, 2, Recorder())


def test_mmio_routes_by_address_and_splits_odd_sizes() -> None:
    bus, device = MmioBus(), Recorder()
    bus.claim("device", 0x1000, 0x10, device, max_width=4)
    assert bus.read(0x1004, 8) == 0x0808_0808_0404_0404
    bus.write(0x1000, 3, 0x332211)
    assert device.log[-2:] == [("w", 0, 2, 0x2211), ("w", 2, 1, 0x33)]
    assert bus.read(0x2000, 8) == 0xFFFF_FFFF_FFFF_FFFF
    assert bus.unclaimed.by_address == {0x2000: 1}


def test_mmio_claim_overlap_raises() -> None:
    bus = MmioBus()
    bus.claim("first", 0x1000, 0x1000, Recorder())
    for start, size in ((0x0800, 0x801), (0x1800, 1), (0x1FFF, 0x1000), (0x3000, 0)):
        with pytest.raises(ValueError, match="overlaps"):
            bus.claim("second", start, size, Recorder())


def test_mmio_claim_released_is_open_bus_and_free_again() -> None:
    bus = MmioBus()
    bus.claim("first", 0x1000, 0x1000, Recorder())
    assert (bus.is_free(0x1800, 8), bus.is_free(0x2000, 8), bus.is_free(0x3000, 0)) == (False, True, False)
    bus.release(0x1000)
    assert (bus.read(0x1000, 1), bus.is_free(0x1800, 8), bus.claims()) == (0xFF, True, [])
    for start in (0x1000, 0x0):
        with pytest.raises(ValueError, match="no claim begins"):
            bus.release(start)


@given(st.lists(st.tuples(st.integers(0, 0x30), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)), max_size=40))
def test_port_any_access_keeps_device_inside_its_claim(accesses: list[tuple[int, int, int]]) -> None:
    bus, device = PortBus(), Recorder()
    bus.claim("device", 0x10, 7, device, max_width=2)
    for port, size, value in accesses:
        bus.write(port, size, value & ((1 << size * 8) - 1))
        assert 0 <= bus.read(port, size) < 1 << size * 8
    assert all(offset >= 0 and offset + size <= 7 and size <= 2 for _, offset, size, _ in device.log)


def test_unclaimed_many_addresses_stays_bounded() -> None:
    bus = MmioBus()
    for address in range(0, 8 * (MAX_COUNTED_ADDRESSES + 50), 8):
        bus.read(address, 8)
    assert len(bus.unclaimed.by_address) == MAX_COUNTED_ADDRESSES
    assert bus.unclaimed.total == MAX_COUNTED_ADDRESSES + 50

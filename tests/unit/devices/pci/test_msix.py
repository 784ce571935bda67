"""MSI-X: masks, pending bits, what a guest may write."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostler.devices.pci.msix import Msix
from ostler.errors import StateError

ENABLE, MASK_ALL = 1 << 15, 1 << 14
Sent = list[tuple[int, int]]


def make(vectors: int = 3) -> tuple[Msix, Sent]:
    sent: Sent = []
    msix = Msix(vectors, lambda address, data: sent.append((address, data)))
    return msix, sent


def set_up(msix: Msix, vector: int, *, masked: bool = False) -> None:
    for at, value in ((0, 0xFEE0_1000), (4, 1), (8, 0x40 + vector), (12, int(masked))):
        msix.write(16 * vector + at, 4, value)


def test_notify_enabled_vector_sends_its_message() -> None:
    msix, sent = make()
    set_up(msix, 1)
    msix.control(ENABLE, may_send=True)
    msix.notify(1)
    assert sent == [(0x1_FEE0_1000, 0x41)]
    assert msix.read(msix.pending_offset, 8) == 0


@pytest.mark.parametrize("obstacle", ["vector", "function", "master"])
def test_notify_masked_stays_pending_and_is_sent_once_when_unmasked(obstacle: str) -> None:
    msix, sent = make()
    set_up(msix, 2, masked=obstacle == "vector")
    msix.control(ENABLE | (MASK_ALL if obstacle == "function" else 0), may_send=obstacle != "master")
    msix.notify(2)
    msix.notify(2)
    assert (sent, msix.read(msix.pending_offset, 8)) == ([], 4)
    set_up(msix, 2)
    msix.control(ENABLE, may_send=True)
    assert (sent, msix.read(msix.pending_offset, 8)) == ([(0x1_FEE0_1000, 0x42)], 0)


def test_notify_disabled_or_beyond_the_table_is_dropped() -> None:
    msix, sent = make()
    set_up(msix, 0)
    msix.notify(0)
    msix.control(ENABLE, may_send=True)
    msix.notify(3)
    msix.notify(0xFFFF)
    assert sent == []


def test_write_pending_bits_reserved_bits_and_odd_sizes_change_nothing() -> None:
    msix, _ = make()
    msix.write(msix.pending_offset, 8, 0xFF)
    msix.write(12, 4, 0xFFFF_FFFE)
    msix.write(0, 2, 0xFFFF)
    msix.write(2, 4, 0xFFFF)
    assert (msix.read(msix.pending_offset, 8), msix.read(12, 4), msix.read(0, 8)) == (0, 0, 0)


def test_write_eight_bytes_sets_data_and_mask() -> None:
    msix, _ = make()
    msix.write(8, 8, 0xFFFF_FFFF_0000_0007)
    assert (msix.read(8, 4), msix.read(12, 4)) == (7, 1)


def test_restore_keeps_pending_and_refuses_another_shape() -> None:
    msix, sent = make()
    set_up(msix, 1, masked=True)
    msix.control(ENABLE, may_send=True)
    msix.notify(1)
    other, other_sent = make()
    other.restore(*msix.save())
    other.control(ENABLE, may_send=True)
    set_up(other, 1)
    assert (sent, other_sent) == ([], [(0x1_FEE0_1000, 0x41)])
    with pytest.raises(StateError, match="expected 4 vectors"):
        make(4)[0].restore(*msix.save())
    with pytest.raises(StateError):
        make()[0].restore(msix.save()[0], b"\xff")


ACCESS = st.tuples(
    st.sampled_from(["read", "write", "notify", "control"]),
    st.integers(0, 0xFFF),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=200, deadline=None)
@given(accesses=st.lists(ACCESS, max_size=40))
def test_any_accesses_are_answered_and_pending_stays_in_range(accesses: list[tuple[str, int, int, int]]) -> None:
    msix, _ = make(5)
    for kind, offset, size, value in accesses:
        if kind == "read":
            assert msix.read(offset, size) >= 0
        elif kind == "write":
            msix.write(offset, size, value & ((1 << 8 * size) - 1))
        elif kind == "notify":
            msix.notify(offset)
        else:
            msix.control(value & 0xC000, may_send=bool(value & 1))
        assert msix.read(msix.pending_offset, 8) < 1 << 5
    make(5)[0].restore(*msix.save())

"""Private guest memory: aligned for huge pages, counted, given back."""

from __future__ import annotations

import pytest

from ostler.host.anonymous import HUGE_PAGE_BYTES, PrivateMapping
from ostler.memory import GuestMemory

MIB = 1 << 20


def test_private_mapping_is_aligned_zero_and_whole() -> None:
    with PrivateMapping(5 * MIB) as mapping, mapping.view() as view:
        assert mapping.address % HUGE_PAGE_BYTES == 0
        assert len(view) == mapping.size_bytes == 5 * MIB
        assert view[-1] == 0


def test_private_mapping_counts_what_was_touched_and_frees_what_is_discarded() -> None:
    with PrivateMapping(8 * MIB) as mapping, mapping.view() as view:
        assert mapping.touched_bytes == 0
        view[:] = b"x" * len(view)
        assert mapping.touched_bytes == 8 * MIB

        mapping.discard(2 * MIB, 4 * MIB)

        assert mapping.touched_bytes == 4 * MIB
        assert (view[2 * MIB - 1], view[2 * MIB], view[6 * MIB - 1], view[6 * MIB]) == (0x78, 0, 0, 0x78)


def test_guest_memory_that_is_not_shared_has_no_descriptor() -> None:
    with GuestMemory.of_size(16 * MIB, shared=False) as memory:
        memory.write(0x1000, b"guest")

        assert memory.read(0x1000, 5) == b"guest"
        assert memory.host_address(0, 1) % HUGE_PAGE_BYTES == 0
        with pytest.raises(ValueError, match="cannot be shared"):
            _ = memory.fd

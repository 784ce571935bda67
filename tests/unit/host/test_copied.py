"""Copy-on-write mappings: the file stays as it is, and what was written is known."""

from __future__ import annotations

import os

import pytest

from ostler.host.copied import MAX_HOLES, PAGE_BYTES, CopiedMapping, private_ranges
from ostler.host.memfd import SharedMapping

PAGES = 64


def a_file(pages: int = PAGES) -> int:
    fd = os.memfd_create("test")
    os.ftruncate(fd, pages * PAGE_BYTES)
    os.pwrite(fd, b"from the file", PAGE_BYTES)
    return fd


def test_copied_mapping_writes_stay_its_own() -> None:
    fd = a_file()
    other = os.dup(fd)
    with CopiedMapping(fd, PAGES * PAGE_BYTES) as mapping:
        view = mapping.view()
        assert bytes(view[PAGE_BYTES : PAGE_BYTES + 13]) == b"from the file"
        view[3 * PAGE_BYTES] = 7
        view[5 * PAGE_BYTES : 7 * PAGE_BYTES] = b"x" * 2 * PAGE_BYTES
        own = [*private_ranges(mapping.address, mapping.size_bytes)]
        assert own == [(3 * PAGE_BYTES, PAGE_BYTES), (5 * PAGE_BYTES, 2 * PAGE_BYTES)]
        assert mapping.touched_bytes == 3 * PAGE_BYTES
        assert os.pread(other, 1, 3 * PAGE_BYTES) == b"\0"
        view.release()
    os.close(other)


def test_copied_mapping_of_shorter_file_is_refused() -> None:
    with pytest.raises(OSError, match="expected"):
        CopiedMapping(a_file(2), PAGES * PAGE_BYTES)


def test_copied_mapping_discarded_pages_are_zero_and_not_the_files() -> None:
    with CopiedMapping(a_file(), PAGES * PAGE_BYTES) as mapping:
        view = mapping.view()
        mapping.discard(0, PAGE_BYTES)
        mapping.discard(PAGE_BYTES, PAGE_BYTES)
        assert bytes(view[PAGE_BYTES : PAGE_BYTES + 13]) == bytes(13)
        assert mapping.holes.ranges == [(0, 2 * PAGE_BYTES)]
        view.release()


def test_copied_mapping_with_too_many_holes_writes_zeroes() -> None:
    with CopiedMapping(a_file(), PAGES * PAGE_BYTES) as mapping:
        view = mapping.view()
        mapping.holes.ranges = [(9 * PAGE_BYTES, PAGE_BYTES)] * MAX_HOLES
        mapping.discard(PAGE_BYTES, PAGE_BYTES)
        assert bytes(view[PAGE_BYTES : PAGE_BYTES + 13]) == bytes(13)
        view.release()


def test_frozen_memory_keeps_its_address_and_its_file() -> None:
    with SharedMapping("test", PAGES * PAGE_BYTES) as mapping:
        view = mapping.view()
        view[0] = 1
        mapping.freeze()
        view[0] = 2
        assert (view[0], os.pread(mapping.file, 1, 0)) == (2, b"\1")
        assert [*private_ranges(mapping.address, mapping.size_bytes)] == [(0, PAGE_BYTES)]
        mapping.discard(0, PAGE_BYTES)
        assert (view[0], os.pread(mapping.file, 1, 0)) == (0, b"\1")
        with pytest.raises(ValueError, match="cannot be shared"):
            _ = mapping.fd
        view.release()

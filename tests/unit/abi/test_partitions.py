"""Partition tables, also hostile ones: a reader never fails, whatever is on a disk."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ostler.abi import partitions

SIZE = 1 << 20


def reader(disk: bytes) -> partitions.Read:
    def read(offset: int, size: int) -> bytes:
        return disk[offset : offset + size] if offset >= 0 else b""

    return read


def disk_with(pieces: dict[int, bytes]) -> bytes:
    disk = bytearray(SIZE)
    for at, data in pieces.items():
        disk[at : at + len(data)] = data
    return bytes(disk)


def test_empty_disk_has_no_table() -> None:
    assert partitions.read_table(reader(bytes(SIZE))) is None
    assert partitions.read_table(reader(b"")) is None


def test_file_system_without_a_table_is_no_table() -> None:
    disk = disk_with({510: b"\x55\xaa", 54: b"FAT16   ", 446: b"\x80" * 64})

    assert partitions.read_table(reader(disk)) is None
    assert partitions.file_system(reader(disk), 0) == "vfat"


def test_boot_code_that_looks_like_a_table_is_none() -> None:
    assert partitions.read_table(reader(disk_with({510: b"\x55\xaa", 446: b"\x12" * 64}))) is None


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=64, max_size=64), st.binary(min_size=92, max_size=92), st.binary(max_size=512))
def test_any_bytes_give_a_table_or_none(mbr: bytes, header: bytes, entries: bytes) -> None:
    for first in (mbr, b"\0\0\0\0\xee" + mbr[5:]):
        for second in (header, b"EFI PART" + header[8:]):
            read = reader(disk_with({446: first, 510: b"\x55\xaa", 512: second, 1024: entries}))
            table = partitions.read_table(read)
            if table is not None:
                assert len(table.partitions) <= partitions.MAX_PARTITIONS
                assert all(each.size_bytes > 0 for each in table.partitions)
                partitions.find_root(table, read)

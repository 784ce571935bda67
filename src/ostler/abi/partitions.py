"""Partition tables and file systems, as far as finding a root partition needs them: reading only, all input hostile.

MBR as every PC has it; GPT by the UEFI specification, 5.3. Sectors are 512 bytes, as virtio disks have them.
Left out: logical partitions in an extended one, checksums (a table is looked at, never repaired).
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass

SECTOR_BYTES = 512
MAX_PARTITIONS = 128
ROOT_X86_64 = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
"""The discoverable-partitions type of an x86-64 root."""
_MBR_ENTRY = struct.Struct("<B3sB3sII")
_MBR_AT, _MBR_SIGNATURE_AT = 446, 510
_MBR_PROTECTIVE = 0xEE
_GPT_HEADER = struct.Struct("<8s4sIII QQQQ 16s QIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
# (offset, magic, name)
_FILE_SYSTEMS = (
    (1080, b"\x53\xef", "ext4"),
    (0, b"XFSB", "xfs"),
    (0x1_0040, b"_BHRfS_M", "btrfs"),
    (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
    (0, b"hsqs", "squashfs"),
    (54, b"FAT1", "vfat"),
    (82, b"FAT32", "vfat"),
)

Read = Callable[[int, int], bytes]
"""Give up to `size` bytes at `offset` of the disk."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition; `number` as the guest's device name ends."""

    number: int
    start_bytes: int
    size_bytes: int
    kind: str
    """The type's GUID, or 0x83 of an MBR."""


@dataclass(frozen=True, slots=True)
class Table:
    """A partition table, and how long a disk must be to hold all it says."""

    kind: str
    partitions: tuple[Partition, ...]
    needed_bytes: int


def read_table(read: Read) -> Table | None:
    """Return the disk's table, or None if it has none that makes sense."""
    sector = read(0, SECTOR_BYTES)
    if len(sector) < SECTOR_BYTES or sector[_MBR_SIGNATURE_AT:] != b"\x55\xaa" or file_system(read, 0) is not None:
        return None
    entries = [_MBR_ENTRY.unpack_from(sector, _MBR_AT + index * _MBR_ENTRY.size) for index in range(4)]
    if any(entry[2] == _MBR_PROTECTIVE for entry in entries):
        return _gpt(read)
    found = []
    for number, (status, _, kind, _, start, count) in enumerate(entries, 1):
        if kind and count:
            if status not in (0, 0x80) or start == 0:
                return None  # a boot sector's code, not a table
            found.append(Partition(number, start * SECTOR_BYTES, count * SECTOR_BYTES, f"{kind:#04x}"))
    return _table("mbr", found, 0) if found else None


def _gpt(read: Read) -> Table | None:
    header = read(SECTOR_BYTES, _GPT_HEADER.size)
    if len(header) < _GPT_HEADER.size or not header.startswith(b"EFI PART"):
        return None
    fields = _GPT_HEADER.unpack(header)
    backup, entries_at, count, size = fields[6], fields[10], fields[11], fields[12]
    if not _GPT_ENTRY.size <= size <= 4096:
        return None
    found = []
    for index in range(min(count, MAX_PARTITIONS)):
        raw = read(entries_at * SECTOR_BYTES + index * size, _GPT_ENTRY.size)
        if len(raw) < _GPT_ENTRY.size:
            break
        kind, _, first, last, _, _ = _GPT_ENTRY.unpack(raw)
        if any(kind) and first <= last:
            length = (last - first + 1) * SECTOR_BYTES
            found.append(Partition(index + 1, first * SECTOR_BYTES, length, str(uuid.UUID(bytes_le=kind))))
    return _table("gpt", found, (backup + 1) * SECTOR_BYTES)


def _table(kind: str, partitions: list[Partition], needed_bytes: int) -> Table:
    ends = [each.start_bytes + each.size_bytes for each in partitions]
    return Table(kind, tuple(partitions), max([needed_bytes, *ends]))


def file_system(read: Read, start_bytes: int) -> str | None:
    """Return the kind of file system that begins at `start_bytes`, as mount(8) names it."""
    for offset, magic, name in _FILE_SYSTEMS:
        if read(start_bytes + offset, len(magic)) == magic:
            return name
    return None


def find_root(table: Table, read: Read) -> tuple[Partition, str] | None:
    """Return the partition that is most likely the root, and its file system.

    One that says so by its type, else the largest with a file system that Linux has its root on.
    """
    candidates = [
        (each, kind) for each in table.partitions if (kind := file_system(read, each.start_bytes)) not in (None, "vfat")
    ]
    if not candidates:
        return None
    return max(
        ((each, kind) for each, kind in candidates if kind),
        key=lambda pair: (pair[0].kind == str(ROOT_X86_64), pair[0].size_bytes),
    )

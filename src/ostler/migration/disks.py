"""Disks that go along with their guest: throw-away layers, which nobody but the VM process can see.

While a guest moves, its disk is seen through a mirror that notes which ranges were written; those are sent like pages
that were written. A disk that both hosts can open (a path) stays where it is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from ostler.devices.virtio.blk_backend import Disk
from ostler.migration.wire import MAX_DISK_PART_BYTES

GRAIN_BYTES = 64 << 10


class Changing(Protocol):
    """A disk that knows what of it differs from what everybody has."""

    def changed(self) -> Iterator[tuple[int, int]]:
        """Offset and size in bytes of each range, lowest first."""


class Mirror:
    """Stands in for a disk and notes what is written to it. Any thread."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._lock = threading.Lock()
        self._written: set[int] = set()
        self.size_bytes, self.read_only, self.serial = disk.size_bytes, disk.read_only, disk.serial

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        self.disk.readv(offset, views)

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        self.disk.writev(offset, views)
        self._note(offset, sum(view.nbytes for view in views))

    def flush(self) -> None:
        self.disk.flush()

    def discard(self, offset: int, size: int) -> None:
        self.disk.discard(offset, size)
        self._note(offset, size)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        self.disk.write_zeroes(offset, size, unmap=unmap)
        self._note(offset, size)

    def take(self) -> list[tuple[int, int]]:
        """Ranges written since the last time, of at most a message's size each."""
        with self._lock:
            grains, self._written = sorted(self._written), set()
        return [(grain * GRAIN_BYTES, min(GRAIN_BYTES, self.size_bytes - grain * GRAIN_BYTES)) for grain in grains]

    @property
    def left_bytes(self) -> int:
        """How much `take` would give."""
        return len(self._written) * GRAIN_BYTES

    def _note(self, offset: int, size: int) -> None:
        # Noted after it was written, taken before it is read: see `dirty`.
        if size > 0:
            with self._lock:
                self._written.update(range(offset // GRAIN_BYTES, -(-(offset + size) // GRAIN_BYTES)))


def parts(ranges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges cut to what one message carries."""
    for offset, size in ranges:
        while size > 0:
            taken = min(size, MAX_DISK_PART_BYTES)
            yield offset, taken
            offset, size = offset + taken, size - taken


def read(disk: Disk, offset: int, size: int) -> bytes:
    """A part's content. Raises OSError."""
    content = bytearray(size)
    disk.readv(offset, [memoryview(content)])
    return bytes(content)

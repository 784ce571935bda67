"""Anonymous shared memory: a memfd and its mapping, memfd_create(2).

Guest memory is a memfd and not private anonymous memory, so that the software CPU, a
vhost-user back end or a migration target can map the same pages. The mapping reserves no
swap: a guest that never touches its memory costs the host nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Self

from ostler.host.files import punch_hole

BLOCK_BYTES = 512


class SharedMapping:
    """Owns one memfd and one read-write mapping of it; a context manager."""

    __slots__ = ("_map", "address", "fd", "size_bytes")

    def __init__(self, name: str, size_bytes: int) -> None:
        """Raises OSError when the host refuses (limits, no memory)."""
        self.size_bytes = size_bytes
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size_bytes)
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_NORESERVE", 0)
            self._map = mmap.mmap(self.fd, size_bytes, flags=flags)
        except (OSError, ValueError, OverflowError):
            os.close(self.fd)
            raise
        # from_buffer exports the mapping only while the ctypes object lives; the address
        # stays valid until close(), because a mmap object never moves.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @property
    def touched_bytes(self) -> int:
        """How much of it the host has given."""
        return os.fstat(self.fd).st_blocks * BLOCK_BYTES

    def view(self) -> memoryview:
        """A writable view of the whole mapping; release it before close()."""
        return memoryview(self._map)

    def discard(self, offset: int, size_bytes: int) -> None:
        """Free the pages of a range in every mapping of the file; they read as zeroes. Raises OSError."""
        punch_hole(self.fd, offset, size_bytes)

    def close(self) -> None:
        """Unmap and close. Raises BufferError while views of it are alive."""
        self._map.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

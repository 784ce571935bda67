"""Private memory in huge pages, for a guest whose second level of page tables is the host's own and who shares nothing.

A processor with nested paging walks both levels for each miss of its TLB, and every page a guest touches first costs an
exit: 2 MiB pages make both rare. The kernel gives them to private memory for the asking (MADV_HUGEPAGE), to a memfd
only where an administrator said so (/sys/kernel/mm/transparent_hugepage/shmem_enabled, by default never).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import Self

HUGE_PAGE_BYTES = 2 << 20
PAGE_BYTES = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)


class PrivateMapping:
    """Owns private anonymous memory, aligned so that huge pages fit; a context manager."""

    __slots__ = ("_map", "_offset", "address", "size_bytes")

    def __init__(self, size_bytes: int) -> None:
        """Raises OSError when the host refuses."""
        self.size_bytes = size_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._map = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, flags=flags)
        # The address stays valid until close(): see SharedMapping.
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._offset = -start % HUGE_PAGE_BYTES
        self.address = start + self._offset
        with contextlib.suppress(OSError):  # a kernel without them
            self._map.madvise(mmap.MADV_HUGEPAGE)

    @property
    def fd(self) -> int:
        """There is none: raises ValueError for whoever wants to share this memory."""
        raise ValueError("private guest memory cannot be shared")

    @property
    def touched_bytes(self) -> int:
        """How much of it the host has given, mincore(2)."""
        pages = -(-self.size_bytes // PAGE_BYTES)
        present = (ctypes.c_ubyte * pages)()
        if _libc.mincore(ctypes.c_void_p(self.address), ctypes.c_size_t(self.size_bytes), present):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        # The lowest bit says it; the others are reserved and zero.
        return bytes(present).count(1) * PAGE_BYTES

    def view(self) -> memoryview:
        """A writable view of all of it; release it before close()."""
        return memoryview(self._map)[self._offset : self._offset + self.size_bytes]

    def discard(self, offset: int, size_bytes: int) -> None:
        """Free the pages of a range; they read as zeroes. Raises OSError."""
        self._map.madvise(mmap.MADV_DONTNEED, self._offset + offset, size_bytes)

    def close(self) -> None:
        """Unmap. Raises BufferError while views of it are alive."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

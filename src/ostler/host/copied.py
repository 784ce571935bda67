"""Copy-on-write mappings of files, and turning shared memory into one: how many guests have one memory to begin with.

A guest that is restored maps the file of its memory privately: pages come from the host's page cache, shared by all
who do the same, and a page becomes the guest's own when it writes to it. That no page is read before it is needed
makes restoring a matter of milliseconds.

A guest that is saved or forked while it runs has its memory, a memfd, replaced in place by a private mapping of the
same memfd: what the memfd holds stays as it is from then on, and the guest's address space, which the accelerator and
all views know, does not move. Which pages have been written since, the kernel knows: they are private
(/proc/self/pagemap, Documentation/admin-guide/mm/pagemap.rst). That is a dirty log for nothing, and it knows of the
devices' writes too.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

PAGE_BYTES = mmap.PAGESIZE
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
PROT_RW = mmap.PROT_READ | mmap.PROT_WRITE
# Every hole is a mapping of its own, of which the kernel allows a process some 65,000.
MAX_HOLES = 4096
# Bits of an entry of pagemap.
PRESENT, SWAPPED, OF_FILE = 1 << 63, 1 << 62, 1 << 61
ENTRY_BYTES, SCAN_PAGES = 8, 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]


def map_over(address: int, size_bytes: int, fd: int, offset: int = 0) -> None:
    """Replace mapped pages by a private mapping of a file, or with -1 by zeroes. Raises OSError."""
    flags = mmap.MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
    if _libc.mmap(address, size_bytes, PROT_RW, flags, fd, offset) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Holes:
    """Parts of a private mapping given back to the host: there a page that is not present is not the file's."""

    def __init__(self, address: int) -> None:
        self._address = address
        self.ranges: list[tuple[int, int]] = []

    def punch(self, offset: int, size_bytes: int) -> None:
        """Make whole pages read as zeroes and take no memory, as long as there are not too many of these."""
        if self.ranges and sum(self.ranges[-1]) == offset:
            start, before = self.ranges.pop()
            self.ranges.append((start, before + size_bytes))
        elif len(self.ranges) < MAX_HOLES:
            self.ranges.append((offset, size_bytes))
        else:
            ctypes.memset(self._address + offset, 0, size_bytes)
            return
        map_over(self._address + offset, size_bytes, -1)


class CopiedMapping:
    """Owns a descriptor and a private mapping of its file; a context manager. The file must not change any more."""

    __slots__ = ("_map", "address", "file", "holes", "merged", "size_bytes")

    def __init__(self, fd: int, size_bytes: int) -> None:
        """Take over `fd`. Raises OSError, also for a file that is shorter: its missing pages would be SIGBUS."""
        self.file = fd
        self.size_bytes = size_bytes
        try:
            if os.fstat(fd).st_size < size_bytes:
                raise OSError(0, f"{os.fstat(fd).st_size} bytes, expected {size_bytes}")
            self._map = mmap.mmap(fd, size_bytes, flags=mmap.MAP_PRIVATE | MAP_NORESERVE, prot=PROT_RW)
        except (OSError, ValueError, OverflowError):
            os.close(fd)
            raise
        # The address stays valid until close(): see SharedMapping.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.holes = Holes(self.address)
        self.merged: list[tuple[int, int]] = []
        """Offset and size of what was replaced by pages of common files, whatever became of it since."""

    @property
    def fd(self) -> int:
        """There is none that shows this memory: raises ValueError for whoever wants to share it."""
        raise ValueError("copy-on-write guest memory cannot be shared")

    @property
    def touched_bytes(self) -> int:
        """What of it is this mapping's own."""
        return private_bytes(self.address, self.size_bytes)

    def view(self) -> memoryview:
        """A writable view of the whole mapping; release it before close()."""
        return memoryview(self._map)

    def discard(self, offset: int, size_bytes: int) -> None:
        """Free the pages of a range; they read as zeroes. Raises OSError."""
        self.holes.punch(offset, size_bytes)

    def merge(self, offset: int, size_bytes: int, fd: int, file_offset: int) -> None:
        """Replace whole pages by equal ones of a file that never changes. Nobody may be writing. Raises OSError."""
        map_over(self.address + offset, size_bytes, fd, file_offset)
        self.merged.append((offset, size_bytes))

    def close(self) -> None:
        """Unmap and close. Raises BufferError while views of it are alive."""
        self._map.close()
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def private_ranges(address: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Offset and size of each run of pages that are this process's own: written to since they were mapped."""
    first = address // PAGE_BYTES
    start = -1
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        for base in range(0, size_bytes // PAGE_BYTES, SCAN_PAGES):
            count = min(SCAN_PAGES, size_bytes // PAGE_BYTES - base)
            entries = array.array("Q", os.pread(file.fileno(), count * ENTRY_BYTES, (first + base) * ENTRY_BYTES))
            for page, entry in enumerate(entries, start=base):
                own = entry >= SWAPPED and not entry & OF_FILE
                if own is not (start >= 0):
                    if own:
                        start = page
                    else:
                        yield start * PAGE_BYTES, (page - start) * PAGE_BYTES
                        start = -1
    if start >= 0:
        yield start * PAGE_BYTES, size_bytes - start * PAGE_BYTES


def private_bytes(address: int, size_bytes: int) -> int:
    """How much of a mapping is this process's own."""
    return sum(size for _, size in private_ranges(address, size_bytes))

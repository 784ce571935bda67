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

from ostler.host.copied import Holes, map_over, private_bytes
from ostler.host.files import punch_hole

BLOCK_BYTES = 512


class SharedMapping:
    """Owns one memfd and one read-write mapping of it; a context manager."""

    __slots__ = ("_file", "_map", "_merges", "address", "holes", "merged", "size_bytes")

    def __init__(self, name: str, size_bytes: int) -> None:
        """Raises OSError when the host refuses (limits, no memory)."""
        self.size_bytes = size_bytes
        self._file = os.memfd_create(name, os.MFD_CLOEXEC)
        self.holes: Holes | None = None
        """There are some once it is frozen."""
        self.merged: list[tuple[int, int]] = []
        """Offset and size of what was replaced by pages of common files, whatever became of it since."""
        self._merges = False
        try:
            os.ftruncate(self._file, size_bytes)
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_NORESERVE", 0)
            self._map = mmap.mmap(self._file, size_bytes, flags=flags)
        except (OSError, ValueError, OverflowError):
            os.close(self._file)
            raise
        # from_buffer exports the mapping only while the ctypes object lives; the address
        # stays valid until close(), because a mmap object never moves.
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @property
    def fd(self) -> int:
        """The memfd; stays owned by this object. Raises ValueError once frozen: it no longer shows this memory."""
        if self.holes is not None:
            raise ValueError("copy-on-write guest memory cannot be shared")
        return self._file

    @property
    def file(self) -> int:
        """The memfd, frozen or not."""
        return self._file

    @property
    def touched_bytes(self) -> int:
        """How much of it the host has given."""
        given = os.fstat(self._file).st_blocks * BLOCK_BYTES
        return given if self.holes is None else given + private_bytes(self.address, self.size_bytes)

    def freeze(self) -> None:
        """Leave the memfd as it is: what is written from now on is this mapping's own. Nobody may be writing.

        Who else has mapped the memfd still writes into it. Raises OSError.
        """
        map_over(self.address, self.size_bytes, self._file)
        self.holes = Holes(self.address)

    @property
    def owns_file(self) -> bool:
        """Whether the memfd's content is nobody else's, and may be punched out."""
        return self.holes is None or self._merges

    def merge(self, offset: int, size_bytes: int, fd: int, file_offset: int) -> None:
        """Replace whole pages by equal ones of a file that never changes; a write makes them this mapping's own again.

        The mapping is private from then on, as after `freeze`. Nobody may be writing. Raises OSError.
        """
        if self.holes is None:
            self.freeze()
            self._merges = True
        map_over(self.address + offset, size_bytes, fd, file_offset)
        self.merged.append((offset, size_bytes))
        if self._merges:
            punch_hole(self._file, offset, size_bytes)

    def view(self) -> memoryview:
        """A writable view of the whole mapping; release it before close()."""
        return memoryview(self._map)

    def discard(self, offset: int, size_bytes: int) -> None:
        """Free the pages of a range in every mapping of the file; they read as zeroes. Raises OSError."""
        if self.holes is None:
            punch_hole(self._file, offset, size_bytes)
        elif self._merges:
            # Back to the memfd, which is empty there: no hole to remember, and one mapping with its neighbours.
            punch_hole(self._file, offset, size_bytes)
            map_over(self.address + offset, size_bytes, self._file, offset)
        else:
            self.holes.punch(offset, size_bytes)

    def close(self) -> None:
        """Unmap and close. Raises BufferError while views of it are alive."""
        self._map.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

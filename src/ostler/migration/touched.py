"""Which pages of guest memory hold anything at all: those the host has given. The others read as zero on both sides.

A memfd's file system knows (SEEK_DATA); of private memory the page table does (/proc/self/pagemap, whose bits 63 and 62
say "in memory" and "in swap"; Documentation/admin-guide/mm/pagemap.rst).
"""

from __future__ import annotations

import errno
import mmap
import os
import re

from ostler.host.anonymous import PrivateMapping
from ostler.host.memfd import SharedMapping
from ostler.memory import GuestMemory
from ostler.memory.layout import PAGE_SIZE

Run = tuple[int, int]
ENTRY_BYTES = 8
_PRESENT = re.compile(rb"[\x40-\xff]+")


def touched(memory: GuestMemory) -> list[Run]:
    """Runs of pages (guest-physical address, count), lowest first. Raises OSError."""
    mapping = memory.mapping
    if isinstance(mapping, PrivateMapping):
        return _by_page_table(memory)
    try:
        fd = memory.fd if type(mapping) is SharedMapping else -1
    except ValueError:
        fd = -1
    if fd < 0:
        # Copied on write from a file: what was not touched here may hold something all the same.
        return [(region.start, region.size_bytes // PAGE_SIZE) for region in memory.regions]
    found: list[Run] = []
    for region in memory.regions:
        at, end = region.offset, region.offset + region.size_bytes
        while at < end:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole to the end
                    break
                raise
            start = max(start, at) // PAGE_SIZE * PAGE_SIZE
            if start >= end:
                break
            at = min(-(-os.lseek(fd, start, os.SEEK_HOLE) // PAGE_SIZE) * PAGE_SIZE, end)
            found.append((region.start + start - region.offset, (at - start) // PAGE_SIZE))
    return found


def _by_page_table(memory: GuestMemory) -> list[Run]:
    if mmap.PAGESIZE != PAGE_SIZE:
        return [(region.start, region.size_bytes // PAGE_SIZE) for region in memory.regions]
    found: list[Run] = []
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for region in memory.regions:
            first = memory.host_address(region.start, region.size_bytes) // PAGE_SIZE
            pages = region.size_bytes // PAGE_SIZE
            entries = os.pread(fd, pages * ENTRY_BYTES, first * ENTRY_BYTES)
            # Little-endian: the two bits are the highest of each entry's last byte.
            for match in _PRESENT.finditer(entries[ENTRY_BYTES - 1 :: ENTRY_BYTES]):
                found.append((region.start + match.start() * PAGE_SIZE, match.end() - match.start()))
    finally:
        os.close(fd)
    return found

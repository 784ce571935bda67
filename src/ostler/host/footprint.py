"""What a range of this process's memory costs the host, as the kernel tells it: proc_pid_smaps(5), proc_pid_pagemap(5).

`referenced` needs no privilege: writing 1 to /proc/self/clear_refs takes the accessed bits away from every page of
this process, and smaps counts those that have one again. They are the host processor's own bits, so it sees the
accesses of the software CPU and of devices; under KVM a guest's accesses set bits of the second level of page tables,
which smaps does not look at. A page that stays in the processor's TLB all the while is missed.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

PAGE_BYTES = mmap.PAGESIZE
SMAPS, PAGEMAP, CLEAR_REFS = Path("/proc/self/smaps"), Path("/proc/self/pagemap"), Path("/proc/self/clear_refs")
PRESENT, SWAPPED, OF_FILE, EXCLUSIVE = 1 << 63, 1 << 62, 1 << 61, 1 << 56
ENTRY_BYTES, SCAN_PAGES = 8, 1 << 16
# Harmless but for core dumps: advice that gives a range a line of its own in smaps.
MADV_DONTDUMP, MADV_DODUMP, MADV_MERGEABLE = 16, 17, 12
_HEAD = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) ")
_COUNTED = {
    b"Rss": "present_bytes", b"Swap": "swapped_bytes", b"AnonHugePages": "huge_bytes",
    b"ShmemPmdMapped": "huge_bytes", b"FilePmdMapped": "huge_bytes", b"Referenced": "referenced_bytes",
    b"Anonymous": "private_bytes", b"KSM": "merged_by_host_bytes", b"Pss": "share_bytes",
    b"Shared_Clean": "shared_bytes", b"Shared_Dirty": "shared_bytes",
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(slots=True)
class Footprint:
    """Bytes of a range, by what they are on the host."""

    present_bytes: int = 0
    """In the host's memory and mapped by this process."""
    swapped_bytes: int = 0
    huge_bytes: int = 0
    """In pages of 2 MiB."""
    referenced_bytes: int = 0
    """Accessed since `forget_references`."""
    private_bytes: int = 0
    """Anonymous pages: copied on write, or never of any file."""
    shared_bytes: int = 0
    """Mapped by other processes too."""
    share_bytes: int = 0
    """Each page divided by how many map it: sums over processes to what the host gives."""
    merged_by_host_bytes: int = 0
    """By KSM."""

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


def footprint(address: int, size_bytes: int, *, smaps: bytes | None = None) -> Footprint:
    """Sum up the mappings that lie within a range; `smaps` is the file's text where it is at hand."""
    found = Footprint()
    inside = False
    for line in (SMAPS.read_bytes() if smaps is None else smaps).splitlines():
        if head := _HEAD.match(line):
            inside = int(head[1], 16) >= address and int(head[2], 16) <= address + size_bytes
        elif inside:
            name, _, value = line.partition(b":")
            if (field := _COUNTED.get(name)) is not None:
                setattr(found, field, getattr(found, field) + (int(value.split()[0]) << 10))
    return found


def forget_references() -> None:
    """No page of this process has been accessed, from here on. Raises OSError."""
    CLEAR_REFS.write_bytes(b"1")


def page_flags(address: int, count: int) -> array.array[int]:
    """Entries of /proc/self/pagemap for `count` pages; frame numbers in them are the privileged's to see."""
    entries: array.array[int] = array.array("Q")
    fd = os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for at in range(0, count, SCAN_PAGES):
            size = min(SCAN_PAGES, count - at) * ENTRY_BYTES
            entries.frombytes(os.pread(fd, size, (address // PAGE_BYTES + at) * ENTRY_BYTES))
    finally:
        os.close(fd)
    return entries


def advise(address: int, size_bytes: int, advice: int) -> None:
    """madvise(2). Raises OSError."""
    if _libc.madvise(address, size_bytes, advice):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

"""What KVM collects for user space to fetch later: writes that need no answer, and pages that were written.

Both are rings in memory shared with the kernel. Of coalesced writes (Documentation/virt/kvm/api.rst, 4.116) there is
one ring a VM, which every vCPU maps behind its run page: indices first, then entries. Of dirty pages (8.29) each vCPU
has its own: an entry the kernel filled has KVM_DIRTY_GFN_F_DIRTY, and what was harvested is marked for
KVM_RESET_DIRTY_RINGS, which write-protects those pages again.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from typing import NamedTuple

from ostler.abi.kvm.board import CoalescedMmio, DirtyGfn
from ostler.abi.kvm.run import KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET, KVM_DIRTY_LOG_PAGE_OFFSET

PAGE_SIZE = mmap.PAGESIZE
_INDICES = 8  # `first` and `last`, four bytes each
_ENTRIES = (PAGE_SIZE - _INDICES) // ctypes.sizeof(CoalescedMmio)


class CollectedWrite(NamedTuple):
    """A write KVM collected, in the order of the guest's."""

    is_port: bool
    address: int
    data: bytes


class CoalescedRing:
    """The ring of collected writes in a vCPU's mapping. One reader at a time, whatever the thread."""

    def __init__(self, page: memoryview) -> None:
        """`page` is the mapping's page KVM_COALESCED_MMIO_PAGE_OFFSET."""
        self._indices = page[:_INDICES].cast("I")
        self._entries = (CoalescedMmio * _ENTRIES).from_buffer(page, _INDICES)

    def drain(self) -> list[CollectedWrite]:
        """Take everything out."""
        taken = []
        while (first := self._indices[0]) != self._indices[1]:
            entry = self._entries[first % _ENTRIES]
            taken.append(CollectedWrite(entry.pio != 0, entry.phys_addr, bytes(entry.data[: min(entry.len, 8)])))
            # Only now may KVM use the entry again.
            self._indices[0] = (first + 1) % _ENTRIES
        return taken


class DirtyPage(NamedTuple):
    """A page written since it was last harvested and reset: its slot, and its number within it."""

    slot: int
    page: int


class DirtyRing:
    """A vCPU's ring of dirty pages. Owns its mapping."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        """`size_bytes` as given to KVM_CAP_DIRTY_LOG_RING. Raises OSError."""
        offset = KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE
        self._map = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        self._count = size_bytes // ctypes.sizeof(DirtyGfn)
        self._entries = (DirtyGfn * self._count).from_buffer(self._map)
        self._next = 0

    def harvest(self) -> Iterator[DirtyPage]:
        """Yield what is new, marking it harvested; `reset_dirty_rings` of the VM then re-arms those pages."""
        while True:
            entry = self._entries[self._next % self._count]
            if not entry.flags & KVM_DIRTY_GFN_F_DIRTY or entry.flags & KVM_DIRTY_GFN_F_RESET:
                return
            found = DirtyPage(entry.slot & 0xFFFF, entry.offset)
            entry.flags = KVM_DIRTY_GFN_F_RESET
            self._next += 1
            yield found

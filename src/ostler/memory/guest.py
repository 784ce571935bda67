"""Guest memory as bytes: one memfd or private mapping, bounds-checked access, slots of a VM.

Every access names a guest-physical address and is checked against the regions: an address
taken from guest data can at worst raise MemoryFault, which a device turns into an error of
its own. A view must lie within one region, because the regions are apart on the host too.

The accelerator may have translated guest code from these pages. Whoever writes through
`write` tells it by itself; whoever writes through a view calls `written` afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Protocol, Self

from ostler.host.anonymous import PrivateMapping
from ostler.host.copied import CopiedMapping
from ostler.host.files import copy_sparse
from ostler.host.memfd import SharedMapping
from ostler.memory.layout import Gpa, Region, RegionKind, ram_regions

KVM_MEM_READONLY = 1 << 1

WriteHook = Callable[[Gpa, int], None]


class MemoryFault(Exception):
    """An access outside of guest memory. Never leaves the device that made it."""

    def __init__(self, gpa: int, size_bytes: int) -> None:
        super().__init__(f"guest memory {gpa:#x}+{size_bytes:#x}: outside of every region")
        self.gpa = gpa
        self.size_bytes = size_bytes


class SlotRegistrar(Protocol):
    """The part of a VM that guest memory needs."""

    def set_user_memory_region(self, slot: int, gpa: int, size: int, host_address: int, flags: int = 0) -> None:
        """KVM_SET_USER_MEMORY_REGION."""


class GuestMemory:
    """All RAM of one guest. Threads may access it at once; a context manager."""

    def __init__(self, regions: Iterable[Region], *, shared: bool = True, image: int | None = None) -> None:
        """Not shared: in huge pages, but nobody else can map it. Raises OSError when the host has no memory for it.

        `image` is the descriptor of a file that holds the memory's content and changes no more, and is taken over:
        it is mapped copy-on-write, or copied where the memory is to be shared.
        """
        self.regions = tuple(sorted(regions, key=lambda region: region.start))
        for below, above in zip(self.regions, self.regions[1:], strict=False):
            if below.end > above.start:
                raise ValueError(f"regions overlap at {above.start:#x}")
        self.size_bytes = sum(region.size_bytes for region in self.regions)
        span = max(region.offset + region.size_bytes for region in self.regions)
        self._mapping = _mapping(span, shared=shared, image=image)
        self._view = self._mapping.view()
        self._hooks: list[WriteHook] = []
        self.writes_are_logged = False
        """Whose log it is, is one tracker's at a time (`migration.dirty`)."""
        self.merged_bytes = 0
        """Replaced by pages of common files so far."""
        # What `_offset` walks for every descriptor of every queue: plain numbers, low memory first.
        self._spans = [(region.start, region.end, region.offset - region.start) for region in self.regions]

    @classmethod
    def of_size(cls, size_bytes: int, *, shared: bool = True, image: int | None = None) -> Self:
        """RAM of the given size, laid around the hole below 4 GiB."""
        return cls(ram_regions(size_bytes), shared=shared, image=image)

    @property
    def fd(self) -> int:
        """The memfd; stays owned by this object. Raises ValueError for memory that is not shared."""
        return self._mapping.fd

    @property
    def touched_bytes(self) -> int:
        """How much of it the host has given so far."""
        return self._mapping.touched_bytes

    def _offset(self, gpa: int, size_bytes: int) -> int:
        for start, end, shift in self._spans:
            if start <= gpa and gpa + size_bytes <= end:
                if size_bytes < 0:
                    break
                return gpa + shift
        raise MemoryFault(gpa, size_bytes)

    def contains(self, gpa: int, size_bytes: int) -> bool:
        """Whether the whole range lies within one region."""
        if size_bytes < 0:
            return False
        return any(r.start <= gpa and gpa + size_bytes <= r.end for r in self.regions)

    def view(self, gpa: int, size_bytes: int) -> memoryview:
        """A writable view without a copy. Raises MemoryFault outside of one region."""
        # `_offset` written out: this is called for every part of every request.
        for start, end, shift in self._spans:
            if start <= gpa and gpa + size_bytes <= end and size_bytes >= 0:
                return self._view[gpa + shift : gpa + shift + size_bytes]
        raise MemoryFault(gpa, size_bytes)

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """A copy of the bytes. Raises MemoryFault."""
        offset = self._offset(gpa, size_bytes)
        return bytes(self._view[offset : offset + size_bytes])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy into the guest and tell the accelerator. Raises MemoryFault."""
        offset = self._offset(gpa, len(data))
        self._view[offset : offset + len(data)] = data
        self.written(gpa, len(data))

    def written(self, gpa: int, size_bytes: int) -> None:
        """Announce bytes changed through a view."""
        for hook in self._hooks:
            hook(Gpa(gpa), size_bytes)

    def discard(self, gpa: int, size_bytes: int) -> int:
        """Give whole pages back to the host; they read as zeroes. Returns how many bytes of the range were RAM.

        What lies outside of memory is left alone. Raises OSError when the host refuses.
        """
        done = 0
        for start, end, shift in self._spans:
            first, last = max(start, gpa), min(end, gpa + size_bytes)
            if first < last:
                self._mapping.discard(first + shift, last - first)
                self.written(first, last - first)
                done += last - first
        return done

    def merge(self, offset: int, size_bytes: int, fd: int, file_offset: int) -> None:
        """Replace pages by equal ones of a file that never changes; `offset` is within the mapping.

        The guest stands still, and no device is about to write. Raises OSError, TypeError for memory in huge pages.
        """
        if isinstance(self._mapping, PrivateMapping):
            raise TypeError("memory in huge pages is not merged")
        self._mapping.merge(offset, size_bytes, fd, file_offset)
        self.merged_bytes += size_bytes

    @property
    def mapping(self) -> SharedMapping | PrivateMapping | CopiedMapping:
        """What holds it on this host, for who saves it."""
        return self._mapping

    @property
    def whole(self) -> memoryview:
        """All of it as it lies on the host; not to be kept beyond `close`."""
        return self._view[:]

    def on_write(self, hook: WriteHook) -> None:
        """Call `hook(gpa, size_bytes)` after each write by the host."""
        self._hooks.append(hook)

    def off_write(self, hook: WriteHook) -> None:
        """Undo `on_write`; a write under way in another thread may still be reported."""
        self._hooks = [each for each in self._hooks if each != hook]

    def read_int(self, gpa: int, size_bytes: int) -> int:
        """A little-endian unsigned integer. Raises MemoryFault."""
        return int.from_bytes(self.read(gpa, size_bytes), "little")

    def write_int(self, gpa: int, size_bytes: int, value: int) -> None:
        """A little-endian unsigned integer. Raises MemoryFault."""
        self.write(gpa, value.to_bytes(size_bytes, "little"))

    def host_address(self, gpa: int, size_bytes: int) -> int:
        """Where the range lies in this process. Raises MemoryFault."""
        return self._mapping.address + self._offset(gpa, size_bytes)

    def register(self, vm: SlotRegistrar, *, first_slot: int = 0) -> int:
        """Give every region to the VM as a slot; returns the next free slot number."""
        for number, region in enumerate(self.regions, start=first_slot):
            vm.set_user_memory_region(
                number,
                region.start,
                region.size_bytes,
                self._mapping.address + region.offset,
                KVM_MEM_READONLY if region.kind is RegionKind.ROM else 0,
            )
        return first_slot + len(self.regions)

    def close(self) -> None:
        """Unmap. The VM must be gone; raises BufferError while views are alive."""
        self._hooks.clear()
        self._view.release()
        self._mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _mapping(span: int, *, shared: bool, image: int | None) -> SharedMapping | PrivateMapping | CopiedMapping:
    if image is None:
        return SharedMapping("ostler-guest", span) if shared else PrivateMapping(span)
    if not shared:
        return CopiedMapping(image, span)
    mapping = SharedMapping("ostler-guest", span)
    try:
        copy_sparse(image, mapping.fd)
    except OSError:
        mapping.close()
        raise
    finally:
        os.close(image)
    return mapping

"""The page mapper: a running guest's memory from outside, by guest-physical or by linear address.

Registers are read while the processors stand still, which takes a millisecond; tables are walked and bytes are copied
then too, so that what an answer says was true at one instant. On the loop's thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ostler.abi.kvm.state import Sregs
from ostler.errors import BadRequest
from ostler.memory import GuestMemory, MemoryFault
from ostler.memory.paging import PAGE_BYTES, Paging, Walk, Walker
from ostler.vmm.run import GuestProcess

MAX_COPY_BYTES, MAX_PAGES = 512 << 10, 32 << 10


@contextlib.contextmanager
def held(process: GuestProcess) -> Iterator[None]:
    """The processors are out of the guest for the length of a block. Loop thread only. Raises AccelError."""
    was_paused = process.is_paused
    process.pause()
    try:
        yield
    finally:
        if not was_paused:
            process.resume()


@dataclass(frozen=True, slots=True)
class Space:
    """Which addresses a request means."""

    vcpu: int = 0
    cr3: int | None = None
    """Instead of the processor's own."""
    is_physical: bool = False


class PageMapper:
    """Reads, writes and translates for clients."""

    def __init__(self, process: GuestProcess) -> None:
        self._process = process
        self._memory: GuestMemory = process.machine.memory

    def roots(self) -> list[dict[str, Any]]:
        """What each processor runs right now: its page tables, its privilege, where it is."""
        with held(self._process):
            found = []
            for vcpu in self._process.machine.vcpus:
                sregs, regs = vcpu.get_sregs(), vcpu.get_regs()
                paging = self._paging(sregs, None)
                found.append(
                    {"vcpu": vcpu.id, "cr3": sregs.cr3, "mode": paging.mode.value, "cpl": sregs.cs.selector & 3,
                     "rip": regs.rip, "rsp": regs.rsp}
                )  # fmt: skip
            return found

    def translate(self, address: int, space: Space) -> dict[str, Any]:
        """Linear to guest-physical to this process's own address, with the entries in between."""
        with held(self._process):
            walk = self._walker(space).walk(address)
        host = None
        if walk.physical is not None and self._memory.contains(walk.physical, 1):
            host = self._memory.host_address(walk.physical, 1)
        return {**described(walk), "host": host}

    def pages(self, address: int, count: int, space: Space) -> list[int | None]:
        """Guest-physical address of each of so many 4 KiB pages."""
        if not 0 < count <= MAX_PAGES:
            raise BadRequest(f"count {count}: expected 1 to {MAX_PAGES} pages")
        with held(self._process):
            return [*self._walker(space).physical_pages(address & -PAGE_BYTES, count)]

    def read(self, address: int, size: int, space: Space) -> bytes:
        """A copy of the bytes. Raises BadRequest for what is not mapped, or not memory."""
        with held(self._process):
            return b"".join([self._read(gpa, part) for gpa, part in self._parts(address, size, space)])

    def write(self, address: int, data: bytes, space: Space) -> None:
        """Write through whatever rights the tables give; all or nothing. Raises BadRequest."""
        with held(self._process):
            done = 0
            for gpa, part in [*self._parts(address, len(data), space)]:
                self._memory.write(gpa, data[done : done + part])
                done += part

    def _parts(self, address: int, size: int, space: Space) -> list[tuple[int, int]]:
        """Guest-physical address and size of each part, every one of them memory."""
        if not 0 <= size <= MAX_COPY_BYTES:
            raise BadRequest(f"size {size}: expected 0 to {MAX_COPY_BYTES} bytes")
        translate: Callable[[int], int | None] = int if space.is_physical else self._translator(space)
        parts: list[tuple[int, int]] = []
        at, end = address, address + size
        while at < end:
            part = min(end - at, PAGE_BYTES - at % PAGE_BYTES)
            gpa = translate(at)
            if gpa is None or not self._memory.contains(gpa, part):
                kind = "physical" if space.is_physical else "linear"
                raise BadRequest(f"{kind} address {at:#x}: is not in the guest's memory")
            parts.append((gpa, part))
            at += part
        return parts

    def _translator(self, space: Space) -> Callable[[int], int | None]:
        walker = self._walker(space)
        return lambda linear: walker.walk(linear).physical

    def _walker(self, space: Space) -> Walker:
        vcpus = self._process.machine.vcpus
        if not 0 <= space.vcpu < len(vcpus):
            raise BadRequest(f"vcpu {space.vcpu}: expected 0 to {len(vcpus) - 1}")
        paging = self._paging(vcpus[space.vcpu].get_sregs(), space.cr3)
        return Walker(paging, self._read, outside=MemoryFault)

    def _read(self, gpa: int, size: int) -> bytes:
        return self._memory.read(gpa, size)

    def _paging(self, sregs: Sregs, cr3: int | None) -> Paging:
        physical_bits = self._process.machine.model.physical_bits
        return Paging(sregs.cr0, sregs.cr3 if cr3 is None else cr3, sregs.cr4, sregs.efer, physical_bits)


def described(walk: Walk) -> dict[str, Any]:
    """A walk as clients get it."""
    return {
        "linear": walk.linear, "physical": walk.physical, "page_bytes": walk.page_bytes, "fault": walk.fault,
        "writable": walk.writable, "user": walk.user, "executable": walk.executable,
        "accessed": walk.accessed, "dirty": walk.dirty,
        "entries": [{"name": each.name, "gpa": each.gpa, "value": each.value} for each in walk.entries],
    }  # fmt: skip

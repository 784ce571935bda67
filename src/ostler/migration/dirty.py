"""Which pages of a running guest have been written: by its processors, and by the devices behind their back.

Processors' writes are the accelerator's to log (KVM_MEM_LOG_DIRTY_PAGES, KVM_GET_DIRTY_LOG); the software CPU answers
the same requests. Devices write through views of guest memory and announce it (`GuestMemory.written`), which no
accelerator can see, so those are marked here. A page is marked after it was written, and sent after its mark was
taken: whatever is sent half written is marked again.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from typing import Self

from ostler.abi.kvm.board import KVM_MEM_LOG_DIRTY_PAGES
from ostler.accel.api import VM
from ostler.errors import HostError
from ostler.memory import GuestMemory
from ostler.memory.layout import PAGE_SIZE

Run = tuple[int, int]
"""Guest-physical address and number of pages."""

_BITS = [bytes((byte >> bit) & 1 for bit in range(8)) for byte in range(256)]
_SET, _SOME = re.compile(rb"\x01+"), re.compile(rb"[^\x00]+")


class DirtyTracker:
    """Switches logging on and off; a context manager. `take` from one thread at a time."""

    def __init__(self, memory: GuestMemory, vm: VM) -> None:
        self._memory, self._vm = memory, vm
        self._lock = threading.Lock()
        self._marks = [bytearray(region.size_bytes // PAGE_SIZE) for region in memory.regions]
        self._logging = False

    def start(self) -> None:
        """From now on writes are seen. Raises HostError while another tracker has the log, AccelError."""
        if self._memory.writes_are_logged:
            raise HostError("guest memory: its writes are being logged already; try again when that is done")
        self._memory.writes_are_logged = True
        self._memory.on_write(self._written)
        self._logging = True
        self._flag(KVM_MEM_LOG_DIRTY_PAGES)

    def stop(self) -> None:
        """The guest runs without a log again."""
        if self._logging:
            self._logging = False
            self._memory.off_write(self._written)
            self._memory.writes_are_logged = False
            self._flag(0)

    def take(self) -> list[Run]:
        """Runs of pages written since the last time, lowest first; they count as clean from here on."""
        runs: list[Run] = []
        for slot, region in enumerate(self._memory.regions):
            bitmap = self._vm.get_dirty_log(slot)
            with self._lock:
                marks = self._marks[slot]
                self._marks[slot] = bytearray(len(marks))
            for match in _SOME.finditer(bitmap):
                first = match.start() * 8
                bits = b"".join([_BITS[byte] for byte in match.group()])
                for one in _SET.finditer(bits):
                    start, end = first + one.start(), first + one.end()
                    marks[start:end] = b"\1" * (end - start)
            runs += [(region.start + PAGE_SIZE * first, count) for first, count in _runs(marks)]
        return runs

    def mark(self, gpa: int, size_bytes: int) -> None:
        """Count a range as written."""
        self._written(gpa, size_bytes)

    def _written(self, gpa: int, size_bytes: int) -> None:
        if size_bytes <= 0:
            return
        for slot, region in enumerate(self._memory.regions):
            first, last = max(gpa, region.start), min(gpa + size_bytes, region.end)
            if first < last:
                begin, end = (first - region.start) // PAGE_SIZE, -(-(last - region.start) // PAGE_SIZE)
                with self._lock:
                    self._marks[slot][begin:end] = b"\1" * (end - begin)

    def _flag(self, flags: int) -> None:
        for slot, region in enumerate(self._memory.regions):
            address = self._memory.host_address(region.start, region.size_bytes)
            self._vm.set_user_memory_region(slot, region.start, region.size_bytes, address, flags)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()


def _runs(marks: bytearray) -> Iterator[Run]:
    for match in _SET.finditer(marks):
        yield match.start(), match.end() - match.start()


def page_count(runs: Sequence[Run]) -> int:
    """Pages in all of the runs."""
    return sum(count for _, count in runs)


def split(runs: Sequence[Run], pages: int) -> tuple[list[Run], list[Run]]:
    """The first so many pages, and the others."""
    first: list[Run] = []
    for number, (gpa, count) in enumerate(runs):
        if count >= pages:
            ahead = [(gpa, pages)] if pages else []
            behind = [(gpa + pages * PAGE_SIZE, count - pages)] if count > pages else []
            return first + ahead, [*behind, *runs[number + 1 :]]
        first.append((gpa, count))
        pages -= count
    return first, []


def without(runs: Sequence[Run], others: Sequence[Run]) -> list[Run]:
    """Pages of the runs that are in none of the others; all of them lowest first."""
    found: list[Run] = []
    rest = [*others]
    for start, count in runs:
        gpa, end = start, start + count * PAGE_SIZE
        while gpa < end:
            while rest and rest[0][0] + rest[0][1] * PAGE_SIZE <= gpa:
                rest.pop(0)
            if not rest or rest[0][0] >= end:
                found.append((gpa, (end - gpa) // PAGE_SIZE))
                break
            if rest[0][0] > gpa:
                found.append((gpa, (rest[0][0] - gpa) // PAGE_SIZE))
            gpa = min(end, rest[0][0] + rest[0][1] * PAGE_SIZE)
    return found


def merged(first: Sequence[Run], second: Sequence[Run]) -> list[Run]:
    """Pages of either, lowest first, none twice."""
    found: list[Run] = []
    for gpa, count in sorted([*first, *second]):
        if found and gpa <= found[-1][0] + found[-1][1] * PAGE_SIZE:
            start, known = found[-1]
            found[-1] = (start, max(known, (gpa - start) // PAGE_SIZE + count))
        else:
            found.append((gpa, count))
    return found

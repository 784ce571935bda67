"""`vm.memory`: a running guest's memory from Python, by linear or by guest-physical address.

    memory = vm.memory
    memory.read(0x1000, 16, physical=True)
    root = memory.find_root(0x7f00_0000_0000, b"a value only that process has there")
    memory.pages(0x7f00_0000_0000, 10_000, root=root)

A root is a process's CR3. Linear addresses without one are those of what the processor runs at that instant.
"""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ostler.client import guests
from ostler.errors import BadRequest, HostError

if TYPE_CHECKING:
    from ostler.control.runtime import Entry

MAX_COPY_BYTES, MAX_PAGES, PAGE_BYTES = 512 << 10, 32 << 10, 0x1000
ANSWER_S = 30.0
FIND_STEP_S = 0.01


@dataclass(frozen=True, slots=True)
class Root:
    """What a processor was running when it was looked at."""

    vcpu: int
    cr3: int
    mode: str
    cpl: int
    rip: int
    rsp: int


class MemoryOf:
    """One guest's memory. Each call is a request of its guest's process; threads may share it."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    def roots(self) -> list[Root]:
        """What each processor runs right now."""
        return [Root(**each) for each in self._ask("memory-roots")["processors"]]

    def find_root(self, address: int, expected: bytes, *, timeout_s: float = 30.0) -> int:
        """The CR3 of a process that has these bytes there, once a processor runs it in user mode.

        Raises HostError when none was seen in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            for root in self.roots():
                if root.cpl == 3:
                    with contextlib.suppress(BadRequest):
                        if self.read(address, len(expected), root=root.cr3) == expected:
                            return root.cr3
            if time.monotonic() > deadline:
                raise HostError(f"guest {self._entry.name!r}: no process with {expected[:16]!r} at {address:#x} was "
                                f"seen within {timeout_s:g} s")  # fmt: skip
            time.sleep(FIND_STEP_S)

    def translate(self, address: int, *, root: int | None = None, vcpu: int = 0) -> dict[str, Any]:
        """Where a linear address leads: `physical`, `host` (in the guest's process), rights, the tables' entries.

        `physical` is None where it leads nowhere, and `fault` says why.
        """
        return self._ask("memory-translate", address=address, vcpu=vcpu, **_rooted(root))

    def pages(self, address: int, count: int, *, root: int | None = None, vcpu: int = 0) -> list[int | None]:
        """Guest-physical address of each of `count` 4 KiB pages from a linear address on; None for those not there."""
        found: list[int | None] = []
        for done in range(0, count, MAX_PAGES):
            part, at = min(count - done, MAX_PAGES), address + done * PAGE_BYTES
            found += self._ask("memory-pages", address=at, count=part, vcpu=vcpu, **_rooted(root))["physical"]
        return found

    def read(
        self, address: int, size: int, *, physical: bool = False, root: int | None = None, vcpu: int = 0
    ) -> bytes:  # fmt: skip
        """Bytes from there. Raises BadRequest for an address that is no memory."""
        parts = []
        for done in range(0, size, MAX_COPY_BYTES):
            part = min(size - done, MAX_COPY_BYTES)
            answer = self._ask("memory-read", address=address + done, size=part, **_space(physical, root, vcpu))
            parts.append(base64.b64decode(answer["data"]))
        return b"".join(parts)

    def write(
        self, address: int, data: bytes, *, physical: bool = False, root: int | None = None, vcpu: int = 0
    ) -> None:  # fmt: skip
        """Write there, whatever rights the guest's tables give. Raises BadRequest for what is no memory."""
        for done in range(0, len(data), MAX_COPY_BYTES):
            part = base64.b64encode(data[done : done + MAX_COPY_BYTES]).decode()
            self._ask("memory-write", address=address + done, data=part, **_space(physical, root, vcpu))

    def map(self) -> dict[str, int]:
        """Bytes of the guest's memory by what they are on this host; docs/memory.md explains each."""
        return self._ask("memory-map")

    def watch(self, interval_s: float = 1.0, *, ranges: Sequence[tuple[int, int]] = ()) -> dict[str, Any]:
        """What is written and touched within an interval, of all memory and of guest-physical ranges.

        `dirty_bytes_per_s`, `accessed_bytes`, `working_set_bytes`, `dirty_runs` (address, pages), and the same for each
        of `ranges`. Raises BadRequest while the guest is being moved or watched already.
        """
        given = [list(each) for each in ranges]
        return self._ask("memory-watch", timeout_s=interval_s + ANSWER_S, interval_s=interval_s, ranges=given)

    def _ask(self, op: str, *, timeout_s: float = ANSWER_S, **arguments: object) -> dict[str, Any]:
        return guests.request(self._entry, op, timeout_s=timeout_s, **arguments)


def _rooted(root: int | None) -> dict[str, int]:
    return {} if root is None else {"cr3": root}


def _space(physical: bool, root: int | None, vcpu: int) -> dict[str, Any]:  # noqa: FBT001
    return {"space": "physical" if physical else "linear", "vcpu": vcpu, **_rooted(root)}

"""The rings a vhost-user back end sees: Ostler's own, beside the guest's memory.

The guest's rings are read by Ostler as for any device, so every chain is checked before another program sees it, and
what that program writes into guest memory is announced to the accelerator before the guest can look at it. Here its
side is laid out: for each chain an indirect table of guest addresses in a slot of this memory. Data itself is not
copied.

    0                descriptors, one for each slot
    16 * size        driver area, then device area
    TABLES           an indirect table for each slot
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ostler.abi.virtio.ring import (
    DESCRIPTOR,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    avail_bytes,
    used_bytes,
)
from ostler.host.memfd import SharedMapping

RING_SIZE = 128
MAX_PARTS = 1024
TABLE_BYTES = DESCRIPTOR.size * MAX_PARTS
TABLES = 0x1000
RING_BYTES = TABLES + TABLE_BYTES * RING_SIZE
_AVAIL = DESCRIPTOR.size * RING_SIZE
_USED = -(-(_AVAIL + avail_bytes(RING_SIZE)) // 4) * 4

assert _USED + used_bytes(RING_SIZE) <= TABLES

Part = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Places:
    """Host addresses of a ring's areas, as SET_VRING_ADDR wants them."""

    descriptors: int
    avail: int
    used: int


class ShadowRing:
    """One ring in `mapping` at `offset`, which the back end sees at the guest address `gpa`."""

    def __init__(self, mapping: SharedMapping, offset: int, gpa: int) -> None:
        self._view = mapping.view()[offset : offset + RING_BYTES]
        base = mapping.address + offset
        self.places = Places(base, base + _AVAIL, base + _USED)
        self._gpa = gpa
        self._avail = self._view[_AVAIL : _AVAIL + avail_bytes(RING_SIZE)].cast("H")
        self._used = self._view[_USED : _USED + 4].cast("H")
        self._elements = self._view[_USED + 4 : _USED + 4 + 8 * RING_SIZE].cast("I")
        self._free: list[int] = []
        self._busy: set[int] = set()
        self._next_avail = self._next_used = 0
        self.clear()

    def clear(self) -> None:
        """Begin anew: nothing is under way."""
        self._view[:TABLES] = bytes(TABLES)
        self._free, self._busy = list(range(RING_SIZE)), set()
        self._next_avail = self._next_used = 0

    @property
    def has_room(self) -> bool:
        """Whether `submit` would take another chain."""
        return bool(self._free)

    @property
    def busy(self) -> int:
        """Chains the back end has."""
        return len(self._busy)

    def submit(self, readable: Sequence[Part], writable: Sequence[Part]) -> int:
        """Hand a chain of guest addresses over; returns its slot. Only while there `has_room`."""
        slot = self._free.pop()
        self._busy.add(slot)
        parts = [(gpa, size, 0) for gpa, size in readable] + [(gpa, size, VRING_DESC_F_WRITE) for gpa, size in writable]
        at, last = TABLES + TABLE_BYTES * slot, len(parts) - 1
        for number, (gpa, size, flags) in enumerate(parts):
            more = VRING_DESC_F_NEXT if number < last else 0
            DESCRIPTOR.pack_into(self._view, at + DESCRIPTOR.size * number, gpa, size, flags | more, number + 1)
        table = self._gpa + at
        DESCRIPTOR.pack_into(
            self._view, DESCRIPTOR.size * slot, table, DESCRIPTOR.size * len(parts), VRING_DESC_F_INDIRECT, 0
        )
        self._avail[2 + self._next_avail % RING_SIZE] = slot
        self._next_avail = self._next_avail + 1 & 0xFFFF
        self._avail[1] = self._next_avail
        return slot

    def completed(self) -> list[tuple[int, int]]:
        """Slots the back end has finished, with the bytes it says it wrote; one it does not have is left out."""
        done = []
        seen = self._used[1]
        # However far ahead the index claims to be, there cannot be more than a ring's worth.
        for _ in range(min(seen - self._next_used & 0xFFFF, RING_SIZE)):
            at = 2 * (self._next_used % RING_SIZE)
            slot, written = self._elements[at], self._elements[at + 1]
            self._next_used = self._next_used + 1 & 0xFFFF
            if slot in self._busy:
                self._busy.discard(slot)
                self._free.append(slot)
                done.append((slot, written))
        return done

    def close(self) -> None:
        """Let go of the mapping."""
        for view in (self._avail, self._used, self._elements, self._view):
            view.release()

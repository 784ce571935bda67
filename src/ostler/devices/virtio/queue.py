"""Split virtqueues seen from the device, virtio 1.2 section 2.7.

The driver owns every byte of a queue and may change it at any moment. So each descriptor is read
once, judged, and turned into views of guest memory; nothing is looked at twice. What no
well-behaved driver writes raises QueueError, and the transport then asks for a reset: an index that runs
ahead, a chain that loops, is too long, leaves guest memory, has an empty part, or has device-readable
parts behind writable ones, an indirect table inside another one, one that was not negotiated.

Rings are read and written through casted views of guest memory: two-byte loads and stores that
x86 does at once and in order. The one order x86 does not keep is a store before a later load
(our event index, then the driver's index): `_fence` makes it, by any locked instruction.

Left out on purpose: packed rings; suppressing kicks by VRING_USED_F_NO_NOTIFY, which every driver
that has the event index does without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from ostler.abi.virtio.ring import (
    DESCRIPTOR,
    MAX_QUEUE_SIZE,
    VRING_AVAIL_ALIGN_SIZE,
    VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_ALIGN_SIZE,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_USED_ALIGN_SIZE,
    avail_bytes,
    used_bytes,
)
from ostler.devices.virtio.chain import Chain, QueueError, Ranges
from ostler.memory import GuestMemory, MemoryFault

# As many parts as preadv(2) takes. A longer chain would be a way to make the host work for one kick.
MAX_CHAIN_PARTS = 1024
# "The driver MUST NOT create a descriptor chain more than 2^32 bytes long in total" (2.7.4).
MAX_CHAIN_BYTES = 1 << 32

_barrier = threading.Lock()


@dataclass(frozen=True, slots=True)
class QueueLayout:
    """Where the driver put the three areas of a queue, and where it was left off."""

    size: int
    descriptors: int
    driver: int
    device: int
    next_avail: int = 0
    next_used: int = 0


class Virtqueue:
    """One queue while its device runs; made by a transport at DRIVER_OK, closed at reset.

    Calls must be serialised by the owner. `in_flight` chains are popped and not yet pushed.
    """

    def __init__(
        self,
        memory: GuestMemory,
        layout: QueueLayout,
        *,
        interrupt: Callable[[], None],
        event_idx: bool,
        indirect: bool,
    ) -> None:
        """Raises QueueError for areas that are misaligned, outside of memory, or of an impossible size."""
        self.size = layout.size
        self.memory = memory
        self.event_idx = event_idx
        self.in_flight = 0
        self._interrupt = interrupt
        self._indirect = indirect
        self._layout = layout
        if not 0 < layout.size <= MAX_QUEUE_SIZE or layout.size & (layout.size - 1):
            raise QueueError(f"queue of {layout.size} entries: expected a power of two up to {MAX_QUEUE_SIZE}")
        self._mask = layout.size - 1
        self._next_avail = self._seen_avail = layout.next_avail
        self._next_used = self._signalled_used = layout.next_used
        # After restoring nobody knows what the driver was told last: tell it again.
        self._must_signal = bool(layout.next_used)
        self._table = self._area("descriptor table", layout.descriptors, 16 * layout.size, VRING_DESC_ALIGN_SIZE)
        avail = self._area("driver area", layout.driver, avail_bytes(layout.size), VRING_AVAIL_ALIGN_SIZE)
        used = self._area("device area", layout.device, used_bytes(layout.size), VRING_USED_ALIGN_SIZE)
        self._avail = avail.cast("H")
        self._used = used[:4].cast("H")
        self._used_ring = used[4:-2].cast("I")
        self._avail_event = used[-2:].cast("H")
        self._open = True
        self.paused = False
        """The transport forbids access to guest memory for now; takes effect at the next batch."""

    @classmethod
    def unused(cls, memory: GuestMemory) -> Self:
        """A queue the driver did not enable: always empty."""
        queue = cls.__new__(cls)
        queue.size, queue.memory, queue.event_idx, queue.in_flight = 0, memory, False, 0
        queue._interrupt, queue._indirect, queue._layout = _nobody, False, QueueLayout(0, 0, 0, 0)
        queue._mask = queue._next_avail = queue._next_used = queue._signalled_used = 0
        queue._must_signal = queue.paused = False
        queue.close()
        return queue

    def _area(self, what: str, gpa: int, size_bytes: int, align: int) -> memoryview:
        if gpa % align:
            raise QueueError(f"{what} at {gpa:#x}: expected a multiple of {align}")
        try:
            return self.memory.view(gpa, size_bytes)
        except MemoryFault as error:
            raise QueueError(f"{what}: {error}") from error

    # -- the device's side --------------------------------------------------------------------

    def pop(self) -> Chain | None:
        """Take the next available chain, or None when the driver has no more. Raises QueueError."""
        if self._next_avail == self._seen_avail and not self._look():
            return None
        head = self._avail[2 + (self._next_avail & self._mask)]
        chain = self._walk(head)
        self._next_avail = self._next_avail + 1 & 0xFFFF
        self.in_flight += 1
        return chain

    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back with `written` bytes in its writable part, and announce those.

        Chains may come back in any order. After the queue was closed this does nothing.
        """
        if not self._open:
            return
        if written:
            self._announce(chain.ranges, written)
        at = (self._next_used & self._mask) << 1
        self._used_ring[at] = chain.head
        self._used_ring[at + 1] = written
        self._next_used = self._next_used + 1 & 0xFFFF
        self._used[1] = self._next_used
        self.in_flight -= 1

    def push_together(self, chains: Sequence[tuple[Chain, int]]) -> None:
        """Give chains back that the driver must see at once: it may be looking, and finds all of them or none."""
        if not self._open:
            return
        for number, (chain, written) in enumerate(chains):
            self._announce(chain.ranges, written)
            at = (self._next_used + number & self._mask) << 1
            self._used_ring[at] = chain.head
            self._used_ring[at + 1] = written
        self._next_used = self._next_used + len(chains) & 0xFFFF
        self._used[1] = self._next_used
        self.in_flight -= len(chains)

    def flush(self) -> None:
        """Interrupt the driver if it wants to know of what was pushed since the last time."""
        used, before = self._next_used, self._signalled_used
        if used == before or not self._open:
            return
        self.memory.written(self._layout.device, used_bytes(self.size))
        self._signalled_used = used
        _fence()
        if self.event_idx:
            # The driver names the index it sleeps on: has this batch passed it?
            event = self._avail[2 + self.size]
            wanted = (used - event - 1 & 0xFFFF) < (used - before & 0xFFFF)
        else:
            wanted = not self._avail[0] & VRING_AVAIL_F_NO_INTERRUPT
        if wanted or self._must_signal:
            self._must_signal = False
            self._interrupt()

    def unpop(self) -> None:
        """Take back the last `pop`: the chain could not be served yet. Nothing was pushed in between."""
        self._next_avail = self._next_avail - 1 & 0xFFFF
        self.in_flight -= 1

    # -- the transport's side -----------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether the driver uses this queue and the device has not been reset since."""
        return self._open

    @property
    def layout(self) -> QueueLayout:
        """Where the queue is now. Chains in flight count as not taken: they will be popped again."""
        now = self._layout
        return QueueLayout(
            now.size, now.descriptors, now.driver, now.device,
            self._next_avail - self.in_flight & 0xFFFF, self._next_used,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of guest memory; what still completes afterwards changes nothing."""
        self._open = False
        self._seen_avail = self._next_avail
        self._avail = self._used = self._used_ring = self._avail_event = self._table = memoryview(b"")

    # -- inside -------------------------------------------------------------------------------

    def _look(self) -> bool:
        """Whether the driver has added chains; when not, it is asked to notify of the next."""
        if not self._open or self.paused:
            return False
        seen = self._avail[1]
        if seen == self._next_avail and self.event_idx:
            self._avail_event[0] = self._next_avail
            # The driver may have added one before it could see that: the order matters here.
            _fence()
            seen = self._avail[1]
        if (seen - self._next_avail & 0xFFFF) > self.size:
            raise QueueError(f"available index {seen:#x} is more than {self.size} ahead of {self._next_avail:#x}")
        self._seen_avail = seen
        return seen != self._next_avail

    def _walk(self, head: int) -> Chain:
        """Turn descriptors into a chain. Raises QueueError."""
        ranges = Ranges(head)
        self._follow(ranges, self._table, self.size, head, min(self.size, MAX_CHAIN_PARTS))
        return self._chain(head, ranges)

    def _follow(self, ranges: Ranges, table: memoryview, entries: int, index: int, left: int) -> None:
        """Take the descriptors of a table of `entries` from `index` on, `left` of them at most."""
        while left:
            left -= 1
            if index >= entries:
                raise QueueError(f"descriptor {index}: the table has {entries}")
            gpa, length, flags, following = DESCRIPTOR.unpack_from(table, index << 4)
            if flags & VRING_DESC_F_INDIRECT:
                if table is not self._table:
                    raise QueueError(f"descriptor {index}: an indirect table inside another one")
                self._read_through(ranges, self._indirect_table(gpa, length, flags))
                return
            ranges.take(gpa, length, flags)
            if not flags & VRING_DESC_F_NEXT:
                return
            index = following
        raise QueueError(f"chain at {ranges.head} loops or has more than {MAX_CHAIN_PARTS} parts")

    def _read_through(self, ranges: Ranges, table: memoryview) -> None:
        """Take an indirect table. Drivers fill one from its start on, and so it is read, as long as that is true."""
        entries, left = len(table) >> 4, MAX_CHAIN_PARTS - ranges.taken
        for number, (gpa, length, flags, following) in enumerate(DESCRIPTOR.iter_unpack(table), start=1):
            if flags & VRING_DESC_F_INDIRECT:
                raise QueueError(f"descriptor {number - 1}: an indirect table inside another one")
            if number > left:
                break
            ranges.take(gpa, length, flags)
            if not flags & VRING_DESC_F_NEXT:
                return
            if following != number:
                self._follow(ranges, table, entries, following, min(entries, left) - number)
                return
        raise QueueError(f"chain at {ranges.head} leaves its table or has more than {MAX_CHAIN_PARTS} parts")

    def _indirect_table(self, gpa: int, length: int, flags: int) -> memoryview:
        if not self._indirect:
            raise QueueError("indirect descriptor without VIRTIO_F_INDIRECT_DESC")
        if flags & VRING_DESC_F_NEXT:
            raise QueueError("indirect descriptor that has a next one")
        if not length or length % DESCRIPTOR.size:
            raise QueueError(f"indirect table of {length} bytes: expected a multiple of {DESCRIPTOR.size}")
        if length > MAX_CHAIN_PARTS * DESCRIPTOR.size:
            raise QueueError(f"indirect table of {length} bytes: expected at most {MAX_CHAIN_PARTS} entries")
        return self._area("indirect table", gpa, length, 1)

    def _chain(self, head: int, ranges: Ranges) -> Chain:
        """Views of what was taken."""
        chain, view = Chain(head), self.memory.view
        try:
            chain.readable = [view(gpa, length) for gpa, length in ranges.readable]
            chain.writable = [view(gpa, length) for gpa, length in ranges.writable]
        except MemoryFault as error:
            raise QueueError(f"chain at {head}: {error}") from error
        chain.parts = ranges.readable + ranges.writable
        chain.readable_bytes = sum(map(len, chain.readable))
        chain.writable_bytes = sum(map(len, chain.writable))
        if chain.readable_bytes + chain.writable_bytes > MAX_CHAIN_BYTES:
            raise QueueError(f"chain at {head}: longer than {MAX_CHAIN_BYTES:#x} bytes")
        return chain

    def _announce(self, ranges: list[tuple[int, int]], written: int) -> None:
        """Tell the accelerator which guest memory changed behind its back."""
        announce = self.memory.written
        for gpa, length in ranges:
            if length >= written:
                announce(gpa, written)
                return
            announce(gpa, length)
            written -= length


def _nobody() -> None:
    """The interrupt of a queue nobody uses."""


def _fence() -> None:
    """A full memory barrier: taking a lock is a locked instruction."""
    with _barrier:
        pass

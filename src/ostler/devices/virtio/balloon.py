"""The memory balloon, virtio 1.2 section 5.5: pages the guest lends back to the host.

`set_target` asks the guest to shrink or grow; it inflates the balloon by giving pages, which are punched out of guest
memory, and takes them back by just using them again. Free page reporting gives back what the guest has no use for
without anybody asking. Statistics are a snapshot the guest makes when it is asked (`ask_statistics`).

A page that was punched out reads as zeroes. Where the guest says that it poisons free pages with something
else, reports are answered and nothing is punched out.

Left out on purpose: free page hinting, which belongs to migration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ostler.abi.virtio import balloon as abi
from ostler.abi.virtio.common import DeviceId
from ostler.devices.state import Saved, load, save, uint
from ostler.devices.virtio.chain import Chain, QueueError
from ostler.devices.virtio.device import VirtioDevice, read_field
from ostler.devices.virtio.queue import Virtqueue
from ostler.memory import GuestMemory

QUEUE_SIZE, STATISTICS_QUEUE = 128, 2
PAGE_BYTES = 1 << abi.VIRTIO_BALLOON_PFN_SHIFT
# Linux sends a kibibyte of page numbers at a time, and twelve statistics or so.
MAX_PFN_BYTES, MAX_STATISTICS_BYTES = 64 << 10, 4 << 10
FEATURES = (
    abi.VIRTIO_BALLOON_F_STATS_VQ,
    abi.VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
    abi.VIRTIO_BALLOON_F_PAGE_POISON,
    abi.VIRTIO_BALLOON_F_REPORTING,
)


@dataclass(slots=True)
class BalloonState:
    """Its configuration."""

    wanted_pages: int = uint(32)
    actual_pages: int = uint(32)
    poison: int = uint(32)


class Balloon(VirtioDevice):
    """A balloon of up to `memory_bytes`."""

    device_type = DeviceId.BALLOON
    queue_sizes = (QUEUE_SIZE,) * 4
    features = sum(1 << bit for bit in FEATURES)

    def __init__(self, memory_bytes: int) -> None:
        super().__init__()
        self._memory_bytes = memory_bytes
        self._state = BalloonState()
        self._queues: Sequence[Virtqueue] = ()
        self._serve: list[Callable[[Virtqueue], bool]] = []
        self._stats: tuple[Virtqueue, Chain] | None = None
        self._poisons = False
        self.statistics: dict[str, int] = {}
        """The guest's latest, by lower-case name; empty until it was asked."""
        self.on_statistics: Callable[[], None] = _nobody
        """Told when they are new."""
        self.discarded_bytes = 0
        """Everything ever given back to the host."""
        self.ignored_pages = 0
        """Page numbers outside of guest memory."""

    # -- the host's side --------------------------------------------------------------------------

    @property
    def actual_bytes(self) -> int:
        """What the guest says is in the balloon."""
        return self._state.actual_pages * PAGE_BYTES

    def set_target(self, guest_bytes: int) -> None:
        """Ask the guest to keep `guest_bytes` of its memory, all of it at most; it may take its time."""
        kept = min(max(guest_bytes, 0), self._memory_bytes)
        self._state.wanted_pages = (self._memory_bytes - kept) // PAGE_BYTES
        self.config_changed()

    def ask_statistics(self) -> bool:
        """Have the guest make new statistics; false while an earlier request is open or it has none."""
        if self._stats is None:
            return False
        (queue, chain), self._stats = self._stats, None
        queue.push(chain, 0)
        queue.flush()
        return True

    # -- the transport's calls --------------------------------------------------------------------

    def activate(self, queues: Sequence[Virtqueue], features: int) -> None:
        self._queues = queues
        # Queues that were not negotiated have no number: the ones behind them move up.
        self._serve = [self._inflate, self._deflate]
        if features >> abi.VIRTIO_BALLOON_F_STATS_VQ & 1:
            self._serve.append(self._take_statistics)
            # Linux gives its buffer and rings before DRIVER_OK, when nobody listens yet, and never again by itself.
            self.kick_again(STATISTICS_QUEUE)
        if features >> abi.VIRTIO_BALLOON_F_REPORTING & 1:
            self._serve.append(self._reported)
        self._poisons = bool(features >> abi.VIRTIO_BALLOON_F_PAGE_POISON & 1)

    def kicked(self, index: int) -> None:
        if index >= len(self._serve):
            return
        queue, serve = self._queues[index], self._serve[index]
        for _ in range(queue.size):
            if not serve(queue):
                break
        else:
            self.kick_again(index)
        queue.flush()

    def reset(self) -> None:
        # What the host wants survives the driver; what the driver said does not.
        self._state = BalloonState(wanted_pages=self._state.wanted_pages)
        self._queues, self._serve, self._stats = (), [], None

    def read_config(self, offset: int, size: int) -> int:
        state = self._state
        return read_field(abi.CONFIG.pack(state.wanted_pages, state.actual_pages, 0, state.poison), offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        if (offset, size) == (abi.ACTUAL_OFFSET, 4):
            self._state.actual_pages = value
        elif (offset, size) == (abi.POISON_OFFSET, 4):
            self._state.poison = value

    def save(self) -> Saved:
        return save(self._state)

    def restore(self, data: Mapping[str, object]) -> None:
        self._state = load(BalloonState, "balloon", data)

    # -- queues -----------------------------------------------------------------------------------

    def _inflate(self, queue: Virtqueue) -> bool:
        chain = queue.pop()
        if chain is None:
            return False
        for gpa, size in _runs(_page_numbers(chain)):
            self._discard(queue.memory, gpa, size)
        queue.push(chain, 0)
        return True

    def _deflate(self, queue: Virtqueue) -> bool:
        """Pages come back by being touched: there is nothing to do but to answer."""
        chain = queue.pop()
        if chain is None:
            return False
        _page_numbers(chain)
        queue.push(chain, 0)
        return True

    def _take_statistics(self, queue: Virtqueue) -> bool:
        """The guest's buffer stays here until new statistics are wanted."""
        chain = queue.pop()
        if chain is None:
            return False
        data = _bounded(chain, MAX_STATISTICS_BYTES)
        if self._stats is not None:
            queue.push(self._stats[1], 0)
        self._stats = (queue, chain)
        whole = data[: len(data) // abi.STATISTIC.size * abi.STATISTIC.size]
        names = {int(tag): tag.name.lower() for tag in abi.Statistic}
        found = {names[tag]: value for tag, value in abi.STATISTIC.iter_unpack(whole) if tag in names}
        if found:
            self.statistics = found
            self.on_statistics()
        return True

    def _reported(self, queue: Virtqueue) -> bool:
        """Each writable part is a range of free pages, whose content nobody needs."""
        chain = queue.pop()
        if chain is None:
            return False
        if not (self._poisons and self._state.poison):
            for gpa, size in chain.ranges:
                first = -(-gpa // PAGE_BYTES) * PAGE_BYTES
                end = (gpa + size) // PAGE_BYTES * PAGE_BYTES
                if first < end:
                    self._discard(queue.memory, first, end - first)
        queue.push(chain, 0)
        return True

    def _discard(self, memory: GuestMemory, gpa: int, size: int) -> None:
        self.discarded_bytes += memory.discard(gpa, size)
        self.ignored_pages += 0 if memory.contains(gpa, size) else size // PAGE_BYTES


def _bounded(chain: Chain, limit: int) -> bytes:
    if chain.readable_bytes > limit:
        raise QueueError(f"balloon request of {chain.readable_bytes} bytes: expected at most {limit}")
    return chain.read()


def _page_numbers(chain: Chain) -> list[int]:
    data = _bounded(chain, MAX_PFN_BYTES)
    if len(data) % 4:
        raise QueueError(f"balloon request of {len(data)} bytes: expected page numbers of four bytes")
    return list(memoryview(data).cast("I"))


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Address and size of each run of neighbouring pages: the guest lists them in any order."""
    ordered = sorted(set(pages))
    while ordered:
        count = 1
        while count < len(ordered) and ordered[count] == ordered[0] + count:
            count += 1
        yield ordered[0] * PAGE_BYTES, count * PAGE_BYTES
        ordered = ordered[count:]


def _nobody() -> None:
    """Nobody waits for statistics."""

"""The driver's side of virtqueues, for tests of devices: writes rings into guest memory as a guest would.

    driver = FakeDriver(device)
    answer = driver.request(0, readable=[header], writable=[512, 1])

`DriverQueue` also writes what no driver should (`raw_descriptor`, `raw_available`). Nothing here is
shared with the device's code but the layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from ostler.abi.virtio.common import VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC
from ostler.abi.virtio.ring import (
    DESCRIPTOR,
    USED_ELEMENT,
    VRING_DESC_F_INDIRECT,
    VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
    avail_bytes,
    used_bytes,
)
from ostler.devices.virtio.chain import QueueError
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.queue import QueueLayout, Virtqueue
from ostler.memory import GuestMemory

RING_FEATURES = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC


@dataclass(slots=True)
class Sent:
    """A chain the driver made available."""

    head: int
    writable: list[tuple[int, int]]
    written: int | None = None
    """Bytes the device says it wrote; None until the chain is used."""


@dataclass(slots=True)
class Arena:
    """Guest memory handed out from its start on, wrapping round: buffers of finished requests are reused."""

    start: int
    end: int
    at: int = field(init=False)

    def __post_init__(self) -> None:
        self.at = self.start

    def take(self, size_bytes: int, align: int = 16) -> int:
        """Address of `size_bytes` fresh bytes."""
        address = -(-self.at // align) * align
        if address + size_bytes > self.end:
            address = -(-self.start // align) * align
        if address + size_bytes > self.end:
            raise ValueError(f"test arena of {self.end - self.start} bytes: {size_bytes} wanted")
        self.at = address + size_bytes
        return address


class DriverQueue:
    """One ring as its driver sees it."""

    def __init__(self, memory: GuestMemory, base: int, size: int, buffers: Arena) -> None:
        self.memory, self.size, self.buffers = memory, size, buffers
        self.table = base
        self.avail = base + DESCRIPTOR.size * size
        self.used = -(-(self.avail + avail_bytes(size)) // 4) * 4
        self.end = self.used + used_bytes(size)
        memory.write(base, bytes(self.end - base))
        self._free = list(range(size))
        self._lengths: dict[int, int] = {}
        self._next_avail = self._next_used = 0
        self.sent: dict[int, Sent] = {}

    @property
    def layout(self) -> QueueLayout:
        """What a driver tells the transport."""
        return QueueLayout(self.size, self.table, self.avail, self.used)

    # -- what drivers do ----------------------------------------------------------------------

    def add(self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), *, indirect: bool = False) -> Sent:
        """Make a chain of filled and of empty buffers available; the device is not notified."""
        parts: list[tuple[int, int, int]] = []
        for data in readable:
            address = self.buffers.take(len(data))
            self.memory.write(address, data)
            parts.append((address, len(data), 0))
        spaces = [(self.buffers.take(size), size) for size in writable]
        parts += [(address, size, VRING_DESC_F_WRITE) for address, size in spaces]
        return self.add_parts(parts, spaces, indirect=indirect)

    def add_parts(
        self, parts: Sequence[tuple[int, int, int]], spaces: list[tuple[int, int]], *, indirect: bool = False
    ) -> Sent:
        """Make a chain of (address, length, flags) available."""
        if indirect:
            table = self.buffers.take(DESCRIPTOR.size * len(parts))
            for number, (address, length, flags) in enumerate(parts):
                more = number + 1 < len(parts)
                data = DESCRIPTOR.pack(address, length, flags | VRING_DESC_F_NEXT * more, (number + 1) * more)
                self.memory.write(table + DESCRIPTOR.size * number, data)
            parts = [(table, DESCRIPTOR.size * len(parts), VRING_DESC_F_INDIRECT)]
        indices = [self._free.pop(0) for _ in parts]
        for number, (index, (address, length, flags)) in enumerate(zip(indices, parts, strict=True)):
            more = number + 1 < len(parts)
            following = indices[number + 1] if more else 0
            self.raw_descriptor(index, address, length, flags | VRING_DESC_F_NEXT * more, following)
        sent = Sent(indices[0], spaces)
        self._lengths[sent.head] = len(indices)
        self.sent[sent.head] = sent
        self.raw_available(sent.head)
        return sent

    def collect(self) -> list[Sent]:
        """Chains used since the last call, in the device's order; their descriptors are free again."""
        done = []
        while self._next_used != self.memory.read_int(self.used + 2, 2):
            at = self.used + 4 + USED_ELEMENT.size * (self._next_used % self.size)
            head, written = USED_ELEMENT.unpack(self.memory.read(at, USED_ELEMENT.size))
            sent = self.sent.pop(head)
            sent.written = written
            self._release(head)
            self._next_used = self._next_used + 1 & 0xFFFF
            done.append(sent)
        return done

    def contents(self, sent: Sent) -> bytes:
        """Everything in the writable buffers of a chain."""
        return b"".join(self.memory.read(address, size) for address, size in sent.writable)

    def ask_interrupt_after(self, used_index: int) -> None:
        """Write used_event."""
        self.memory.write_int(self.avail + 4 + 2 * self.size, 2, used_index & 0xFFFF)

    def suppress_interrupts(self) -> None:
        """Set VRING_AVAIL_F_NO_INTERRUPT."""
        self.memory.write_int(self.avail, 2, 1)

    @property
    def kick_after(self) -> int:
        """avail_event as the device wrote it."""
        return self.memory.read_int(self.used + 4 + USED_ELEMENT.size * self.size, 2)

    # -- what no driver should do ---------------------------------------------------------------

    def raw_descriptor(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        """Write one descriptor, whatever is in it."""
        self.memory.write(self.table + DESCRIPTOR.size * index, DESCRIPTOR.pack(address, length, flags, following))

    def raw_available(self, head: int) -> None:
        """Publish a head, whatever it is."""
        self.memory.write_int(self.avail + 4 + 2 * (self._next_avail % self.size), 2, head)
        self._next_avail = self._next_avail + 1 & 0xFFFF
        self.raw_index(self._next_avail)

    def raw_index(self, index: int) -> None:
        """Set the available index."""
        self.memory.write_int(self.avail + 2, 2, index)

    def _release(self, head: int) -> None:
        index = head
        for _ in range(self._lengths.pop(head)):
            self._free.append(index)
            index = DESCRIPTOR.unpack(self.memory.read(self.table + DESCRIPTOR.size * index, DESCRIPTOR.size))[3]


class FakeDriver:
    """Drives a device without a transport: rings, kicks, counted interrupts. A context manager that owns its memory."""

    def __init__(
        self,
        device: VirtioDevice,
        *,
        features: int | None = None,
        queue_size: int = 64,
        memory_bytes: int = 4 << 20,
        event_idx: bool = False,
    ) -> None:
        """`features` are the device-specific bits the driver accepts; all on offer if None."""
        self.device = device
        self.memory = GuestMemory.of_size(memory_bytes)
        self.features = (device.features if features is None else features) | RING_FEATURES
        self.interrupts = [0] * len(device.queue_sizes)
        self.config_changes = 0
        self.errors: list[QueueError] = []
        device.config_changed = self._config_changed
        device.broken = self._broken
        self.queues: list[DriverQueue] = []
        self.virtqueues: list[Virtqueue] = []
        base = 0x1000
        sizes = [min(size, queue_size) for size in device.queue_sizes]
        room = sum(0x1000 + 32 * size for size in sizes)
        self.buffers = Arena(base + room, memory_bytes)
        for number, size in enumerate(sizes):
            queue = DriverQueue(self.memory, base, size, self.buffers)
            base = -(-queue.end // 0x1000) * 0x1000
            self.queues.append(queue)
            self.virtqueues.append(
                Virtqueue(
                    self.memory, queue.layout, interrupt=self._counter(number), event_idx=event_idx, indirect=True
                )
            )
        device.reset()
        device.activate(self.virtqueues, self.features)

    def kick(self, index: int) -> None:
        """Notify the device; a broken ring is recorded as a transport would."""
        try:
            self.device.kicked(index)
        except QueueError as error:
            self._broken(error)

    def request(self, index: int, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> bytes:
        """Send one chain and give back what the device wrote. For devices that answer at once."""
        queue = self.queues[index]
        sent = queue.add(readable, writable)
        self.kick(index)
        done = queue.collect()
        if done != [sent]:
            raise AssertionError(f"expected one answer, got {done}; errors {self.errors}")
        return queue.contents(sent)[: sent.written]

    def close(self) -> None:
        """Reset the device, as a transport would, and give memory back."""
        self.device.reset()
        for queue in self.virtqueues:
            queue.close()
        self.memory.close()

    def _counter(self, number: int) -> _Counter:
        return _Counter(self.interrupts, number)

    def _broken(self, error: QueueError) -> None:
        # The traceback keeps views of guest memory alive.
        self.errors.append(error.with_traceback(None))

    def _config_changed(self) -> None:
        self.config_changes += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Counter:
    counts: list[int]
    number: int

    def __call__(self) -> None:
        self.counts[self.number] += 1

"""Back ends in memory for devices under attack: each takes what it is given, and fails now and then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ostler.devices.virtio.console_port import PortEvents
from ostler.devices.virtio.vsock_connection import Stream
from ostler.memory import GuestMemory
from ostler.testing.fakes import scatter
from ostler.testing.hostile import MEMORY_BYTES

DISK_BYTES = 1 << 20


class Disk:
    """A disk in memory; every seventh request fails."""

    read_only, serial, size_bytes = False, "hostile", DISK_BYTES

    def __init__(self) -> None:
        self._data = bytearray(DISK_BYTES)
        self._requests = 0

    def _check(self, offset: int, size: int) -> None:
        assert 0 <= offset <= offset + size <= DISK_BYTES, f"{size} bytes at {offset} got past the device's check"
        self._requests += 1
        if self._requests % 7 == 0:
            raise OSError(5, "bad sector")

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        self._check(offset, sum(map(len, views)))
        for view in views:
            view[:] = self._data[offset : offset + len(view)]
            offset += len(view)

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        self._check(offset, sum(map(len, views)))
        for view in views:
            self._data[offset : offset + len(view)] = view
            offset += len(view)

    def flush(self) -> None:
        self._check(0, 0)

    def discard(self, offset: int, size: int) -> None:
        self._check(offset, size)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:  # noqa: ARG002
        self._check(offset, size)


class Wire:
    """Takes every frame and sends some back."""

    # Checksums and segmentation, both ways.
    features, header_bytes, mtu = 0b11 | 0x7B80, 0, 1500

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []
        self._deliver: Callable[[Sequence[memoryview]], int] | None = None

    def configure(self, offloads: int) -> None:
        """All are the same to this wire."""

    def attach(self, deliver: Callable[[Sequence[memoryview]], int], writable: Callable[[], None]) -> None:  # noqa: ARG002
        self._deliver = deliver

    def send(self, frames: Sequence[list[memoryview]]) -> bool:
        back = [memoryview(b"".join(frame)) for frame in frames[:8]]
        if self._deliver is not None and back:
            self._deliver(back)
        return True

    def resume(self) -> None:
        """Frames that found no room are lost."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        callback()


class EchoStream:
    """A socket that gives back what it takes, in a turn of its own; sometimes it is full, sometimes it breaks."""

    def __init__(self, calls: list[Callable[[], None]], number: int) -> None:
        self._calls = calls
        self._kept = bytearray()
        self._turns = number
        self._reading = self._writing = self._closed = False

    def bind(self, readable: Callable[[], None], writable: Callable[[], None]) -> None:
        self._readable, self._writable = readable, writable

    def watch(self, *, read: bool, write: bool) -> None:
        assert not self._closed, "a closed stream is watched"
        if (read and not self._reading) or (write and not self._writing):
            self._calls.append(self._turn)
        self._reading, self._writing = read, write

    def _turn(self) -> None:
        if self._writing:
            self._writable()
        if self._reading and self._kept:
            self._readable()

    def _check(self) -> None:
        assert not self._closed, "a closed stream is used"
        self._turns += 1
        if self._turns % 97 == 0:
            raise ConnectionResetError

    def available(self) -> int | None:
        self._check()
        return len(self._kept) or (None if self._turns % 31 == 0 else 0)

    def hung_up(self) -> bool:
        return self._turns % 2 == 0

    def read_into(self, views: Sequence[memoryview]) -> int:
        self._check()
        return scatter(self._kept, views)

    def write(self, views: Sequence[memoryview]) -> int:
        self._check()
        if self._turns % 5 == 0 or len(self._kept) > 1 << 16:
            return 0
        taken = b"".join(views)[: self._turns % 4096]
        self._kept += taken
        return len(taken)

    def finish_writing(self) -> None:
        assert not self._closed

    def established(self, host_port: int) -> None:
        assert host_port > 0

    def close(self) -> None:
        assert not self._closed, "a stream is closed twice"
        self._closed = True
        self._reading = self._writing = False


class Listeners:
    """Listens on even ports; what is to be done later is done at the next connection or call."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []
        self._made = 0

    def connect(self, host_port: int) -> Stream | None:
        self._made += 1
        self.run()
        return None if host_port % 2 else EchoStream(self._calls, self._made)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._calls.append(callback)

    def run(self) -> None:
        calls, self._calls[:] = self._calls[:256], self._calls[256:]
        for call in calls:
            call()


class Peer:
    """The host's end of a console port: takes a part of everything, and gives it back."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._turns = 0

    def bind(self, events: PortEvents) -> None:
        self._events = events

    def watch(self, *, read: bool, write: bool) -> None:
        """Events come with the writes."""

    def read_into(self, views: Sequence[memoryview]) -> int:
        return scatter(self._kept, views)

    def write(self, views: Sequence[memoryview]) -> int:
        self._turns += 1
        if self._turns % 50 == 0:
            self._events.opened(is_open=bool(self._turns % 100))
        taken = b"".join(view[:64] for view in views[:4])[: self._turns % 128]
        self._kept += taken[: max(4096 - len(self._kept), 0)]
        self._events.readable()
        return len(taken)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """What is left waits for the next kick."""


class Room:
    """A queue of sixteen."""

    def __init__(self) -> None:
        self.slots: list[int] = []

    @property
    def has_room(self) -> bool:
        return len(self.slots) < 16


class Program:
    """Another program's place: answers all it has at each notification, with odd lengths."""

    features, config = (1 << 24) - 1, bytes(range(60))

    def __init__(self, queues: int) -> None:
        self._rings = [Room() for _ in range(queues)]
        self._serial = 0
        self._completed: Callable[[int, list[tuple[int, int]]], None] = lambda _queue, _done: None

    @property
    def rings(self) -> Sequence[Room]:
        return self._rings

    def attach(
        self,
        completed: Callable[[int, list[tuple[int, int]]], None],
        restarted: Callable[[], None],  # noqa: ARG002
        lost: Callable[[], None],  # noqa: ARG002
    ) -> None:
        self._completed = completed

    def start(self, memory: GuestMemory, features: int, queues: Sequence[int]) -> None:  # noqa: ARG002
        for ring in self._rings:
            ring.slots.clear()

    def stop(self) -> None:
        for index in range(len(self._rings)):
            self.notify(index)

    def submit(self, queue: int, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]) -> int:
        for gpa, size in (*readable, *writable):
            assert 0 < size <= gpa + size <= MEMORY_BYTES, f"{gpa:#x}+{size:#x} got past the device's check"
        self._serial += 1
        self._rings[queue].slots.append(self._serial)
        return self._serial

    def notify(self, queue: int) -> None:
        slots, self._rings[queue].slots = self._rings[queue].slots, []
        if slots:
            self._completed(queue, [(slot, slot * 7919 & 0xFFFF_FFFF) for slot in slots])

    def write_config(self, offset: int, data: bytes) -> None:
        """Nothing to keep."""

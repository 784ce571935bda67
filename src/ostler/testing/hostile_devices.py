"""Every device of Ostler with a back end in memory, and requests for `HostileGuest` to damage."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from ostler.abi.virtio import balloon as balloon_abi
from ostler.abi.virtio import blk as blk_abi
from ostler.devices.virtio.balloon import Balloon
from ostler.devices.virtio.blk import Block
from ostler.devices.virtio.console import ConsoleDevice
from ostler.devices.virtio.console_port import Port, PortEvents
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.external import ExternalBlock, SharedFolder
from ostler.devices.virtio.net import NetDevice
from ostler.devices.virtio.rng import Entropy
from ostler.devices.virtio.vsock import VsockDevice
from ostler.devices.virtio.vsock_connection import Stream
from ostler.memory import GuestMemory
from ostler.testing.fakes import scatter
from ostler.testing.hostile import MEMORY_BYTES, Seed

Victim = tuple[VirtioDevice, dict[int, list[Seed]]]
DISK_BYTES = 1 << 20


class _Disk:
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


def block() -> Victim:
    """A disk with two queues."""
    requests: list[Seed] = [
        ([blk_abi.REQUEST.pack(blk_abi.VIRTIO_BLK_T_IN, 0, 4)], [4096, 1]),
        ([blk_abi.REQUEST.pack(blk_abi.VIRTIO_BLK_T_OUT, 0, 8), bytes(1024)], [1]),
        ([blk_abi.REQUEST.pack(blk_abi.VIRTIO_BLK_T_FLUSH, 0, 0)], [1]),
        ([blk_abi.REQUEST.pack(blk_abi.VIRTIO_BLK_T_GET_ID, 0, 0)], [20, 1]),
        ([blk_abi.REQUEST.pack(blk_abi.VIRTIO_BLK_T_DISCARD, 0, 0), blk_abi.RANGE.pack(8, 8, 0)], [1]),
        ([blk_abi.REQUEST.pack(blk_abi.VIRTIO_BLK_T_WRITE_ZEROES, 0, 0), blk_abi.RANGE.pack(8, 8, 1)], [1]),
    ]
    return Block(_Disk(), queue_count=2), {0: requests, 1: requests}


def entropy() -> Victim:
    """The entropy device."""
    return Entropy(bytes), {0: [([], [64]), ([], [16, 16])]}


def balloon() -> Victim:
    """The balloon. Pages it is given are the guest's own rings now and then."""
    pages: Seed = ([struct.pack("<8I", *range(512, 520))], [])
    statistics: Seed = ([balloon_abi.STATISTIC.pack(4, 1 << 20)], [])
    return Balloon(MEMORY_BYTES), {0: [pages], 1: [pages], 2: [statistics], 3: [([], [0x2000])]}


class _Wire:
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


def net() -> Victim:
    """A network card on a wire that echoes."""
    frame: Seed = ([bytes(12), bytes(range(60))], [])
    commands: list[Seed] = [
        ([bytes([kind, number]), data], [1])
        for kind, number, data in ((0, 0, b"\1"), (1, 0, bytes(8)), (1, 1, bytes(6)), (3, 0, b""), (5, 0, bytes(8)))
    ]
    buffers: list[Seed] = [([], [2048]), ([], [12, 30])]
    return NetDevice(_Wire(), mac=bytes.fromhex("525400123456")), {0: buffers, 1: [frame], 2: commands}


class _EchoStream:
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


class _Listeners:
    """Listens on even ports; what is to be done later is done at the next connection or call."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []
        self._made = 0

    def connect(self, host_port: int) -> Stream | None:
        self._made += 1
        self.run()
        return None if host_port % 2 else _EchoStream(self._calls, self._made)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._calls.append(callback)

    def run(self) -> None:
        calls, self._calls[:] = self._calls[:256], self._calls[256:]
        for call in calls:
            call()


def vsock() -> Victim:
    """The vsock device with listeners that echo, and a guest with several connections."""
    packets = [
        struct.pack("<QQIIIHHIII", 3, 2, 5000 + port % 3, port, len(data), 1, op, flags, 1 << 18, 0) + data
        for port in (80, 81, 82)
        for op, flags, data in (
            (1, 0, b""), (1, 0, b""), (2, 0, b""), (3, 0, b""), (4, 1, b""), (4, 2, b""), (5, 0, b"data" * 50),
            (5, 0, b"x"), (6, 0, b""), (7, 0, b""),
        )
    ]  # fmt: skip
    return VsockDevice(_Listeners()), {0: [([], [4096])], 1: [([packet], []) for packet in packets], 2: [([], [4])]}


class _Peer:
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


def console() -> Victim:
    """A terminal and a named port."""
    peers = _Peer(), _Peer()
    device = ConsoleDevice([Port("console", peers[0], is_console=True), Port("org.ostler.agent", peers[1])])
    for peer in peers:
        peer._events.opened(is_open=True)
    control: list[Seed] = [
        ([struct.pack("<IHH", port, event, 1)], []) for port in (0, 1) for event in (0, 3, 6)
    ]  # fmt: skip
    data: list[Seed] = [([b"output"], []), ([b"a", b"b" * 500], [])]
    room: list[Seed] = [([], [64])]
    return device, {0: room, 1: data, 2: room, 3: control, 4: room, 5: data}


class _Room:
    """A queue of sixteen."""

    def __init__(self) -> None:
        self.slots: list[int] = []

    @property
    def has_room(self) -> bool:
        return len(self.slots) < 16


class _Program:
    """Another program's place: answers all it has at each notification, with odd lengths."""

    features, config = (1 << 24) - 1, bytes(range(60))

    def __init__(self, queues: int) -> None:
        self._rings = [_Room() for _ in range(queues)]
        self._serial = 0
        self._completed: Callable[[int, list[tuple[int, int]]], None] = lambda _queue, _done: None

    @property
    def rings(self) -> Sequence[_Room]:
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


def external_block() -> Victim:
    """A disk that another program serves."""
    _, seeds = block()
    return ExternalBlock(_Program(2), serial="hostile", queue_sizes=(64, 64), feature_mask=(1 << 24) - 1), seeds


def share() -> Victim:
    """A shared folder."""
    request: Seed = ([struct.pack("<IIQQIIIIIIII", 56, 26, 1, 0, 0, 0, 0, 0, 7, 31, 0, 0)], [16, 64])
    return SharedFolder(_Program(2), "share0", queue_size=64), {0: [request], 1: [request]}


VICTIMS: dict[str, Callable[[], Victim]] = {
    "block": block,
    "entropy": entropy,
    "balloon": balloon,
    "net": net,
    "vsock": vsock,
    "external block": external_block,
    "share": share,
    "console": console,
}

"""Every device of Ostler with a back end in memory, and requests for `HostileGuest` to damage."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from ostler.abi.virtio import balloon as balloon_abi
from ostler.abi.virtio import blk as blk_abi
from ostler.devices.virtio.balloon import Balloon
from ostler.devices.virtio.blk import Block
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.net import NetDevice
from ostler.devices.virtio.rng import Entropy
from ostler.devices.virtio.vsock import VsockDevice
from ostler.devices.virtio.vsock_connection import Stream
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

    features, header_bytes, mtu = 0, 0, 1500

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []
        self._deliver: Callable[[Sequence[memoryview]], int] | None = None

    def configure(self, offloads: int) -> None:
        """No offloads are on offer."""

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
    return NetDevice(_Wire(), mac=bytes.fromhex("525400123456")), {0: [([], [2048])], 1: [frame]}


class _NoListener:
    """Refuses every connection."""

    def connect(self, host_port: int) -> Stream | None:  # noqa: ARG002
        return None

    def call_soon(self, callback: Callable[[], None]) -> None:
        callback()


def vsock() -> Victim:
    """The vsock device with nobody listening."""
    packets = [
        struct.pack("<QQIIIHHIII", 3, 2, 5000, 80, len(data), 1, op, 0, 1 << 18, 0) + data
        for op, data in ((1, b""), (2, b""), (3, b""), (4, b""), (5, b"data"), (6, b""), (7, b""))
    ]
    return VsockDevice(_NoListener()), {0: [([], [4096])], 1: [([packet], []) for packet in packets], 2: [([], [4])]}


VICTIMS: dict[str, Callable[[], Victim]] = {
    "block": block,
    "entropy": entropy,
    "balloon": balloon,
    "net": net,
    "vsock": vsock,
}

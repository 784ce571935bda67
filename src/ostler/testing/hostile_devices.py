"""Every device of Ostler with a back end in memory, and requests for `HostileGuest` to damage."""

from __future__ import annotations

import struct
from collections.abc import Callable

from ostler.abi.virtio import balloon as balloon_abi
from ostler.abi.virtio import blk as blk_abi
from ostler.devices.virtio.balloon import Balloon
from ostler.devices.virtio.blk import Block
from ostler.devices.virtio.console import ConsoleDevice
from ostler.devices.virtio.console_port import Port
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.external import ExternalBlock, SharedFolder
from ostler.devices.virtio.net import NetDevice
from ostler.devices.virtio.rng import Entropy
from ostler.devices.virtio.vsock import VsockDevice
from ostler.testing.hostile import MEMORY_BYTES, Seed
from ostler.testing.hostile_backends import Disk, Listeners, Peer, Program, Wire

Victim = tuple[VirtioDevice, dict[int, list[Seed]]]


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
    return Block(Disk(), queue_count=2), {0: requests, 1: requests}


def entropy() -> Victim:
    """The entropy device."""
    return Entropy(bytes), {0: [([], [64]), ([], [16, 16])]}


def balloon() -> Victim:
    """The balloon. Pages it is given are the guest's own rings now and then."""
    pages: Seed = ([struct.pack("<8I", *range(512, 520))], [])
    statistics: Seed = ([balloon_abi.STATISTIC.pack(4, 1 << 20)], [])
    return Balloon(MEMORY_BYTES), {0: [pages], 1: [pages], 2: [statistics], 3: [([], [0x2000])]}


def net() -> Victim:
    """A network card on a wire that echoes."""
    frame: Seed = ([bytes(12), bytes(range(60))], [])
    commands: list[Seed] = [
        ([bytes([kind, number]), data], [1])
        for kind, number, data in ((0, 0, b"\1"), (1, 0, bytes(8)), (1, 1, bytes(6)), (3, 0, b""), (5, 0, bytes(8)))
    ]
    buffers: list[Seed] = [([], [2048]), ([], [12, 30])]
    return NetDevice(Wire(), mac=bytes.fromhex("525400123456")), {0: buffers, 1: [frame], 2: commands}


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
    return VsockDevice(Listeners()), {0: [([], [4096])], 1: [([packet], []) for packet in packets], 2: [([], [4])]}


def console() -> Victim:
    """A terminal and a named port."""
    peers = Peer(), Peer()
    device = ConsoleDevice([Port("console", peers[0], is_console=True), Port("org.ostler.agent", peers[1])])
    for peer in peers:
        peer._events.opened(is_open=True)
    control: list[Seed] = [
        ([struct.pack("<IHH", port, event, 1)], []) for port in (0, 1) for event in (0, 3, 6)
    ]  # fmt: skip
    data: list[Seed] = [([b"output"], []), ([b"a", b"b" * 500], [])]
    room: list[Seed] = [([], [64])]
    return device, {0: room, 1: data, 2: room, 3: control, 4: room, 5: data}


def external_block() -> Victim:
    """A disk that another program serves."""
    _, seeds = block()
    return ExternalBlock(Program(2), serial="hostile", queue_sizes=(64, 64), feature_mask=(1 << 24) - 1), seeds


def share() -> Victim:
    """A shared folder."""
    request: Seed = ([struct.pack("<IIQQIIIIIIII", 56, 26, 1, 0, 0, 0, 0, 0, 7, 31, 0, 0)], [16, 64])
    return SharedFolder(Program(2), "share0", queue_size=64), {0: [request], 1: [request]}


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

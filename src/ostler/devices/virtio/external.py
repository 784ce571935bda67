"""Devices whose requests another program serves: disks in formats of their own, shared folders.

Chains are taken from the guest's rings and checked here, handed to a `Server` as guest addresses, and given back when
it has finished. If the server starts afresh, everything it had not answered is handed over again in its old order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ostler.abi.virtio import blk
from ostler.abi.virtio.common import DeviceId
from ostler.devices.virtio.chain import Chain, QueueError
from ostler.devices.virtio.device import VirtioDevice, read_field
from ostler.devices.virtio.queue import Virtqueue
from ostler.devices.virtio.rate_limit import Pace, RateLimit
from ostler.errors import HostError
from ostler.memory import GuestMemory

Part = tuple[int, int]


class Ring(Protocol):
    """A server's queue."""

    @property
    def has_room(self) -> bool: ...


class Server(Protocol):
    """Who does the work; `ostler.backends.vhost_user` has it in full."""

    features: int
    config: bytes

    @property
    def rings(self) -> Sequence[Ring]: ...
    def attach(
        self,
        completed: Callable[[int, list[tuple[int, int]]], None],
        restarted: Callable[[], None],
        lost: Callable[[], None],
    ) -> None: ...
    def start(self, memory: GuestMemory, features: int, queues: Sequence[int]) -> None: ...
    def stop(self) -> None: ...
    def submit(self, queue: int, readable: Sequence[Part], writable: Sequence[Part]) -> int: ...
    def notify(self, queue: int) -> None: ...
    def write_config(self, offset: int, data: bytes) -> None: ...


class ExternalDevice(VirtioDevice):
    """A device served by another program."""

    shares_memory = True

    def __init__(
        self, server: Server, *, queue_sizes: tuple[int, ...], feature_mask: int, limit: RateLimit | None = None
    ) -> None:
        """`feature_mask` is what of the server's features this device may offer, `limit` of what goes both ways."""
        super().__init__()
        self._pace = Pace(limit, self)
        self.queue_sizes = queue_sizes
        self.features = server.features & feature_mask
        self._server = server
        self._queues: Sequence[Virtqueue] = ()
        self._under_way: list[dict[int, Chain]] = [{} for _ in queue_sizes]
        self._negotiated = 0
        self._stopping = False
        server.attach(self._completed, self._restarted, self._lost)

    @property
    def server(self) -> Server:
        """Who serves it."""
        return self._server

    def activate(self, queues: Sequence[Virtqueue], features: int) -> None:
        self._queues, self._negotiated = queues, features & self.features
        self._start()

    def kicked(self, index: int) -> None:
        if index >= len(self._queues) or self._stopping:
            return
        queue, ring, under_way = self._queues[index], self._server.rings[index], self._under_way[index]
        submitted = False
        while ring.has_room and self._pace.may_pass(index) and (chain := queue.pop()) is not None:
            self._pace.spend(chain.readable_bytes + chain.writable_bytes)
            written = self._answer(chain)
            if written is not None:
                queue.push(chain, written)
                continue
            under_way[self._submit(index, chain)] = chain
            submitted = True
        if submitted:
            self._server.notify(index)
        queue.flush()

    def reset(self) -> None:
        if self._queues:
            self._stop()
        self._pace.reset()
        self._queues = ()
        for under_way in self._under_way:
            under_way.clear()

    def drain(self) -> None:
        """Have everything answered; the server starts again with what the guest asks next."""
        if not self._queues:
            return
        self._stop()
        try:
            self._start()
        except QueueError as error:
            self.broken(error)

    def read_config(self, offset: int, size: int) -> int:
        return read_field(self._server.config, offset, size)

    def _answer(self, chain: Chain) -> int | None:  # noqa: ARG002
        """Bytes written to a request that is answered here; None for one the server is to see."""
        return None

    def _start(self) -> None:
        enabled = [index for index, queue in enumerate(self._queues) if queue.enabled]
        try:
            self._server.start(self._queues[0].memory, self._negotiated, enabled)
        except HostError as error:
            raise QueueError(f"no server: {error}") from error

    def _stop(self) -> None:
        """Completions still come, and are passed on, while the server finishes; nothing new is handed to it."""
        self._stopping = True
        self._server.stop()
        self._stopping = False

    def _submit(self, index: int, chain: Chain) -> int:
        count = len(chain.readable)
        return self._server.submit(index, chain.parts[:count], chain.parts[count:])

    def _completed(self, index: int, done: list[tuple[int, int]]) -> None:
        if index >= len(self._queues):
            return
        queue, under_way = self._queues[index], self._under_way[index]
        for slot, written in done:
            chain = under_way.pop(slot, None)
            if chain is not None:
                queue.push(chain, min(written, chain.writable_bytes))
        try:
            self.kicked(index)
        except QueueError as error:
            self.broken(error)
        queue.flush()

    def _restarted(self) -> None:
        for index, under_way in enumerate(self._under_way):
            chains = list(under_way.values())
            under_way.clear()
            for chain in chains:
                under_way[self._submit(index, chain)] = chain
            if chains:
                self._server.notify(index)

    def _lost(self) -> None:
        self.broken(QueueError("its server is gone"))


class ExternalBlock(ExternalDevice):
    """A disk served by another program, with its configuration from there."""

    device_type = DeviceId.BLOCK

    def __init__(
        self, server: Server, *, serial: str, queue_sizes: tuple[int, ...], feature_mask: int,
        limit: RateLimit | None = None,
    ) -> None:  # fmt: skip
        """`serial` is told instead of the server's, which is the same for every disk."""
        super().__init__(server, queue_sizes=queue_sizes, feature_mask=feature_mask, limit=limit)
        self._serial = serial.encode("ascii", "replace")[: blk.VIRTIO_BLK_ID_BYTES]

    def _answer(self, chain: Chain) -> int | None:
        if chain.readable_bytes != blk.REQUEST.size or chain.writable_bytes != blk.VIRTIO_BLK_ID_BYTES + 1:
            return None
        if blk.REQUEST.unpack(chain.read())[0] != blk.VIRTIO_BLK_T_GET_ID:
            return None
        return chain.write(self._serial.ljust(blk.VIRTIO_BLK_ID_BYTES, b"\0") + bytes([blk.VIRTIO_BLK_S_OK]))

    def write_config(self, offset: int, size: int, value: int) -> None:
        self._server.write_config(offset, value.to_bytes(size, "little"))


class SharedFolder(ExternalDevice):
    """A folder of the host by FUSE requests, virtio 1.2 section 5.11.

    Its saved state says nothing of the files the guest has open: those are the server's, and end with it.
    """

    device_type = DeviceId.FS

    TAG_BYTES, QUEUES = 36, 2

    def __init__(self, server: Server, tag: str, *, queue_size: int) -> None:
        """`tag` is what the guest mounts it by. One queue of urgent requests and one of all others."""
        super().__init__(server, queue_sizes=(queue_size,) * self.QUEUES, feature_mask=0)
        name = tag.encode()
        if not 0 < len(name) <= self.TAG_BYTES:
            raise ValueError(f"tag {tag!r}: expected 1 to {self.TAG_BYTES} bytes")
        self._config = name.ljust(self.TAG_BYTES, b"\0") + (1).to_bytes(4, "little")

    def read_config(self, offset: int, size: int) -> int:
        return read_field(self._config, offset, size)

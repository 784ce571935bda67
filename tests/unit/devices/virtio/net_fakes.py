"""Both neighbours of the network card: a wire in lists, and a guest's driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from ostler.devices.virtio import net_header as net
from ostler.devices.virtio.net import CTRL, RX, TX, NetDevice
from ostler.devices.virtio.rate_limit import RateLimit
from ostler.testing.virtio import FakeDriver

MAC = bytes.fromhex("525400123456")


class FakeWire:
    """A back end that keeps what it is sent and delivers what it is told to."""

    def __init__(self, *, features: int = 0, header_bytes: int = 0, mtu: int = 1500) -> None:
        self.features, self.header_bytes, self.mtu = features, header_bytes, mtu
        self.sent: list[bytes] = []
        self.batches: list[int] = []
        self.offloads: int | None = None
        self.full_after: int | None = None
        self.waiting: list[memoryview] = []
        self.calls: list[Callable[[], None]] = []

    def attach(self, deliver: Callable[[Sequence[memoryview]], int], writable: Callable[[], None]) -> None:
        self.deliver, self.writable = deliver, writable

    def configure(self, offloads: int) -> None:
        self.offloads = offloads

    def send(self, frames: Sequence[list[memoryview]]) -> bool:
        self.sent += [b"".join(frame) for frame in frames]
        self.batches.append(len(frames))
        return self.full_after is None or len(self.sent) < self.full_after

    def receive(self, *frames: bytes) -> int:
        """Frames from outside; those not taken wait for `resume`."""
        self.waiting += [memoryview(frame) for frame in frames]
        return self._hand_over()

    def resume(self) -> None:
        self._hand_over()

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.calls.append(callback)

    def _hand_over(self) -> int:
        if not self.waiting:
            return 0
        taken = self.deliver(self.waiting)
        del self.waiting[:taken]
        return taken


class Card:
    """A device with wire and driver."""

    def __init__(
        self,
        *,
        features: int | None = None,
        tx_limit: RateLimit | None = None,
        rx_limit: RateLimit | None = None,
        offloads: int = 0,
        header_bytes: int = 0,
        mtu: int = 1500,
    ) -> None:
        """`features` are those the driver accepts, all on offer if None; `offloads` are the wire's."""
        self.wire = FakeWire(features=offloads, header_bytes=header_bytes, mtu=mtu)
        self.device = NetDevice(self.wire, mac=MAC, tx_limit=tx_limit, rx_limit=rx_limit)
        self.driver = FakeDriver(self.device, features=features, memory_bytes=16 << 20)
        self.rx, self.tx, self.ctrl = (self.driver.queues[at] for at in (RX, TX, CTRL))

    def give(self, count: int, *sizes: int) -> None:
        for _ in range(count):
            self.rx.add(writable=sizes)
        self.driver.kick(RX)

    def send(self, *frames: bytes, header: bytes = bytes(net.HEADER_BYTES)) -> None:
        for frame in frames:
            self.tx.add([header, frame])
        self.driver.kick(TX)
        self.tx.collect()

    def received(self) -> list[bytes]:
        """Buffers used since the last call, each as far as it was written."""
        return [self.rx.contents(sent)[: sent.written] for sent in self.rx.collect()]

    def command(self, kind: int, number: int, data: bytes = b"") -> int:
        return self.driver.request(CTRL, [bytes([kind, number]), data] if data else [bytes([kind, number])], [1])[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.driver.close()

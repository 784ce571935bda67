"""Both neighbours of the vsock device: streams without sockets, and a guest's driver that speaks packets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from ostler.devices.virtio.vsock import EVENT, RX, TX, VsockDevice
from ostler.devices.virtio.vsock_packet import HEADER, HEADER_BYTES, HOST_CID, TYPE_STREAM, Header
from ostler.testing.fakes import scatter
from ostler.testing.virtio import FakeDriver, Sent

GUEST_CID = 3


class FakeStream:
    """A host socket in two byte arrays. `room` is what it takes of the guest's bytes before it would block."""

    def __init__(self, incoming: bytes = b"", *, room: int = 1 << 30) -> None:
        self.incoming = bytearray(incoming)
        self.ended = self.gone = self.finished = self.closed = self.broken = False
        self.outgoing = bytearray()
        self.room = room
        self.accepted_port: int | None = None
        self.reading = self.writing = False
        self.readable: Callable[[], None] = self._unbound
        self.writable: Callable[[], None] = self._unbound

    def _unbound(self) -> None:
        raise AssertionError("event of a stream nobody bound")

    def bind(self, readable: Callable[[], None], writable: Callable[[], None]) -> None:
        self.readable, self.writable = readable, writable

    def watch(self, *, read: bool, write: bool) -> None:
        assert not self.closed
        self.reading, self.writing = read, write

    def available(self) -> int | None:
        self._check()
        return len(self.incoming) or (None if self.ended or self.gone else 0)

    def hung_up(self) -> bool:
        return self.gone

    def read_into(self, views: Sequence[memoryview]) -> int:
        self._check()
        return scatter(self.incoming, views)

    def write(self, views: Sequence[memoryview]) -> int:
        self._check()
        if self.gone:
            raise BrokenPipeError
        taken = b"".join(views)[: self.room]
        self.outgoing += taken
        self.room -= len(taken)
        return len(taken)

    def finish_writing(self) -> None:
        self.finished = True

    def established(self, host_port: int) -> None:
        self.accepted_port = host_port

    def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        assert not self.closed
        if self.broken:
            raise ConnectionResetError

    def pump(self) -> None:
        """What an event loop would do now."""
        for _ in range(1000):
            if self.closed or not self.reading or not (self.incoming or self.ended or self.gone or self.broken):
                break
            self.readable()
        if not self.closed and self.writing and self.room:
            self.writable()


class FakeBackend:
    """Listeners by port, and calls kept for later."""

    def __init__(self) -> None:
        self.listeners: dict[int, list[FakeStream]] = {}
        self.calls: list[Callable[[], None]] = []

    def connect(self, host_port: int) -> FakeStream | None:
        waiting = self.listeners.get(host_port)
        return waiting.pop(0) if waiting else None

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.calls.append(callback)

    def run_calls(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class Guest:
    """A device with its driver: sends packets, receives them parsed."""

    def __init__(self, *, rx_buffers: int = 32, rx_bytes: int = 4096, events: bool = True) -> None:
        self.backend = FakeBackend()
        self.device = VsockDevice(self.backend, guest_cid=GUEST_CID)
        self.driver = FakeDriver(self.device, memory_bytes=16 << 20)
        self.rx_bytes = rx_bytes
        self.rx, self.tx, self.events = (self.driver.queues[at] for at in (RX, TX, EVENT))
        if events:
            self.events.add(writable=[8])
            self.driver.kick(EVENT)
        self.give_buffers(rx_buffers)

    def give_buffers(self, count: int, *sizes: int) -> list[Sent]:
        """Buffers as Linux gives them: a header and a page."""
        given = [self.rx.add(writable=sizes or (HEADER_BYTES, self.rx_bytes)) for _ in range(count)]
        self.driver.kick(RX)
        return given

    def send(
        self, op: int, guest_port: int, host_port: int, payload: bytes = b"", *, alloc: int = 1 << 18, **fields: int
    ) -> None:
        """One packet to the device, its fields overridden at will."""
        values = {
            "src_cid": GUEST_CID, "dst_cid": HOST_CID, "src_port": guest_port, "dst_port": host_port,
            "len": len(payload), "type": TYPE_STREAM, "op": op, "flags": 0, "buf_alloc": alloc, "fwd_cnt": 0,
        }  # fmt: skip
        raw = HEADER.pack(*(values | fields).values())
        self.send_raw(raw, payload)

    def send_raw(self, *parts: bytes) -> None:
        self.tx.add([part for part in parts if part])
        self.driver.kick(TX)
        self.tx.collect()

    def received(self, *, refill: bool = True) -> list[tuple[Header, bytes]]:
        """Packets since the last call; buffers are given back."""
        packets = []
        done = self.rx.collect()
        for sent in done:
            raw = self.rx.contents(sent)[: sent.written]
            packets.append((Header._make(HEADER.unpack_from(raw)), raw[HEADER_BYTES:]))
        if refill and done:
            self.give_buffers(len(done))
        return packets

    def ops(self) -> list[int]:
        return [header.op for header, _ in self.received()]

    def close(self) -> None:
        self.driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

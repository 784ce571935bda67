"""Random conversations through the vsock device, against the plain rule: what goes in comes out, in order, once.

The model keeps what each side was given and checks what the other got, and that nobody sends beyond its credit.
`OSTLER_TEST_STEPS` makes the conversations longer.
"""

from __future__ import annotations

import os
import random

import pytest

from ostler.devices.virtio.vsock_connection import BUFFER_BYTES
from ostler.devices.virtio.vsock_packet import (
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
)
from tests.unit.devices.virtio.vsock_fakes import FakeStream, Guest

STEPS = int(os.environ.get("OSTLER_TEST_STEPS", "400"))


class Conversation:
    """One connection, seen from the guest."""

    def __init__(self, guest: Guest, number: int, rng: random.Random) -> None:
        self.rng = rng
        self.stream = FakeStream(room=rng.randrange(5000))
        self.guest = guest
        self.guest_port, self.host_port = 6000 + number, 80
        guest.backend.listeners.setdefault(80, []).append(self.stream)
        self.to_guest, self.to_host, self.got = bytearray(), bytearray(), bytearray()
        self.alloc = rng.choice((1000, 5000, 1 << 18))
        self.forwarded = 0
        self.device_alloc = self.device_forwarded = 0
        self.send(OP_REQUEST)

    def send(self, op: int, payload: bytes = b"", **fields: int) -> None:
        self.guest.send(
            op, self.guest_port, self.host_port, payload, alloc=self.alloc, fwd_cnt=self.forwarded, **fields
        )

    def step(self) -> None:
        """One thing that either side may do."""
        rng = self.rng
        choice = rng.randrange(5)
        if choice == 0:
            room = self.device_alloc - (len(self.to_host) - self.device_forwarded)
            data = rng.randbytes(min(rng.choice((1, 100, 5000, 65536)), room))
            if data:
                self.to_host += data
                self.send(OP_RW, data)
        elif choice == 1:
            data = rng.randbytes(rng.choice((1, 50, 4096, 20_000)))
            self.to_guest += data
            self.stream.incoming += data
        elif choice == 2:
            self.stream.room += rng.choice((0, 1, 1000, 300_000))
        elif choice == 3:
            # The guest's program reads, and the guest says so.
            self.forwarded = len(self.got)
            self.send(OP_CREDIT_UPDATE)
        self.stream.pump()

    def take(self, op: int, alloc: int, forwarded: int, payload: bytes) -> None:
        """A packet of the device for this connection."""
        self.device_alloc, self.device_forwarded = alloc, forwarded
        assert op in (OP_RESPONSE, OP_RW, OP_CREDIT_UPDATE)
        assert forwarded <= len(self.stream.outgoing)
        self.got += payload
        assert len(self.got) - self.forwarded <= self.alloc, "the device sends beyond the guest's credit"

    def check(self) -> None:
        """Nothing lost, nothing twice, nothing out of order so far."""
        assert self.to_guest.startswith(self.got)
        assert self.to_host.startswith(self.stream.outgoing)

    def finish(self, everyone: list[Conversation]) -> None:
        """Everybody reads what there is."""
        self.stream.room = 1 << 40
        for _ in range(4000):
            self.stream.pump()
            receive(self.guest, everyone)
            if len(self.got) == len(self.to_guest) and len(self.stream.outgoing) == len(self.to_host):
                break
            self.forwarded = len(self.got)
            self.send(OP_CREDIT_UPDATE)
        assert self.got == self.to_guest
        assert self.stream.outgoing == self.to_host
        self.send(OP_SHUTDOWN, flags=SHUTDOWN_BOTH)
        assert self.stream.closed
        everyone.remove(self)


def receive(guest: Guest, conversations: list[Conversation]) -> None:
    by_port = {each.guest_port: each for each in conversations}
    for header, payload in guest.received():
        if header.dst_port in by_port:
            by_port[header.dst_port].take(header.op, header.buf_alloc, header.fwd_cnt, payload)


@pytest.mark.parametrize("seed", range(6))
def test_every_byte_arrives_once_and_in_order_and_within_credit(seed: int) -> None:
    rng = random.Random(seed)
    with Guest(rx_buffers=rng.choice((1, 4, 30)), rx_bytes=rng.choice((200, 700, 4096))) as guest:
        conversations = [Conversation(guest, number, rng) for number in range(3)]
        for _ in range(STEPS):
            rng.choice(conversations).step()
            receive(guest, conversations)
            for each in conversations:
                each.check()
                assert len(each.stream.outgoing) + BUFFER_BYTES >= len(each.to_host)
        for each in [*conversations]:
            each.finish(conversations)
        assert guest.device.connection_count == 0
        assert guest.driver.errors == []

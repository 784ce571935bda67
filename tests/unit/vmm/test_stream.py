"""A client's socket on the loop: what it is sent, what it says, and how it ends."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from ostler.vmm.loop import EventLoop
from ostler.vmm.stream import ClientStream

LIMIT_BYTES = 4 << 20


class Watched:
    """The part of a loop that streams use; events happen when a test says so."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], None]] = {}
        self.writers: dict[int, Callable[[], None]] = {}

    def add_reader(self, fd: int, call: Callable[[], None]) -> None:
        self.readers[fd] = call

    def add_writer(self, fd: int, call: Callable[[], None]) -> None:
        self.writers[fd] = call

    def remove_reader(self, fd: int) -> None:
        self.readers.pop(fd, None)

    def remove_writer(self, fd: int) -> None:
        self.writers.pop(fd, None)


class Pair:
    """A stream, the client at its other end, and what the stream's owner was told."""

    def __init__(self) -> None:
        ours, self.client = socket.socketpair()
        self.fd = ours.fileno()
        self.loop = Watched()
        self.received: list[bytes] = []
        self.ends = 0
        self.stream = ClientStream(
            ours, cast(EventLoop, self.loop), receive_bytes=8, max_unsent_bytes=LIMIT_BYTES,
            received=self.received.append, ended=self._ended,
        )  # fmt: skip

    def _ended(self) -> None:
        self.ends += 1
        self.stream.let_go().close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.client.close()
    if made.stream.is_open:
        made.stream.let_go().close()


def test_bytes_come_in_as_they_are_read(pair: Pair) -> None:
    pair.stream.read()
    pair.client.sendall(b"0123456789")

    pair.loop.readers[pair.fd]()
    pair.loop.readers[pair.fd]()
    pair.stream.read(wanted=False)

    assert pair.received == [b"01234567", b"89"]
    assert pair.loop.readers == {}


def test_full_socket_is_written_to_when_there_is_room(pair: Pair) -> None:
    data = bytes(range(256)) * 8192
    pair.stream.send(data)
    got = bytearray()

    while pair.loop.writers:
        got += pair.client.recv(1 << 20)
        pair.loop.writers[pair.fd]()
    pair.client.settimeout(10)
    while len(got) < len(data):
        got += pair.client.recv(1 << 20)

    assert got == data
    assert pair.stream.unsent == b""


def test_client_that_lets_too_much_lie_is_as_good_as_gone(pair: Pair) -> None:
    pair.stream.send(bytes(LIMIT_BYTES))
    assert pair.ends == 0

    pair.stream.send(bytes(LIMIT_BYTES))
    pair.stream.send(b"and more")

    assert pair.ends == 1
    assert (pair.loop.readers, pair.loop.writers) == ({}, {})


def test_client_that_has_gone_ends_the_stream_once(pair: Pair) -> None:
    pair.stream.read()
    pair.client.close()

    pair.loop.readers[pair.fd]()
    pair.stream.read()

    assert (pair.ends, pair.loop.readers) == (1, {})


def test_writing_to_a_client_that_has_gone_keeps_nothing(pair: Pair) -> None:
    pair.client.close()

    pair.stream.send(b"x")

    assert (pair.ends, bytes(pair.stream.unsent)) == (1, b"")


def test_let_go_leaves_what_was_not_sent_to_the_caller(pair: Pair) -> None:
    pair.stream.send(bytes(2 << 20))
    waiting = len(pair.stream.unsent)

    connected = pair.stream.let_go()

    assert 0 < waiting == len(pair.stream.unsent)
    assert pair.loop.writers == {}
    connected.close()

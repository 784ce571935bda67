"""A console port's UNIX socket with real clients."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import pytest

from ostler.backends.console_port import PortSocket
from ostler.errors import HostError
from tests.unit.backends.conftest import TIMEOUT_S, RunningLoop


class FakePort:
    """Keeps what it is told; reads what there is."""

    def __init__(self, backend: PortSocket) -> None:
        self.backend = backend
        self.told: Queue[bool | bytes] = Queue()
        backend.bind(self)

    def opened(self, *, is_open: bool) -> None:
        self.told.put(is_open)
        if is_open:
            self.backend.watch(read=True, write=False)

    def readable(self) -> None:
        buffer = memoryview(bytearray(100))
        if count := self.backend.read_into([buffer]):
            self.told.put(bytes(buffer[:count]))

    def writable(self) -> None:
        """Nothing waits."""

    def next(self) -> bool | bytes:
        return self.told.get(timeout=TIMEOUT_S)


@pytest.fixture
def port(running: RunningLoop, tmp_path: Path) -> Iterator[FakePort]:
    backend = PortSocket(tmp_path / "port.sock", running.host)
    yield running.call(lambda: FakePort(backend))
    running.call(backend.close)
    assert not backend.path.exists()


def client(port: FakePort) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT_S)
    sock.connect(str(port.backend.path))
    return sock


def test_clients_come_and_go_one_at_a_time(port: FakePort, running: RunningLoop) -> None:
    with client(port) as first, client(port) as second:
        second.sendall(b"later")
        assert port.next() is True
        first.sendall(b"ping")
        assert port.next() == b"ping"
        running.call(lambda: port.backend.write([memoryview(b"po"), memoryview(b"ng")]))
        assert first.recv(10) == b"pong"
        first.close()
        assert [port.next() for _ in range(3)] == [False, True, b"later"]


def test_without_a_client_nothing_is_taken_and_nothing_there(port: FakePort, running: RunningLoop) -> None:
    assert running.call(lambda: port.backend.write([memoryview(b"x")])) == 0
    assert running.call(lambda: port.backend.read_into([memoryview(bytearray(1))])) == 0


def test_socket_that_cannot_be_made_is_one_line(running: RunningLoop, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"console port .*: No such file or directory"):
        PortSocket(tmp_path / "none" / "port.sock", running.host)

"""The UNIX sockets of vsock, with real clients and a device that stands in for the guest."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ostler.backends.vsock import SocketStream, VsockSockets, parse_greeting
from ostler.devices.virtio.vsock import FIRST_HOST_PORT
from ostler.devices.virtio.vsock_packet import OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW, OP_SHUTDOWN
from ostler.errors import HostError
from tests.unit.backends.conftest import TIMEOUT_S, RunningLoop
from tests.unit.devices.virtio.vsock_fakes import Guest


class SocketGuest(Guest):
    """The scripted guest on real sockets."""

    def __init__(self, sockets: VsockSockets, running: RunningLoop) -> None:
        super().__init__()
        self.running = running
        self.device._backend = sockets

    def next_packets(self, count: int) -> list[tuple[int, int, bytes]]:
        """Wait for packets: operation, host port, payload."""
        packets: list[tuple[int, int, bytes]] = []
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            got = self.running.call(self.received)
            packets += [(header.op, header.src_port, data) for header, data in got]
            if len(packets) >= count:
                return packets
        raise AssertionError(f"expected {count} packets, got {packets}")


@pytest.fixture
def sockets(running: RunningLoop, tmp_path: Path) -> Iterator[VsockSockets]:
    made = VsockSockets(tmp_path / "vsock.sock", running.host)
    yield made
    running.call(made.close)


@pytest.fixture
def guest(sockets: VsockSockets, running: RunningLoop) -> Iterator[SocketGuest]:
    guest = SocketGuest(sockets, running)
    running.call(lambda: sockets.attach(guest.device))
    yield guest
    running.call(guest.close)


def client(path: Path, greeting: bytes = b"") -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT_S)
    sock.connect(str(path))
    sock.sendall(greeting)
    return sock


def test_client_is_connected_to_the_guest_and_both_ways_carry_bytes(
    sockets: VsockSockets, guest: SocketGuest, running: RunningLoop
) -> None:
    with client(sockets.path, b"CONNECT 1024\nearly") as sock:
        ((op, host_port, _),) = guest.next_packets(1)
        assert op == OP_REQUEST
        running.call(lambda: guest.send(OP_RESPONSE, 1024, host_port))
        assert sock.recv(64) == b"OK %d\n" % host_port
        assert guest.next_packets(1) == [(OP_RW, host_port, b"early")]
        running.call(lambda: guest.send(OP_RW, 1024, host_port, b"answer"))
        assert sock.recv(64) == b"answer"
        sock.close()
        assert guest.next_packets(1) == [(OP_SHUTDOWN, host_port, b"")]


def test_socket_that_was_moved_is_reached_where_it_is_now(tmp_path: Path, running: RunningLoop) -> None:
    with VsockSockets(tmp_path / "before", running.host) as sockets:
        sockets.move(tmp_path / "after")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(tmp_path / "after"))
        assert not (tmp_path / "before").exists()
    assert not (tmp_path / "after").exists()


def test_client_whose_port_the_guest_refuses_sees_the_end(
    sockets: VsockSockets, guest: SocketGuest, running: RunningLoop
) -> None:
    with client(sockets.path, b"CONNECT 5\n") as sock:
        ((_, host_port, _),) = guest.next_packets(1)
        running.call(lambda: guest.send(OP_RST, 5, host_port))
        assert sock.recv(64) == b""


def test_client_before_the_driver_sees_the_end(sockets: VsockSockets, guest: SocketGuest, running: RunningLoop) -> None:
    running.call(guest.device.reset)

    with client(sockets.path, b"CONNECT 5\n") as sock:
        assert sock.recv(64) == b""


@pytest.mark.parametrize("greeting", [b"HELLO 5\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"C" * 40, b"\n"])
def test_client_that_greets_wrongly_is_closed(sockets: VsockSockets, guest: SocketGuest, greeting: bytes) -> None:
    with client(sockets.path, greeting) as sock:
        try:
            assert sock.recv(64) == b""
        except ConnectionResetError:
            # What was sent after the limit is never read.
            assert len(greeting) > 32
    assert guest.device.connection_count == 0


def test_greeting_in_pieces_is_understood(sockets: VsockSockets, guest: SocketGuest) -> None:
    with client(sockets.path) as sock:
        for byte in b"CONNECT 7\n":
            sock.send(bytes([byte]))
        assert guest.next_packets(1)[0][0] == OP_REQUEST


def test_clients_wait_while_there_are_no_descriptors(
    sockets: VsockSockets, guest: SocketGuest, running: RunningLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exhausted:
        """The listener of a process without descriptors."""

        def __init__(self, listener: socket.socket) -> None:
            self.fileno = listener.fileno

        def accept(self) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

    with client(sockets.path, b"CONNECT 7\n") as first:
        guest.next_packets(1)
        with monkeypatch.context() as patched:
            patched.setattr(sockets, "_listener", Exhausted(sockets._listener))
            running.call(sockets._accept)
        assert not sockets._listening
        second = client(sockets.path, b"CONNECT 8\n")
        first.close()
        with second:
            assert guest.next_packets(2) == [(OP_RST, FIRST_HOST_PORT, b""), (OP_REQUEST, FIRST_HOST_PORT + 1, b"")]


def test_guest_reaches_a_listener_beside_the_socket(
    sockets: VsockSockets, guest: SocketGuest, running: RunningLoop
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{sockets.path}_9")
        listener.listen()
        listener.settimeout(TIMEOUT_S)
        running.call(lambda: guest.send(OP_REQUEST, 77, 9))
        assert guest.next_packets(1) == [(OP_RESPONSE, 9, b"")]
        sock, _ = listener.accept()
        with sock:
            running.call(lambda: guest.send(OP_RW, 77, 9, b"from the guest"))
            assert sock.recv(64) == b"from the guest"
            sock.sendall(b"x" * 100_000)
            got = b""
            while len(got) < 100_000:
                got += b"".join(data for _, _, data in guest.next_packets(1))
    assert got == b"x" * 100_000


def test_guest_asking_for_a_port_without_listener_is_refused(guest: SocketGuest, running: RunningLoop) -> None:
    running.call(lambda: guest.send(OP_REQUEST, 77, 10))

    assert guest.next_packets(1) == [(OP_RST, 10, b"")]


def test_stale_socket_is_replaced_and_one_in_use_is_not(running: RunningLoop, tmp_path: Path) -> None:
    path = tmp_path / "vsock.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    sockets = VsockSockets(path, running.host)
    with pytest.raises(HostError, match="another process"):
        VsockSockets(path, running.host)
    running.call(sockets.close)

    assert not path.exists()


def test_path_too_long_for_a_socket_is_one_line(running: RunningLoop, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"vsock socket .*: "):
        VsockSockets(tmp_path / ("x" * 120), running.host)


def test_closing_leaves_no_descriptor_open(sockets: VsockSockets, guest: SocketGuest, running: RunningLoop) -> None:
    with client(sockets.path, b"CONNECT 7\n") as sock, client(sockets.path) as silent:
        guest.next_packets(1)
        running.call(sockets.close)
        assert sock.recv(1) == b""
        assert silent.recv(1) == b""


def test_stream_says_what_is_there_and_how_it_ended(running: RunningLoop) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        stream = SocketStream(ours, running.host, lambda _: None)
        assert stream.available() == 0
        theirs.send(b"abc")
        assert stream.available() == 3
        buffers = [memoryview(bytearray(2)), memoryview(bytearray(2))]
        assert stream.read_into(buffers) == 3
        theirs.shutdown(socket.SHUT_WR)
        assert (stream.available(), stream.hung_up()) == (None, False)
    assert (stream.available(), stream.hung_up()) == (None, True)
    running.call(stream.dispose)


@pytest.mark.parametrize(
    ("line", "port"),
    [(b"CONNECT 1024\n", 1024), (b"CONNECT 4294967295\n", None), (b"CONNECT\n", None), (b"connect 1\n", None)],
)
def test_greeting_is_parsed(line: bytes, port: int | None) -> None:
    assert parse_greeting(line) == port

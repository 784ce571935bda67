"""The host side of virtio-vsock over UNIX sockets, in the convention other VMMs have too.

A program on the host connects to `PATH`, sends `CONNECT <port>\\n` with the guest's port, and gets `OK <host port>\\n`
when the guest accepts, or the end of the stream when it refuses or has no driver yet. From then on the socket is the
stream. A guest that connects to CID 2, port N, reaches whoever listens on `PATH_N`; nobody there is a refusal.

`PATH` should lie in a folder of the user's own (mode 0700): whoever can connect to it reaches the guest.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import socket
import termios
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self

from ostler.backends.loop import Host
from ostler.errors import HostError

BACKLOG = 64
# "CONNECT 4294967295\n" and no more; clients that have not finished saying it are few at any time.
GREETING_BYTES = 32
MAX_GREETINGS = 64
MAX_PORT = 0xFFFF_FFFE
# Iovec entries that sendmsg(2) and recvmsg(2) take.
IOV_MAX = 1024
SOCKET_BUFFER_BYTES = 1 << 20


class Opener(Protocol):
    """The device, as far as the host's side needs it."""

    def open(self, stream: SocketStream, guest_port: int) -> bool:
        """Ask the guest for a connection; false when that is not possible now."""


class SocketStream:
    """One host socket, never blocking. Calls hold the board's lock; events are delivered under it."""

    def __init__(self, sock: socket.socket, host: Host, forget: Callable[[SocketStream], None]) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        self._socket = sock
        self._host = host
        self._forget = forget
        self._readable: Callable[[], None] = _nothing
        self._writable: Callable[[], None] = _nothing
        self._reading = self._writing = self._closed = False

    def bind(self, readable: Callable[[], None], writable: Callable[[], None]) -> None:
        self._readable, self._writable = self._host.locked(readable), self._host.locked(writable)

    def watch(self, *, read: bool, write: bool) -> None:
        if self._closed:
            return
        loop, fd = self._host.loop, self._socket.fileno()
        if read is not self._reading:
            self._reading = read
            loop.add_reader(fd, self._readable) if read else loop.remove_reader(fd)
        if write is not self._writing:
            self._writing = write
            loop.add_writer(fd, self._writable) if write else loop.remove_writer(fd)

    def available(self) -> int | None:
        count = array.array("i", [0])
        fcntl.ioctl(self._socket, termios.FIONREAD, count)
        if count[0]:
            return count[0]
        try:
            return None if not self._socket.recv(1, socket.MSG_PEEK) else 1
        except BlockingIOError:
            return 0

    def hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self._socket, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    def read_into(self, views: Sequence[memoryview]) -> int:
        try:
            return self._socket.recvmsg_into(views[:IOV_MAX])[0]
        except BlockingIOError:
            return 0

    def write(self, views: Sequence[memoryview]) -> int:
        try:
            return self._socket.sendmsg(views[:IOV_MAX], (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def finish_writing(self) -> None:
        # The other side may have gone; then there is nobody to be told.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def established(self, host_port: int) -> None:
        self.write([memoryview(b"OK %d\n" % host_port)])

    def close(self) -> None:
        """At the loop's next turn: a device is reset in a processor's thread."""
        if not self._closed:
            self._closed = True
            self._host.loop.call_soon(self.dispose)

    def dispose(self) -> None:
        """Close now. Loop thread, or after the loop's end."""
        self._closed = True
        fd = self._socket.fileno()
        if fd >= 0:
            self._host.loop.remove_reader(fd)
            self._host.loop.remove_writer(fd)
            self._socket.close()
            self._forget(self)


class VsockSockets:
    """Listens on `path` for programs that want to reach the guest; a context manager, owns every socket."""

    def __init__(self, path: Path, host: Host) -> None:
        """Raises HostError when the socket cannot be made there, or another guest's process listens on it."""
        self.path = path
        self._host = host
        self._device: Opener | None = None
        self._greetings: set[_Greeting] = set()
        self._streams: set[SocketStream] = set()
        self._listening = False
        self._listener = _listen(path)

    def attach(self, device: Opener) -> None:
        """Serve clients from now on. Loop thread, or before the loop runs."""
        self._device = device
        self._listening = True
        self._host.loop.add_reader(self._listener.fileno(), self._accept)

    def move(self, path: Path) -> None:
        """Be reached there from now on. Before the loop runs. Raises HostError."""
        try:
            self.path.rename(path)
        except OSError as error:
            raise HostError(f"vsock socket {path}: {error.strerror or error}") from error
        self.path = path

    # -- asked by the device ----------------------------------------------------------------

    def connect(self, host_port: int) -> SocketStream | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(f"{self.path}_{host_port}")
        except OSError:
            # Nobody listens, may not be asked, or has too many waiting already.
            sock.close()
            return None
        return self._stream(sock)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._host.loop.call_soon(self._host.locked(callback))

    # -- clients ----------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            # No descriptors left: clients wait until one comes back, instead of the loop asking without end.
            self._host.loop.remove_reader(self._listener.fileno())
            self._listening = False
            return
        if len(self._greetings) >= MAX_GREETINGS:
            client.close()
            return
        self._greetings.add(_Greeting(client, self._host, self._greeted))

    def _greeted(self, greeting: _Greeting, client: socket.socket, port: int | None) -> None:
        self._greetings.discard(greeting)
        if port is None or self._device is None:
            client.close()
            return
        stream = self._stream(client)
        with self._host.lock:
            if not self._device.open(stream, port):
                stream.dispose()

    def _stream(self, sock: socket.socket) -> SocketStream:
        stream = SocketStream(sock, self._host, self._ended)
        self._streams.add(stream)
        return stream

    def _ended(self, stream: SocketStream) -> None:
        self._streams.discard(stream)
        if not self._listening and self._device is not None and self._listener.fileno() >= 0:
            self._listening = True
            self._host.loop.add_reader(self._listener.fileno(), self._accept)

    # -- end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Close every socket and remove the path. Loop thread, or after the loop's end."""
        if self._listener.fileno() < 0:
            return
        self._host.loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for greeting in [*self._greetings]:
            greeting.give_up()
        for stream in [*self._streams]:
            stream.dispose()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class _Greeting:
    """A client that has not said yet which port it wants."""

    def __init__(
        self, client: socket.socket, host: Host, done: Callable[[_Greeting, socket.socket, int | None], None]
    ) -> None:
        client.setblocking(False)
        self._client = client
        self._host = host
        self._done = done
        host.loop.add_reader(client.fileno(), self._readable)
        self._line = b""

    def _readable(self) -> None:
        try:
            # Looked at first: what follows the line is the guest's.
            seen = self._client.recv(GREETING_BYTES - len(self._line), socket.MSG_PEEK)
            end = seen.find(b"\n") + 1
            self._line += self._client.recv(end or len(seen)) if seen else b""
        except BlockingIOError:
            return
        except OSError:
            seen, end = b"", 0
        if end or not seen or len(self._line) >= GREETING_BYTES:
            self._finish(parse_greeting(self._line) if end else None)

    def _finish(self, port: int | None) -> None:
        self._host.loop.remove_reader(self._client.fileno())
        self._done(self, self._client, port)

    def give_up(self) -> None:
        """The guest ends before the client said anything."""
        self._finish(None)


def parse_greeting(line: bytes) -> int | None:
    """The port of `CONNECT <port>\\n`, or None for anything else."""
    words = line.split()
    if len(words) != 2 or words[0] != b"CONNECT" or not words[1].isdigit() or len(words[1]) > 10:
        return None
    port = int(words[1])
    return port if port <= MAX_PORT else None


def _listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        sock.setblocking(False)
        sock.bind(os.fspath(path))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise HostError(f"vsock socket {path}: {reason}") from error
    return sock


def _remove_stale(path: Path) -> None:
    """A socket nobody listens on is left over from a process that died. Raises OSError if somebody does."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise FileExistsError(None, "another process listens on it")


def _nothing() -> None:
    """No device is bound yet."""

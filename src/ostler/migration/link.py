"""One stream of a migration: a connected socket, perhaps with TLS, frames in and out. Blocking, one thread at a time.

OpenSSL's connections are not for two threads at once, so whoever sends on a link also reads from it, by `pending`
when there is something else to do.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from collections.abc import Sequence
from typing import Self

from ostler.errors import MigrationError
from ostler.migration import wire
from ostler.migration.address import Address, TlsFiles, connect
from ostler.migration.wire import HEADER, Frame, Kind, Purpose

IOV_MAX = 1024
SOCKET_BUFFER_BYTES = 1 << 20
# A page that a guest waits for must not queue behind a megabyte that it does not.
NARROW_BUFFER_BYTES = 128 << 10
DEFAULT_TIMEOUT_S = 30.0


class LinkLost(MigrationError):
    """The connection ended or stood still: what that means depends on how far the migration was."""


class Link:
    """Owns the socket; a context manager."""

    def __init__(self, connected: socket.socket, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._socket = connected
        self._head = bytearray(HEADER.size)
        self._tls = connected if isinstance(connected, ssl.SSLSocket) else None
        self.sent_bytes = 0
        self.received_bytes = 0
        connected.settimeout(timeout_s)
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def set_timeout(self, timeout_s: float | None) -> None:
        """How long one send or receive may stand still."""
        self._socket.settimeout(timeout_s)

    def narrow(self) -> None:
        """Keep little on the way: what is sent next is wanted soon."""
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, option, NARROW_BUFFER_BYTES)

    def send(self, data: bytes) -> None:
        """Raises LinkLost."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise _lost(error) from error
        self.sent_bytes += len(data)

    def send_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        """One frame in parts, without a copy where there is no TLS. Raises LinkLost."""
        size = sum(len(part) for part in parts)
        try:
            if self._tls is not None or len(parts) > IOV_MAX:
                self._socket.sendall(b"".join(parts))
            else:
                done = self._socket.sendmsg(parts)
                if done < size:
                    self._send_rest(parts, done)
        except OSError as error:
            raise _lost(error) from error
        self.sent_bytes += size

    def _send_rest(self, parts: Sequence[bytes | memoryview], done: int) -> None:
        for part in parts:
            if done < len(part):
                self._socket.sendall(part[done:])
            done = max(0, done - len(part))

    def receive(self, into: bytearray | None = None) -> Frame:
        """The next frame; its payload lies in `into`, where that is large enough, until the next call.

        Raises LinkLost, MigrationError.
        """
        self._fill(memoryview(self._head))
        kind, size = wire.parse_header(self._head)
        payload = memoryview(bytearray(size)) if into is None or len(into) < size else memoryview(into)[:size]
        self._fill(payload)
        self.received_bytes += HEADER.size + size
        return Frame(kind, payload)

    def pending(self, timeout_s: float = 0) -> bool:
        """Whether something, or the end, can be received."""
        if self._tls is not None and self._tls.pending():
            return True
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def fileno(self) -> int:
        return self._socket.fileno()

    def _fill(self, view: memoryview) -> None:
        while view:
            try:
                got = self._socket.recv_into(view)
            except OSError as error:
                raise _lost(error) from error
            if not got:
                raise LinkLost("migration: the other side closed the connection")
            view = view[got:]

    def close(self) -> None:
        self._socket.close()

    def shutdown(self) -> None:
        """End it for both sides at once, whatever another thread is doing with it."""
        # Of the plain socket: TLS's own would wait for the thread that sends.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _lost(error: OSError) -> LinkLost:
    if isinstance(error, TimeoutError):
        return LinkLost("migration: the connection stood still for too long")
    return LinkLost(f"migration: connection lost: {error.strerror or error}")


def open_link(
    address: Address, tls: TlsFiles | None, session: bytes, stream: int, *,
    purpose: Purpose = Purpose.MIGRATE, timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Link:  # fmt: skip
    """Connect to a target. Raises MigrationError."""
    try:
        connected = connect(address, timeout_s)
    except OSError as error:
        raise MigrationError(f"{address}: {error.strerror or error}; expected `ostler receive` there") from error
    try:
        _tune(connected)
        connected.sendall(wire.pack_preamble(session, stream, purpose))
        if tls is not None:
            context = tls.context(server=False)
            context.check_hostname = not address.path
            connected = context.wrap_socket(connected, server_hostname=None if address.path else address.host)
    except (OSError, MigrationError) as error:
        connected.close()
        raise MigrationError(f"{address}: {_reason(error)}") from error
    return Link(connected, timeout_s=timeout_s)


def accept_link(connected: socket.socket, tls: TlsFiles | None, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Link:
    """The target's end of a connection whose preamble has been read. Raises MigrationError."""
    try:
        connected.settimeout(timeout_s)
        _tune(connected)
        if tls is not None:
            connected = tls.context(server=True).wrap_socket(connected, server_side=True)
    except OSError as error:
        connected.close()
        raise MigrationError(f"migration: {_reason(error)}") from error
    return Link(connected, timeout_s=timeout_s)


def _tune(connected: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connected.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: the other side's certificate does not hold: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, OSError):
        return str(error.strerror or error)
    return str(error)


def read_preamble(connected: socket.socket) -> wire.Preamble:
    """Of a connection just accepted. Raises MigrationError."""
    data = b""
    try:
        while len(data) < wire.PREAMBLE.size:
            more = connected.recv(wire.PREAMBLE.size - len(data))
            if not more:
                break
            data += more
    except OSError as error:
        raise MigrationError(f"migration: {_reason(error)}") from error
    return wire.parse_preamble(data)


def expect(link: Link, *kinds: Kind) -> Frame:
    """The next frame, which is one of these. Raises MigrationError."""
    frame = link.receive()
    if frame.kind not in kinds:
        names = " or ".join(kind.name for kind in kinds)
        raise MigrationError(f"migration: {frame.kind.name} came, expected {names}")
    return frame

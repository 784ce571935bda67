"""The control socket's server: connections, framing, bounds. What requests mean is the service's business.

One request has one reply. Requests that wait for the guest's end are answered then. Events go to the connections that
asked for them. A connection that asks for the console stops being lines and becomes the console's bytes. Everything
runs on the loop's thread; no client can make the loop wait.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, Self

from ostler.control.runtime import VMM_LOG
from ostler.control.wire import VERSION, Decoder, Message, WireError, encode, pack_error
from ostler.errors import BadRequest, HostError, OstlerError
from ostler.vmm.loop import EventLoop
from ostler.vmm.stream import ClientStream

MAX_CONNECTIONS = 64
MAX_UNSENT_BYTES = 4 << 20
RECEIVE_BYTES = 64 << 10
LAST_SEND_S = 1.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group


class Service(Protocol):
    """Does what is asked for."""

    def serve(self, connection: Connection, number: object, op: str, arguments: Message) -> Message | None:
        """The result, or None where `connection` has been or will be answered otherwise. Raises OstlerError."""


class Connection:
    """One client. Answers may come later: `reply`; what comes by itself: `send`."""

    def __init__(self, connected: socket.socket, loop: EventLoop, server: ControlServer) -> None:
        self._server = server
        self._decoder = Decoder()
        self._stream = ClientStream(
            connected, loop, receive_bytes=RECEIVE_BYTES, max_unsent_bytes=MAX_UNSENT_BYTES,
            received=self._received, ended=self.close,
        )  # fmt: skip
        self.wants_events = False
        self.when_gone: list[Callable[[], None]] = []
        """Called once when the client has gone, or the connection has become something else."""
        self._stream.read()

    @property
    def is_open(self) -> bool:
        return self._stream.is_open

    def reply(self, number: object, result: Message) -> None:
        """Answer the request of that number."""
        self.send({"id": number, "ok": result})

    def send(self, message: Message) -> None:
        """Send one message; a client that lets megabytes lie is cut off."""
        self._stream.send(encode(message))

    def release(self, last: Message) -> tuple[socket.socket, bytes, bytes]:
        """Give the socket away: with it, what is still to be sent, `last` at its end, and what has come in since."""
        connected = self._let_go()
        return connected, bytes(self._stream.unsent) + encode(last), self._decoder.rest()

    def close(self, *, politely: bool = False) -> None:
        """End the connection; politely: after sending what waits, for at most a second."""
        if not self.is_open:
            return
        connected = self._let_go()
        if politely:
            with contextlib.suppress(OSError):
                connected.settimeout(LAST_SEND_S)
                connected.sendall(self._stream.unsent)
        connected.close()

    def _let_go(self) -> socket.socket:
        gone, self.when_gone = self.when_gone, []
        for each in gone:
            each()
        self._server.forget(self)
        return self._stream.let_go()

    def _received(self, data: bytes) -> None:
        self._decoder.feed(data)
        try:
            while self.is_open and (message := self._decoder.next()) is not None:
                self._server.serve(self, message)
        except WireError as error:
            self.send({"id": None, "error": pack_error(BadRequest(f"control request: {error}"))})
            self.close(politely=True)


class ControlServer:
    """Listens in the guest's folder; a context manager."""

    def __init__(self, path: Path, loop: EventLoop, name: str) -> None:
        """Raises OSError."""
        self._path = path
        self._loop = loop
        self._hello = {"ostler-control": VERSION, "name": name, "pid": os.getpid()}
        self._connections: set[Connection] = set()
        self.service: Service | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(path))
            path.chmod(0o600)
            self._listener.listen(16)
            self._listener.setblocking(False)
        except OSError:
            self._listener.close()
            raise
        loop.add_reader(self._listener.fileno(), self._acceptable)

    def broadcast(self, event: Message) -> None:
        """Send an event to whoever wants events."""
        for connection in [*self._connections]:
            if connection.wants_events:
                connection.send(event)

    def forget(self, connection: Connection) -> None:
        """The connection has ended, or is somebody else's now."""
        self._connections.discard(connection)

    def serve(self, connection: Connection, message: Message) -> None:
        """Answer one request, or have it answered later."""
        number = message.pop("id", None)
        op = message.pop("op", None)
        try:
            if self.service is None or not isinstance(op, str):
                raise BadRequest(f"control request {op!r}: expected an operation's name")
            result = self.service.serve(connection, number, op, message)
        except OstlerError as error:
            connection.send({"id": number, "error": pack_error(error)})
            return
        except Exception as error:
            # A bug in one operation must not take the guest along.
            traceback.print_exc()
            text = f"internal error: {type(error).__name__}: {error} (a bug of Ostler's; see {VMM_LOG})"
            connection.send({"id": number, "error": pack_error(HostError(text))})
            return
        if result is not None:
            connection.reply(number, result)

    def close(self) -> None:
        """Say what is still to be said, and leave no socket behind."""
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for connection in [*self._connections]:
            connection.close(politely=True)
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _acceptable(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError:
            return
        # The folder keeps strangers out already; a socket handed on by its owner does not get past this.
        if len(self._connections) >= MAX_CONNECTIONS or peer_uid(connected) not in {0, os.getuid()}:
            connected.close()
            return
        connection = Connection(connected, self._loop, self)
        self._connections.add(connection)
        connection.send(self._hello)


def peer_uid(connected: socket.socket) -> int:
    """The user at the other end, as the kernel knows it."""
    packed = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(packed)[1]
    return uid

"""A client's connection to a VM process: requests, events, the console. Blocking; one thread at a time."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ostler.control.runtime import Entry
from ostler.control.wire import VERSION, Decoder, Message, WireError, encode, unpack_error
from ostler.errors import GuestNotFound, HostError

DEFAULT_TIMEOUT_S = 30.0
RECEIVE_BYTES = 64 << 10


class ConnectionLost(Exception):
    """The VM process closed the connection: as a rule, because the guest has ended."""


@dataclass(frozen=True, slots=True)
class Console:
    """An attached console; close the socket to leave it."""

    socket: socket.socket
    backlog: bytes
    """What was said before."""
    first: bytes
    """What was said since, as far as it has come; the rest is in the socket."""


class Connection:
    """Speaks the control protocol; a context manager."""

    def __init__(self, path: Path, *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> None:
        """Raises GuestNotFound where nobody listens, HostError for anything else than a VM process of this version."""
        self._decoder = Decoder()
        self._number = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(str(path))
            self.hello = self._receive()
            if self.hello.get("ostler-control") != VERSION:
                raise HostError(f"{path}: speaks control protocol {self.hello.get('ostler-control')!r}, not {VERSION}")
        except (FileNotFoundError, ConnectionError, ConnectionLost) as error:
            self._socket.close()
            raise GuestNotFound(f"guest {path.parent.name!r}: is not running") from error
        except OSError as error:
            self._socket.close()
            raise HostError(f"{path}: {error.strerror or error}") from error
        except BaseException:
            self._socket.close()
            raise

    @classmethod
    def to(cls, entry: Entry, *, timeout_s: float | None = DEFAULT_TIMEOUT_S) -> Self:
        """Connect to a guest."""
        return cls(entry.control_socket, timeout_s=timeout_s)

    def request(self, op: str, *, timeout_s: float | None = DEFAULT_TIMEOUT_S, **arguments: object) -> Message:
        """One request, its reply. None as time-out waits for as long as it takes.

        Raises what the VM process answered with, ConnectionLost where the guest ended first, TimeoutError.
        """
        return self.collect(self.post(op, **arguments), timeout_s=timeout_s)

    def post(self, op: str, **arguments: object) -> int:
        """Send a request whose reply is collected later. Raises ConnectionLost."""
        self._number += 1
        try:
            self._socket.sendall(encode({"id": self._number, "op": op, **arguments}))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionLost(str(error)) from error
        return self._number

    def collect(
        self, number: int, *, timeout_s: float | None = DEFAULT_TIMEOUT_S, on_event: Callable[[], None] | None = None
    ) -> Message:
        """The reply to that request; see `request`. Events that come before it are skipped, but for a call."""
        self._socket.settimeout(timeout_s)
        try:
            while (reply := self._receive()).get("id") != number:
                if on_event is not None and "event" in reply:
                    on_event()
        except ConnectionResetError as error:
            raise ConnectionLost(str(error)) from error
        if "error" in reply:
            raise unpack_error(reply["error"])
        result = reply.get("ok")
        return result if isinstance(result, dict) else {}

    def events(self, *, timeout_s: float | None = None) -> Iterator[Message]:
        """What happens to the guest, from now to its end. Raises TimeoutError when nothing does for so long."""
        self.request("events")
        return self._events(timeout_s)

    def messages(self) -> Iterator[Message]:
        """Whatever comes, replies too, until the connection ends."""
        return self._everything(None)

    def _events(self, timeout_s: float | None) -> Iterator[Message]:
        for message in self._everything(timeout_s):
            if "event" in message:
                yield message

    def _everything(self, timeout_s: float | None) -> Iterator[Message]:
        self._socket.settimeout(timeout_s)
        while True:
            try:
                yield self._receive()
            except (ConnectionLost, ConnectionResetError):
                return

    def console(self, *, backlog_bytes: int = 0) -> Console:
        """Turn the connection into the console's bytes, both ways. The caller owns the result from then on."""
        reply = self.request("console", backlog_bytes=backlog_bytes)
        waiting, backlog = int(reply["backlog_bytes"]), self._decoder.rest()
        while len(backlog) < waiting and (data := self._socket.recv(RECEIVE_BYTES)):
            backlog += data
        self._socket.settimeout(None)
        taken = self._socket.dup()
        self._socket.close()
        return Console(taken, backlog[:waiting], backlog[waiting:])

    def _receive(self) -> Message:
        try:
            while (message := self._decoder.next()) is None:
                data = self._socket.recv(RECEIVE_BYTES)
                if not data:
                    raise ConnectionLost("the VM process has gone")
                self._decoder.feed(data)
        except WireError as error:
            raise HostError(f"control socket: {error}") from error
        return message

    def interrupt(self) -> None:
        """End the waiting of another thread that uses this connection; it is of no use afterwards."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

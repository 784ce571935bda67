"""A console port on a UNIX socket: one program of the host at a time is the port's other end."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self

from ostler.backends.loop import Host
from ostler.errors import HostError


class Events(Protocol):
    """The port, as far as it is told things."""

    def opened(self, *, is_open: bool) -> None:
        """The peer came or went."""

    def readable(self) -> None:
        """There may be bytes to read."""

    def writable(self) -> None:
        """Bytes may be taken again."""


class PortSocket:
    """Listens on `path` and owns whoever is connected; a context manager. Others wait in the listener's queue."""

    def __init__(self, path: Path, host: Host) -> None:
        """Raises HostError when the socket cannot be made there."""
        self.path = path
        self._host = host
        self._events: Events | None = None
        self._peer: socket.socket | None = None
        self._reading = self._writing = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.setblocking(False)
            self._listener.bind(os.fspath(path))
            self._listener.listen(1)
        except OSError as error:
            self._listener.close()
            raise HostError(f"console port {path}: {error.strerror or error}") from error

    # -- asked by the port ------------------------------------------------------------------

    def bind(self, events: Events) -> None:
        self._events = events
        self._host.loop.add_reader(self._listener.fileno(), self._accept)

    def watch(self, *, read: bool, write: bool) -> None:
        if (read, write) != (self._reading, self._writing):
            self._reading, self._writing = read, write
            # A port is watched from processors' threads too.
            self._host.loop.call_soon(self._register)

    def read_into(self, views: Sequence[memoryview]) -> int:
        if self._peer is None:
            return 0
        try:
            count = self._peer.recvmsg_into(views)[0]
        except BlockingIOError:
            return 0
        except OSError:
            count = 0
        if not count:
            self._host.loop.call_soon(self._lost)
        return count

    def write(self, views: Sequence[memoryview]) -> int:
        if self._peer is None:
            return 0
        try:
            return self._peer.sendmsg(views[:1024], (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self._host.loop.call_soon(self._lost)
            return sum(map(len, views))

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._host.loop.call_soon(self._host.locked(callback))

    # -- the loop's events ------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            peer, _ = self._listener.accept()
            peer.setblocking(False)
            self._peer = peer
            self._host.loop.remove_reader(self._listener.fileno())
            self._tell(is_open=True)

    def _register(self) -> None:
        if self._peer is None or self._events is None:
            return
        loop, fd, events = self._host.loop, self._peer.fileno(), self._events
        if self._reading:
            loop.add_reader(fd, self._host.locked(events.readable))
        else:
            loop.remove_reader(fd)
        if self._writing:
            loop.add_writer(fd, self._host.locked(events.writable))
        else:
            loop.remove_writer(fd)

    def _lost(self) -> None:
        """The peer is gone; the next one may come."""
        if self._peer is not None:
            self._drop()
            self._tell(is_open=False)
            if self._listener.fileno() >= 0:
                self._host.loop.add_reader(self._listener.fileno(), self._accept)

    def _drop(self) -> None:
        if self._peer is not None:
            self._host.loop.remove_reader(self._peer.fileno())
            self._host.loop.remove_writer(self._peer.fileno())
            self._peer.close()
            self._peer = None
            self._reading = self._writing = False

    def _tell(self, *, is_open: bool) -> None:
        if self._events is not None:
            with self._host.lock:
                self._events.opened(is_open=is_open)

    def close(self) -> None:
        """Close everything and remove the path. Loop thread, or after the loop's end."""
        if self._listener.fileno() >= 0:
            self._host.loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._drop()
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

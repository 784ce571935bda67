"""A client's connected socket on the event loop: bytes in as they come, bytes out as the client takes them.

What waits to be sent is bounded: a client that lets more lie is as good as gone. Loop thread only.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from ostler.vmm.loop import EventLoop


class ClientStream:
    """`received` is given what comes in; `ended` is told when the client has gone or is too far behind."""

    def __init__(
        self,
        connected: socket.socket,
        loop: EventLoop,
        *,
        receive_bytes: int,
        max_unsent_bytes: int,
        received: Callable[[bytes], None],
        ended: Callable[[], None],
    ) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._loop = loop
        self._receive_bytes, self._max_unsent_bytes = receive_bytes, max_unsent_bytes
        self._received, self._ended = received, ended
        self._fd = connected.fileno()
        self.unsent = bytearray()
        self.is_open = True

    def read(self, *, wanted: bool = True) -> None:
        """Read from now on, or leave what comes in the socket."""
        if not self.is_open:
            return
        if wanted:
            self._loop.add_reader(self._fd, self._readable)
        else:
            self._loop.remove_reader(self._fd)

    def send(self, data: bytes) -> None:
        """Send now what goes without waiting, and the rest later."""
        if not self.is_open:
            return
        self.unsent += data
        if len(self.unsent) > self._max_unsent_bytes:
            self._ended()
        else:
            self._write()

    def let_go(self) -> socket.socket:
        """Watch it no more; the caller closes the socket, and sends `unsent` before if it wants to."""
        self.is_open = False
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        return self._socket

    def _write(self) -> None:
        try:
            while self.unsent:
                del self.unsent[: self._socket.send(self.unsent)]
        except BlockingIOError:
            self._loop.add_writer(self._fd, self._write)
            return
        except OSError:
            self.unsent.clear()
            self._ended()
            return
        self._loop.remove_writer(self._fd)

    def _readable(self) -> None:
        try:
            data = self._socket.recv(self._receive_bytes)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._received(data)
        else:
            self._ended()

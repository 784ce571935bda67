"""The console of a guest that runs by itself: a bounded log, and whoever is attached to it at the moment.

Nobody slows the guest down here. The log is rotated once, so that it stays bounded; an attached
client that does not read is cut off once `CLIENT_BYTES` wait for it. What clients type waits for the UART, up to a
bound, and beyond that in their sockets.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from ostler.control.logfile import RotatedLog
from ostler.devices.legacy.serial import Serial
from ostler.vmm.console import Gathered
from ostler.vmm.loop import EventLoop
from ostler.vmm.stream import ClientStream

CLIENT_BYTES = 8 << 20
TYPED_BYTES = 16 << 10
READ_BYTES = 4096


class HubConsole:
    """Implements `vmm.console.Console`. What is not said to run elsewhere runs on the loop's thread."""

    def __init__(self, log: RotatedLog, loop: EventLoop, lock: threading.Lock) -> None:
        self._log = log
        self._loop = loop
        self._lock = lock
        self._typed = bytearray()
        self._called = False
        self._serial: Serial | None = None
        self._clients: set[AttachedClient] = set()
        # Congested only while the loop's thread is held up; output is bounded all the same.
        self.output = Gathered(loop, lock, self.flush)
        self.put, self.release, self.tail = self.output.put, self.output.release, self.output.tail

    @property
    def first_byte_ns(self) -> int | None:
        return self.output.first_byte_ns

    def flush(self) -> None:
        """Give everything said so far to the log and to the clients."""
        data = self.output.taken(len(self.output.waiting))
        if not data:
            return
        self._log.write(data)
        for client in [*self._clients]:
            client.send(data)
        if self.output.congested:
            self.output.release()

    def finish(self) -> None:
        self.flush()
        for client in [*self._clients]:
            client.close()
        self._log.close()

    def connect(self, serial: Serial, on_quit: Callable[[], None]) -> None:  # noqa: ARG002 - nobody has keys here
        self._serial = serial

    def backlog(self, size_bytes: int) -> bytes:
        """The end of what has been said, up to now."""
        self.flush()
        return self._log.tail(size_bytes)

    def attach(self, connection: socket.socket, *, first: bytes, typed: bytes) -> None:
        """Take over a client's connection, right after its backlog was taken: from now on it is the console.

        `first` is what it gets before anything the guest says now.
        """
        client = AttachedClient(connection, self._loop, self)
        self._clients.add(client)
        client.send(first)
        if typed:
            self.type(typed)
        client.start()

    def detach(self, client: AttachedClient) -> None:
        """Forget a client that has gone."""
        self._clients.discard(client)

    @property
    def takes_input(self) -> bool:
        """Whether clients may read more of what is typed."""
        return len(self._typed) < TYPED_BYTES

    def type(self, data: bytes) -> None:
        """Bytes for the guest."""
        self._typed += data
        self._deliver()

    def on_room(self) -> None:
        """In a processor's thread, under the lock."""
        if self._typed and not self._called:
            self._called = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        if self._serial is None:
            return
        with self._lock:
            self._called = False
            taken = self._serial.receive(bytes(self._typed))
        del self._typed[:taken]
        if self.takes_input:
            for client in [*self._clients]:
                client.start()


class AttachedClient:
    """One connection that is a console. One that does not read is cut off once `CLIENT_BYTES` wait for it."""

    def __init__(self, connection: socket.socket, loop: EventLoop, hub: HubConsole) -> None:
        self._hub = hub
        self._stream = ClientStream(
            connection, loop, receive_bytes=READ_BYTES, max_unsent_bytes=CLIENT_BYTES,
            received=self._typed, ended=self.close,
        )  # fmt: skip
        self.send = self._stream.send

    def start(self) -> None:
        """Read what is typed."""
        self._stream.read()

    def close(self) -> None:
        """Send what still goes, and end."""
        if not self._stream.is_open:
            return
        connection = self._stream.let_go()
        self._hub.detach(self)
        with contextlib.suppress(OSError):
            if self._stream.unsent:
                connection.send(self._stream.unsent)
        connection.close()

    def _typed(self, data: bytes) -> None:
        self._hub.type(data)
        self._stream.read(wanted=self._hub.takes_input)

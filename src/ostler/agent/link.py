"""One connection to an agent over a socket: bytes between the kernel and the conversation, with time limits.

Threads: one thread waits (`step`); `send` may be called from any, and from a signal handler.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ostler.agent.protocol import VSOCK_PORT, Conversation, Event, Failed, Hello, Phase, Reply
from ostler.errors import AgentLost, AgentProtocolError, AgentRefused, AgentUnavailable, GuestNotBooted, OstlerError

CHUNK = 256 * 1024
ANSWER_BYTES = 64
"""The longest line with which the vsock's host side may answer CONNECT."""

Opener = Callable[[float], socket.socket]
"""Returns a connected stream socket within so many seconds, or raises OSError."""


def vsock(path: Path, port: int = VSOCK_PORT) -> Opener:
    """Return what opens a connection to a port of the guest through the UNIX socket of its virtio-vsock device."""

    def open_(timeout_s: float) -> socket.socket:
        sock = unix(path)(timeout_s)
        try:
            sock.sendall(f"CONNECT {port}\n".encode())
            answer = _line(sock)
            if not answer.startswith(b"OK "):
                raise ConnectionRefusedError(f"port {port} of the guest: {answer.decode(errors='replace')!r}")
        except BaseException:
            sock.close()
            raise
        return sock

    return open_


def unix(path: Path) -> Opener:
    """Return what opens a connection to an agent that listens on a UNIX socket."""

    def open_(timeout_s: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(str(path))
        except BaseException:
            sock.close()
            raise
        return sock

    return open_


def _line(sock: socket.socket) -> bytes:
    """Read a line byte by byte: what follows belongs to the agent."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte or len(line) >= ANSWER_BYTES:
            raise ConnectionResetError("the guest does not listen")
        line += byte
    return bytes(line[:-1])


class Link:
    """A conversation over a socket that it owns."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self.conversation = Conversation()
        self._unsent = bytearray()
        self._lock = threading.RLock()
        self._poll = select.poll()
        self._ready: list[Event] = []
        self.hello: Hello | None = None

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def unsent_bytes(self) -> int:
        return len(self._unsent)

    def greet(self, timeout_s: float) -> Hello:
        """Exchange greetings. Raises AgentUnavailable, AgentLost, AgentProtocolError, AgentRefused, GuestNotBooted."""
        self.send(self.conversation.hello())
        for event in self._until(lambda event: isinstance(event, Hello | Failed), timeout_s):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Hello):
                self.hello = event
                if event.trouble is not None:
                    raise GuestNotBooted(f"guest: {event.trouble}")
        if self.hello is None:
            raise AgentProtocolError("agent did not greet")
        return self.hello

    def call(self, operation: str, arguments: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Ask and wait for the answer."""
        self.send(self.conversation.request(operation, arguments))
        return self.answer(timeout_s)

    def call_all(self, wanted: Sequence[tuple[str, Mapping[str, Any]]], timeout_s: float) -> list[dict[str, Any]]:
        """Ask for several things at once and wait for all answers. Raises the first refusal, after the last of them."""
        self.send(self.conversation.requests(wanted))
        found: list[dict[str, Any]] = []
        refused: OstlerError | None = None
        for _ in wanted:
            try:
                found.append(self.answer(timeout_s))
            except AgentRefused as error:
                refused = refused or error
        if refused is not None:
            raise refused
        return found

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the end of a request that was sent."""
        for event in self._until(lambda event: isinstance(event, Reply | Failed), timeout_s):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Reply):
                return event.value
        raise AgentProtocolError("agent did not answer")

    def _until(self, is_last: Callable[[Event], bool], timeout_s: float) -> list[Event]:
        deadline = time.monotonic() + timeout_s
        seen: list[Event] = []
        while not seen or not is_last(seen[-1]):
            events = self.step(deadline)
            if not events and time.monotonic() >= deadline:
                raise AgentUnavailable(f"agent: no answer within {timeout_s:g} s")
            for at, event in enumerate(events):
                seen.append(event)
                if is_last(event):
                    self._ready = events[at + 1 :] + self._ready
                    break
        return seen

    def send(self, data: bytes) -> None:
        """Send now what goes without waiting; `step` sends the rest. Raises AgentLost."""
        with self._lock:
            self._unsent += data
            self._flush()

    def step(self, deadline: float | None, *, extra: int | None = None) -> list[Event]:
        """Wait until something arrives or could be sent; return what arrived, nothing at the deadline.

        `extra` is another descriptor whose being readable ends the wait.

        Raises:
            AgentLost: the connection ended.
            AgentProtocolError: the agent sent what it must not.
        """
        if self._ready:
            ready, self._ready = self._ready, []
            return ready
        poll = self._poll
        poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if extra is not None:
            poll.register(extra, select.POLLIN)
        try:
            left_ms = None if deadline is None else max(0, deadline - time.monotonic()) * 1000 + 1
            found = dict(poll.poll(left_ms))
        finally:
            if extra is not None:
                poll.unregister(extra)
        flags = found.get(self._sock.fileno(), 0)
        with self._lock:
            if flags & select.POLLOUT:
                self._flush()
        return self._receive() if flags & ~select.POLLOUT else []

    def _receive(self) -> list[Event]:
        try:
            data = self._sock.recv(CHUNK)
        except BlockingIOError:
            return []
        except OSError as error:
            raise AgentLost(f"agent: connection lost ({error.strerror})") from error
        if not data:
            raise AgentLost("agent: the guest ended the connection")
        return list(self.conversation.receive(data))

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._sock.send(self._unsent)
            except BlockingIOError:
                return
            except OSError as error:
                raise AgentLost(f"agent: connection lost ({error.strerror})") from error
            del self._unsent[:sent]

    def is_reusable(self) -> bool:
        """Whether the last operation ended in order and the guest still holds its end."""
        if self._sock.fileno() < 0 or self._ready or self._unsent or self.conversation.phase is not Phase.IDLE:
            return False
        self._poll.register(self._sock, select.POLLIN)
        return not self._poll.poll(0)  # between requests a guest has nothing to say: whatever this is, it is no good

    def close(self) -> None:
        self._sock.close()

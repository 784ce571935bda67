"""A command that runs in a guest, seen from the host.

The streams work as a local process's do: what the command writes waits in the guest until somebody reads it, up to
256 KiB for each stream here, so reading only one of two full streams stalls the command, as with pipes.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from ostler.agent import requests, wire
from ostler.agent.link import Link
from ostler.agent.protocol import Data, Event, Exited, Failed, Reply
from ostler.agent.wire import STDERR, STDOUT
from ostler.errors import AgentError, AgentProtocolError, AgentUnavailable

MIB = 1 << 20
CAPTURE_BYTES = 256 * MIB
"""More output of a captured stream than this ends the command."""
CHUNK = 64 * 1024


class Sink(Protocol):
    """Receives output as it comes."""

    def __call__(self, stream: int, data: bytes) -> None: ...


class State:
    """A command as its agent has told it: what it said and nobody has read yet, and its end. Without I/O."""

    def __init__(self, argv: Sequence[requests.Argument]) -> None:
        self.argv = tuple(os.fsdecode(word) for word in argv)
        self.buffers: dict[int, deque[bytes]] = {STDOUT: deque(), STDERR: deque()}
        self.finished: set[int] = set()
        """Streams on which nothing more comes."""
        self.end: Exited | None = None

    @property
    def returncode(self) -> int | None:
        return None if self.end is None else requests.returncode(self.end)

    @property
    def timed_out(self) -> bool:
        return self.end is not None and self.end.timed_out

    def take(self, event: Event) -> None:
        """Take over what the agent says. Raises the error it reports; AgentProtocolError."""
        if isinstance(event, Data):
            self.buffers[event.stream].append(event.data) if event.data else self.finished.add(event.stream)
        elif isinstance(event, Exited):
            self.end = event
            self.finished |= {STDOUT, STDERR}
        elif isinstance(event, Failed):
            raise event.error
        elif isinstance(event, Reply):
            raise AgentProtocolError("agent answered a command twice")

    def read(self, stream: int, size_bytes: int = CAPTURE_BYTES) -> bytes:
        """Return up to `size_bytes` of what waits in a stream."""
        buffer = self.buffers[stream]
        if not buffer:
            return b""
        data = buffer.popleft()
        if len(data) > size_bytes:
            buffer.appendleft(data[size_bytes:])
            data = data[:size_bytes]
        return data

    def has_news(self, stream: int) -> bool:
        """Whether there is something to read, or nothing more to wait for."""
        return bool(self.buffers[stream]) or stream in self.finished


def pid_of(answer: Mapping[str, Any]) -> int:
    """Return the process's number from the agent's answer to its start. Raises AgentProtocolError."""
    pid = answer.get("pid")
    if not isinstance(pid, int):
        raise AgentProtocolError(f"agent sent process {pid!r}: expected a number")
    return pid


class Process:
    """A running command; leaving the `with` block ends it."""

    def __init__(
        self,
        link: Link,
        argv: Sequence[requests.Argument],
        *,
        start_timeout_s: float,
        release: Callable[[Link], None] = Link.close,
    ) -> None:
        self._link = link
        self._release: Callable[[Link], None] | None = release
        self._state = State(argv)
        self.argv = self._state.argv
        self.pid = pid_of(link.answer(start_timeout_s))
        self.stdin = Input(self, link)
        self.stdout = Output(self, STDOUT)
        self.stderr = Output(self, STDERR)

    @property
    def timed_out(self) -> bool:
        """Whether the agent killed it because its time was over."""
        return self._state.timed_out

    @property
    def returncode(self) -> int | None:
        """As in subprocess: None while it runs, negative for a signal."""
        return self._state.returncode

    def send_signal(self, number: int) -> None:
        """Signal the command's process group (on a terminal: the one in the foreground)."""
        if self.returncode is None:
            self._link.send(wire.signal(number))

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its size."""
        if self.returncode is None:
            self._link.send(wire.resize(rows, columns))

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the end and return the status. Output that does not fit its window stalls the command: read it.

        Raises:
            AgentUnavailable: it has not ended within `timeout_s`; it goes on.
            AgentLost: the guest or its agent is gone.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (status := self.returncode) is None:
            self._step(deadline)
        return status

    def communicate(
        self, input: bytes = b"", *, limit_bytes: int = CAPTURE_BYTES  # noqa: A002 - subprocess's name
    ) -> tuple[bytes, bytes]:  # fmt: skip
        """Send `input`, collect everything, wait for the end. Raises AgentError beyond `limit_bytes` per stream."""
        found = {STDOUT: bytearray(), STDERR: bytearray()}

        def collect(stream: int, data: bytes) -> None:
            if len(found[stream]) + len(data) > limit_bytes:
                raise AgentError(f"{self.argv[0]}: more than {limit_bytes} bytes of output")
            found[stream] += data

        self.exchange(input, collect)
        return bytes(found[STDOUT]), bytes(found[STDERR])

    def exchange(self, input: bytes, sink: Sink) -> None:  # noqa: A002 - subprocess's name
        """Send `input`, hand everything to `sink` as it comes, wait for the end."""
        rest = memoryview(input)
        while self.returncode is None:
            rest = rest[self._offer(rest) :]
            if not rest:
                self.stdin.close()
            self._drain(sink)
            if self.returncode is None:
                self._step(None)
        self._drain(sink)

    def relay(self, stdin: int | None, stdout: int, stderr: int) -> int:
        """Connect the command with descriptors of the host's until its end; return its status.

        A `stdin` of None is empty. Writing blocks, so a slow reader slows the command. Raises BrokenPipeError where a
        reader is gone.
        """
        targets = {STDOUT: stdout, STDERR: stderr}

        def write(stream: int, data: bytes) -> None:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(targets[stream], rest) :]

        if stdin is None:
            self.stdin.close()
        while (status := self.returncode) is None:
            can_take = stdin if not self.stdin.closed and self._link.conversation.stdin_room else None
            self._step(None, extra=can_take)
            if can_take is not None and _is_readable(can_take):
                data = os.read(can_take, min(CHUNK, self._link.conversation.stdin_room))
                self.stdin.write(data) if data else self.stdin.close()
            self._drain(write)
        self._drain(write)
        return status

    def close(self) -> None:
        """Let go of it: a command that still runs is ended by the agent (SIGHUP, a second later SIGKILL)."""
        release, self._release = self._release, None
        if release is not None:
            release(self._link)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _offer(self, data: memoryview) -> int:
        """Send what there is room for; return how many bytes that was."""
        if not data or self.returncode is not None or self.stdin.closed or self._link.unsent_bytes > CHUNK:
            return 0 if not self.stdin.closed else len(data)
        size = min(len(data), self._link.conversation.stdin_room)
        if size:
            self._link.send(self._link.conversation.stdin(bytes(data[:size])))
        return size

    def _drain(self, sink: Sink) -> None:
        """Hand over what has arrived, and give the guest room for more."""
        for stream in (STDOUT, STDERR):
            while data := self._state.read(stream):
                sink(stream, data)
                self._consumed(stream, len(data))

    def _consumed(self, stream: int, size_bytes: int) -> None:
        if self.returncode is None and (frame := self._link.conversation.make_room(stream, size_bytes)):
            self._link.send(frame)

    def _step(self, deadline: float | None, *, extra: int | None = None) -> None:
        events = self._link.step(deadline, extra=extra)
        if not events and deadline is not None and time.monotonic() >= deadline:
            raise AgentUnavailable(f"{self.argv[0]}: still running")
        for event in events:
            self._state.take(event)


class Input:
    """Standard input of a command in a guest."""

    def __init__(self, process: Process, link: Link) -> None:
        self._process = process
        self._link = link
        self.closed = False

    def write(self, data: bytes) -> None:
        """Send everything, waiting while the command does not take it. Raises BrokenPipeError after its end."""
        if self.closed:
            raise ValueError("standard input is closed")
        rest = memoryview(data)
        while rest:
            if self._process.returncode is not None:
                raise BrokenPipeError(f"{self._process.argv[0]} has ended")
            sent = self._process._offer(rest)
            rest = rest[sent:]
            if not sent:
                self._process._step(None)

    def close(self) -> None:
        """End it."""
        if not self.closed and self._process.returncode is None:
            self._link.send(self._link.conversation.stdin(b""))
        self.closed = True


class Output:
    """Standard output or standard error of a command in a guest."""

    def __init__(self, process: Process, stream: int) -> None:
        self._process = process
        self._stream = stream

    def read(self, size_bytes: int = -1, *, timeout_s: float | None = None) -> bytes:
        """Return up to `size_bytes` as soon as there are any, nothing at the end; by default everything to the end.

        Raises AgentUnavailable where nothing came within `timeout_s`.
        """
        if size_bytes < 0:
            return b"".join(iter(lambda: self.read(CHUNK, timeout_s=timeout_s), b""))
        process, state = self._process, self._process._state
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not state.has_news(self._stream):
            process._step(deadline)
        if data := state.read(self._stream, size_bytes):
            process._consumed(self._stream, len(data))
        return data


def _is_readable(fd: int) -> bool:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))

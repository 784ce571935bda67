"""A command that runs in a guest, for asyncio: the twin of `process.py`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self

from ostler.agent import wire
from ostler.agent.aio_link import AsyncLink
from ostler.agent.process import CAPTURE_BYTES, State
from ostler.agent.requests import Argument
from ostler.agent.wire import STDERR, STDOUT
from ostler.errors import AgentError


class AsyncProcess:
    """A running command; leaving the `async with` block ends it."""

    def __init__(self, link: AsyncLink, argv: Sequence[Argument], pid: int) -> None:
        self._link = link
        self._state = State(argv)
        self.argv = self._state.argv
        self.pid = pid
        self._error: Exception | None = None
        self._stdin_closed = False
        self._changed = asyncio.Condition()
        self._pump = asyncio.create_task(self._receive())

    @property
    def returncode(self) -> int | None:
        """As in subprocess: None while it runs, negative for a signal."""
        return self._state.returncode

    @property
    def timed_out(self) -> bool:
        """Whether the agent killed it because its time was over."""
        return self._state.timed_out

    async def wait(self) -> int:
        """Wait for the end and return the status. Output that does not fit its window stalls the command: read it."""
        await self._until(lambda: self.returncode is not None)
        assert self.returncode is not None
        return self.returncode

    async def read(self, stream: int = STDOUT) -> bytes:
        """Return what has come on a stream, as soon as there is something; nothing at its end."""
        await self._until(lambda: self._state.has_news(stream))
        data = self._state.read(stream)
        if data and self.returncode is None and (frame := self._link.conversation.make_room(stream, len(data))):
            await self._link.send(frame)
        return data

    async def lines(self, stream: int = STDOUT) -> AsyncIterator[bytes]:
        """Yield lines as they come, each with its end; a line longer than 1 MiB comes in pieces."""
        rest = b""
        while data := await self.read(stream):
            *whole, rest = (rest + data).splitlines(keepends=True)
            if rest.endswith(b"\n") or len(rest) > 1 << 20:
                whole, rest = [*whole, rest], b""
            for line in whole:
                yield line
        if rest:
            yield rest

    async def write(self, data: bytes) -> None:
        """Send to standard input, waiting while the command does not take it. Raises BrokenPipeError after its end."""
        conversation, rest = self._link.conversation, memoryview(data)
        while rest:
            await self._until(lambda: conversation.stdin_room > 0 or self.returncode is not None)
            if self.returncode is not None:
                raise BrokenPipeError(f"{self.argv[0]} has ended")
            size = min(len(rest), conversation.stdin_room)
            await self._link.send(conversation.stdin(bytes(rest[:size])))
            rest = rest[size:]

    async def close_stdin(self) -> None:
        """End standard input."""
        if not self._stdin_closed and self.returncode is None:
            self._stdin_closed = True
            await self._link.send(self._link.conversation.stdin(b""))

    async def send_signal(self, number: int) -> None:
        """Signal the command's process group (on a terminal: the one in the foreground)."""
        if self.returncode is None:
            await self._link.send(wire.signal(number))

    async def terminate(self) -> None:
        """Send SIGTERM."""
        await self.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        """Send SIGKILL."""
        await self.send_signal(signal.SIGKILL)

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its size."""
        if self.returncode is None:
            await self._link.send(wire.resize(rows, columns))

    async def communicate(self, data: bytes = b"", *, limit_bytes: int = CAPTURE_BYTES) -> tuple[bytes, bytes]:
        """Send `data`, collect everything, wait for the end. Raises AgentError beyond `limit_bytes` per stream."""

        async def feed() -> None:
            with contextlib.suppress(BrokenPipeError):
                await self.write(data)
            await self.close_stdin()

        async def collect(stream: int) -> bytes:
            found = bytearray()
            while piece := await self.read(stream):
                if len(found) + len(piece) > limit_bytes:
                    raise AgentError(f"{self.argv[0]}: more than {limit_bytes} bytes of output")
                found += piece
            return bytes(found)

        tasks = [asyncio.ensure_future(work) for work in (collect(STDOUT), collect(STDERR))]
        feeding = asyncio.ensure_future(feed())
        try:
            stdout, stderr = await asyncio.gather(*tasks)
            await feeding
        finally:
            for task in (*tasks, feeding):
                task.cancel()
            await asyncio.gather(*tasks, feeding, return_exceptions=True)
        await self.wait()
        return stdout, stderr

    async def close(self) -> None:
        """Let go of it: a command that still runs is ended by the agent."""
        self._pump.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._pump
        await self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _until(self, is_so: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: is_so() or self._error is not None)
        if not is_so() and self._error is not None:
            raise self._error

    async def _receive(self) -> None:
        """Take events until the end; what waits in the buffers is bounded by the windows."""
        while self.returncode is None and self._error is None:
            try:
                self._state.take(await self._link.event(limited=False))
            except AgentError as error:
                self._error = error
            async with self._changed:
                self._changed.notify_all()

"""One connection to an agent for asyncio: the twin of `link.py`. Threads: the event loop's alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ostler.agent.link import ANSWER_BYTES, CHUNK
from ostler.agent.protocol import Conversation, Event, Failed, Hello, Reply
from ostler.errors import AgentLost, AgentProtocolError, AgentUnavailable, GuestNotBooted


class AsyncLink:
    """A conversation over a stream that it owns."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout_s: float) -> None:
        self._reader, self._writer = reader, writer
        self._timeout_s = timeout_s
        self._ready: deque[Event] = deque()
        self.conversation = Conversation()

    async def send(self, data: bytes) -> None:
        """Send, and wait while too much is unsent. Raises AgentLost."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise AgentLost(f"agent: connection lost ({error.strerror})") from error

    async def event(self, *, limited: bool = True) -> Event:
        """Return the next event, within the answer's time if `limited`. Raises AgentLost, AgentProtocolError."""
        while not self._ready:
            try:
                async with asyncio.timeout(self._timeout_s if limited else None):
                    data = await self._reader.read(CHUNK)
            except TimeoutError as error:
                raise AgentUnavailable(f"agent: no answer within {self._timeout_s:g} s") from error
            except OSError as error:
                raise AgentLost(f"agent: connection lost ({error.strerror})") from error
            if not data:
                raise AgentLost("agent: the guest ended the connection")
            self._ready.extend(self.conversation.receive(data))
        return self._ready.popleft()

    def has_event(self) -> bool:
        """Whether one is there without waiting."""
        return bool(self._ready)

    async def greet(self) -> Hello:
        await self.send(self.conversation.hello())
        event = await self.event()
        if isinstance(event, Failed):
            raise event.error
        if not isinstance(event, Hello):
            raise AgentProtocolError("agent did not greet")
        if event.trouble is not None:
            raise GuestNotBooted(f"guest: {event.trouble}")
        return event

    async def call(self, operation: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Ask and wait for the answer."""
        await self.send(self.conversation.request(operation, arguments))
        return await self.answer()

    async def answer(self) -> dict[str, Any]:
        """Wait for the end of a request that was sent."""
        event = await self.event()
        if isinstance(event, Failed):
            raise event.error
        if not isinstance(event, Reply):
            raise AgentProtocolError("agent did not answer")
        return event.value

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


async def connect(path: Path, port: int | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a stream to a port of the guest, by the UNIX socket of its vsock device; None for the socket itself.

    Raises OSError.
    """
    reader, writer = await asyncio.open_unix_connection(path, limit=CHUNK)
    try:
        if port is not None:
            await _ask_for_port(reader, writer, port)
    except BaseException:
        writer.close()
        raise
    return reader, writer


async def _ask_for_port(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    writer.write(f"CONNECT {port}\n".encode())
    answer = bytearray()
    while not answer.endswith(b"\n"):
        byte = await reader.read(1)
        if not byte or len(answer) >= ANSWER_BYTES:
            raise ConnectionResetError("the guest does not listen")
        answer += byte
    if not answer.startswith(b"OK "):
        raise ConnectionRefusedError(f"port {port} of the guest: {bytes(answer)!r}")

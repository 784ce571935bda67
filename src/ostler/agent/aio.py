"""The asyncio twin of `client.py` and `process.py`: the same operations on the same conversation, awaited.

A cancelled operation closes its connection, which ends a command that was running. Files of the host's are read and
written in a thread, a piece at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Self

from ostler.agent import protocol, requests, tree
from ostler.agent.client import ANSWER_S, ATTEMPT_S, ENTROPY_BYTES, FIRST_PAUSE_S, LONGEST_PAUSE_S
from ostler.agent.link import ANSWER_BYTES, CHUNK
from ostler.agent.process import CAPTURE_BYTES, State, pid_of
from ostler.agent.protocol import (
    STDERR,
    STDOUT,
    VSOCK_PORT,
    Conversation,
    Data,
    Entry,
    Event,
    Failed,
    Hello,
    Reply,
)
from ostler.agent.requests import Argument, Completed, Copied, Grown, Info, Terminal
from ostler.errors import (
    AgentError,
    AgentLost,
    AgentProtocolError,
    AgentUnavailable,
    BadRequest,
    GuestNotBooted,
)

_NOT_THERE_YET = (FileNotFoundError, ConnectionError, TimeoutError, BlockingIOError)


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
            await self._link.send(protocol.signal(number))

    async def terminate(self) -> None:
        """Send SIGTERM."""
        await self.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        """Send SIGKILL."""
        await self.send_signal(signal.SIGKILL)

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its size."""
        if self.returncode is None:
            await self._link.send(protocol.resize(rows, columns))

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


class AsyncAgentClient:
    """A guest's agent; an asynchronous context manager."""

    def __init__(self, path: Path, *, port: int | None = VSOCK_PORT, answer_timeout_s: float = ANSWER_S) -> None:
        self._path, self._port = path, port
        self._timeout_s = answer_timeout_s
        self._freezing: AsyncLink | None = None
        self.hello: Hello | None = None

    @classmethod
    async def connect(
        cls,
        vsock_path: str | os.PathLike[str],
        *,
        timeout_s: float = ANSWER_S,
        alive: Callable[[], bool] | None = None,
    ) -> Self:
        """Wait until the agent behind a guest's `vsock.sock` answers; as `AgentClient.connect`."""
        client = cls(Path(vsock_path))
        await client.wait(timeout_s, alive=alive)
        return client

    @classmethod
    async def connect_unix(cls, path: str | os.PathLike[str], *, timeout_s: float = ANSWER_S) -> Self:
        """The same for an agent that listens on a UNIX socket."""
        client = cls(Path(path), port=None)
        await client.wait(timeout_s)
        return client

    async def wait(self, timeout_s: float, *, alive: Callable[[], bool] | None = None) -> Hello:
        """Wait until the agent answers."""
        deadline = time.monotonic() + timeout_s
        pause_s = FIRST_PAUSE_S
        while True:
            left_s = deadline - time.monotonic()
            try:
                found = await self._open(min(max(left_s, 0.1), ATTEMPT_S))
            except (*_NOT_THERE_YET, AgentLost, AgentUnavailable) as error:
                if alive is not None and not alive():
                    raise AgentUnavailable("agent: the guest ended before its agent answered") from error
                if time.monotonic() + pause_s >= deadline:
                    raise AgentUnavailable(f"agent: no answer from the guest within {timeout_s:g} s") from error
            else:
                await found.close()
                assert self.hello is not None
                return self.hello
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, LONGEST_PAUSE_S)

    async def _open(self, timeout_s: float) -> AsyncLink:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(self._path, limit=CHUNK)
            found = AsyncLink(reader, writer, self._timeout_s)
            try:
                if self._port is not None:
                    await _ask_for_port(reader, writer, self._port)
                self.hello = await found.greet()
            except BaseException:
                await found.close()
                raise
        return found

    async def _reach(self) -> AsyncLink:
        try:
            return await self._open(self._timeout_s)
        except _NOT_THERE_YET as error:
            raise AgentLost(f"agent: not reachable any more ({error})") from error

    @contextlib.asynccontextmanager
    async def _link(self) -> AsyncIterator[AsyncLink]:
        found = await self._reach()
        try:
            yield found
        finally:
            await found.close()

    async def _call(self, operation: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        async with self._link() as connection:
            return await connection.call(operation, arguments or {})

    # Commands

    async def start(
        self,
        argv: Sequence[Argument],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Argument | None = None,
        user: str | None = None,
        tty: Terminal | None = None,
        timeout_s: float | None = None,
    ) -> AsyncProcess:
        """Start a command; as `AgentClient.start`."""
        wish = requests.command(argv, stdin=True, env=env, cwd=cwd, user=user, tty=tty, timeout_s=timeout_s)
        connection = await self._reach()
        try:
            pid = pid_of(await connection.call("exec", wish))
        except BaseException:
            await connection.close()
            raise
        return AsyncProcess(connection, argv, pid)

    async def run(
        self,
        argv: Sequence[Argument],
        *,
        input: bytes | None = None,  # noqa: A002 - subprocess's name
        env: Mapping[str, str] | None = None,
        cwd: Argument | None = None,
        user: str | None = None,
        timeout_s: float | None = None,
        limit_bytes: int = CAPTURE_BYTES,
    ) -> Completed:
        """Run a command to its end; as `AgentClient.run`."""
        async with await self.start(argv, env=env, cwd=cwd, user=user, timeout_s=timeout_s) as process:
            stdout, stderr = await process.communicate(input or b"", limit_bytes=limit_bytes)
            if process.timed_out:
                raise requests.timed_out(argv, timeout_s, stdout, stderr)
            return Completed(process.argv, await process.wait(), stdout, stderr)

    # Files

    async def put(self, source: str | os.PathLike[str], target: str, *, owner: str | None = None) -> Copied:
        """Copy a file or a folder of the host's into the guest; as `AgentClient.put`."""
        path = Path(source)
        wish = {"path": requests.plain("path", target), "name": path.resolve().name}
        return await self._put({**wish, **({"owner": owner} if owner else {})}, tree.frames(path))

    async def put_bytes(self, content: bytes, target: str, *, mode: int = 0o644, owner: str | None = None) -> Copied:
        """Write a file in the guest."""
        wish = {"path": requests.plain("path", target), **({"owner": owner} if owner else {})}
        return await self._put(wish, tree.file_frames(content, mode))

    async def _put(self, wish: dict[str, Any], frames: Iterator[bytes]) -> Copied:
        async with self._link() as connection:
            await connection.send(connection.conversation.request("put", wish))
            # Beside the sending, so that a guest that gives up early is heard.
            answer = asyncio.ensure_future(connection.event(limited=False))
            try:
                while not answer.done() and (frame := await asyncio.to_thread(next, frames, None)) is not None:
                    await connection.send(frame)
                event = await asyncio.wait_for(answer, self._timeout_s)
            except TimeoutError as error:
                raise AgentUnavailable(f"agent: no answer within {self._timeout_s:g} s") from error
            finally:
                answer.cancel()
                await asyncio.gather(answer, return_exceptions=True)
            if isinstance(event, Failed):
                raise event.error
            if not isinstance(event, Reply):
                raise AgentProtocolError("agent did not answer")
            return requests.parse(Copied, event.value)

    async def get(
        self, source: str, target: str | os.PathLike[str], *, limits: tree.Limits | None = None
    ) -> Copied:  # fmt: skip
        """Copy a file or a folder of the guest's to the host; as `AgentClient.get`."""
        name = PurePosixPath(source).name
        with tree.Unpacker(Path(target), name if name not in {"", ".."} else "root", limits) as unpacker:
            return await self._get(source, unpacker)

    async def get_bytes(self, source: str, *, limit_bytes: int = CAPTURE_BYTES) -> bytes:
        """Return the content of a file of the guest's."""
        collector = tree.Collector(source, limit_bytes)
        await self._get(source, collector)
        return bytes(collector.content)

    async def _get(self, source: str, taker: tree.Taker) -> Copied:
        async with self._link() as connection:
            await connection.send(connection.conversation.request("get", {"path": requests.plain("path", source)}))
            while True:
                events = [await connection.event()]
                while connection.has_event():
                    events.append(await connection.event())
                await asyncio.to_thread(_take_all, taker, events)
                last = events[-1]
                if isinstance(last, Failed):
                    raise last.error
                if isinstance(last, Reply):
                    return requests.parse(Copied, last.value)

    # The guest as a whole

    async def info(self) -> Info:
        """Return what the guest is and how it does."""
        return requests.parse(Info, await self._call("info"))

    async def configure(self, **parts: Any) -> None:
        """Set hostname, interfaces, routes, dns, search, ssh_keys, mounts; see `requests.configuration`."""
        await self._call("configure", requests.configuration(**parts))

    async def shutdown(self, *, reboot: bool = False, grace_s: float = 5.0) -> None:
        """Ask the guest to power off; returns when it has begun to."""
        mode = "reboot" if reboot else "power-off"
        await self._call("shutdown", {"mode": mode, "grace_ms": round(grace_s * 1000)})

    async def set_time(self, unix_ns: int | None = None) -> None:
        """Set the guest's clock, to the host's if nothing else is said."""
        await self._call("set-time", {"unix_ns": time.time_ns() if unix_ns is None else unix_ns})

    async def add_entropy(self) -> None:
        """Seed the guest's random numbers from the host's."""
        await self._call("entropy", {"hex": secrets.token_hex(ENTROPY_BYTES)})

    async def grow_root(self) -> Grown:
        """Make the guest's root file system as large as its disk."""
        return requests.parse(Grown, await self._call("grow-root"))

    async def freeze(self, *, limit_s: float = 30.0) -> None:
        """Freeze the guest's file systems until `thaw`, or until `limit_s` or this client's end."""
        if self._freezing is not None:
            raise BadRequest("freeze: the guest is frozen already")
        connection = await self._reach()
        try:
            await connection.call("freeze", {"limit_ms": round(limit_s * 1000)})
        except BaseException:
            await connection.close()
            raise
        self._freezing = connection

    async def thaw(self) -> None:
        """Let them go on. Without a freeze by this client, whatever is frozen."""
        connection, self._freezing = self._freezing, None
        if connection is None:
            await self._call("thaw")
            return
        try:
            with contextlib.suppress(AgentLost):
                await connection.call("thaw", {})
        finally:
            await connection.close()

    async def close(self) -> None:
        """Let go of a freeze."""
        connection, self._freezing = self._freezing, None
        if connection is not None:
            await connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


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


def _take_all(taker: tree.Taker, events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event, Entry):
            taker.entry(event.value)
        elif isinstance(event, Data):
            taker.data(event.data)
        elif isinstance(event, Reply):
            taker.finish()

"""The asyncio twin of `client.py`: the same operations on the same conversation, awaited.

A cancelled operation closes its connection, which ends a command that was running. Files of the host's are read and
written in a thread, a piece at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from ostler.agent import copy_in, copy_out, requests
from ostler.agent.aio_link import AsyncLink, connect
from ostler.agent.aio_process import AsyncProcess
from ostler.agent.client import ANSWER_S, ATTEMPT_S, ENTROPY_BYTES, FIRST_PAUSE_S, LONGEST_PAUSE_S
from ostler.agent.connections import NOT_THERE_YET
from ostler.agent.process import CAPTURE_BYTES, pid_of
from ostler.agent.protocol import VSOCK_PORT, Data, Entry, Event, Failed, Hello, Reply
from ostler.agent.requests import Argument, Completed, Terminal
from ostler.errors import AgentLost, AgentProtocolError, AgentUnavailable, BadRequest

if TYPE_CHECKING:
    from ostler.agent.answers import Copied, Grown, Info


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
            except (*NOT_THERE_YET, AgentLost, AgentUnavailable) as error:
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
            found = AsyncLink(*await connect(self._path, self._port), self._timeout_s)
            try:
                self.hello = await found.greet()
            except BaseException:
                await found.close()
                raise
        return found

    async def _reach(self) -> AsyncLink:
        try:
            return await self._open(self._timeout_s)
        except NOT_THERE_YET as error:
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
        return await self._put({**wish, **({"owner": owner} if owner else {})}, copy_in.frames(path))

    async def put_bytes(self, content: bytes, target: str, *, mode: int = 0o644, owner: str | None = None) -> Copied:
        """Write a file in the guest."""
        wish = {"path": requests.plain("path", target), **({"owner": owner} if owner else {})}
        return await self._put(wish, copy_in.file_frames(content, mode))

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
            return requests.copied(event.value)

    async def get(
        self, source: str, target: str | os.PathLike[str], *, limits: copy_out.Limits | None = None
    ) -> Copied:  # fmt: skip
        """Copy a file or a folder of the guest's to the host; as `AgentClient.get`."""
        name = PurePosixPath(source).name
        with copy_out.Unpacker(Path(target), name if name not in {"", ".."} else "root", limits) as unpacker:
            return await self._get(source, unpacker)

    async def get_bytes(self, source: str, *, limit_bytes: int = CAPTURE_BYTES) -> bytes:
        """Return the content of a file of the guest's."""
        collector = copy_out.Collector(source, limit_bytes)
        await self._get(source, collector)
        return bytes(collector.content)

    async def _get(self, source: str, taker: copy_out.Taker) -> Copied:
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
                    return requests.copied(last.value)

    # The guest as a whole

    async def info(self) -> Info:
        """Return what the guest is and how it does."""
        return requests.info(await self._call("info"))

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
        return requests.grown(await self._call("grow-root"))

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


def _take_all(taker: copy_out.Taker, events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event, Entry):
            taker.entry(event.value)
        elif isinstance(event, Data):
            taker.data(event.data)
        elif isinstance(event, Reply):
            taker.finish()

"""The host's way to a guest's agent, for ordinary (blocking) code. `ostler.agent.aio` is its asyncio twin.

Each operation under way has a connection of its own, so a client may be used from several threads, and a slow operation
holds up no other; one that has ended leaves its connection to the next. Over a single stream (`AgentClient.over`, for a
console port) operations follow each other instead.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from ostler.agent import copy_in, copy_out, link, requests
from ostler.agent.connections import NOT_THERE_YET, Connections
from ostler.agent.link import Link, Opener
from ostler.agent.process import CAPTURE_BYTES, Process
from ostler.agent.protocol import Data, Entry, Failed, Hello, Reply
from ostler.agent.requests import Argument, Completed, Terminal
from ostler.errors import AgentError, AgentLost, AgentUnavailable, BadRequest, CommandTimeout

if TYPE_CHECKING:
    from ostler.agent.answers import Copied, Grown, Info

ANSWER_S = 60.0
"""The longest a guest may take over an answer, or over any step of a copy."""
ATTEMPT_S = 5.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.1
ENTROPY_BYTES = 64
UNSENT_BYTES = 1 << 20


class AgentClient:
    """A guest's agent; a context manager."""

    def __init__(self, opener: Opener, *, answer_timeout_s: float = ANSWER_S) -> None:
        self._timeout_s = answer_timeout_s
        self._connections = Connections(opener, answer_timeout_s)
        self._link = self._connections.link
        self._freezing: Link | None = None

    @property
    def hello(self) -> Hello | None:
        """What the agent said of itself last."""
        return self._connections.hello

    @classmethod
    def connect(
        cls,
        vsock_path: str | os.PathLike[str],
        *,
        timeout_s: float = ANSWER_S,
        alive: Callable[[], bool] | None = None,
    ) -> Self:
        """Wait until the agent behind a guest's `vsock.sock` answers.

        `alive` is asked between attempts whether waiting still makes sense.

        Raises:
            AgentUnavailable: it did not answer in time, or `alive` said no.
        """
        client = cls(link.vsock(Path(vsock_path)))
        client.wait(timeout_s, alive=alive)
        return client

    @classmethod
    def connect_unix(cls, path: str | os.PathLike[str], *, timeout_s: float = ANSWER_S) -> Self:
        """The same for an agent that listens on a UNIX socket: `ostler-agent --listen unix:PATH`."""
        client = cls(link.unix(Path(path)))
        client.wait(timeout_s)
        return client

    @classmethod
    def connect_console(cls, path: str | os.PathLike[str], *, timeout_s: float = ANSWER_S) -> Self:
        """The same through a guest's `agent.sock`, its console port; one client at a time, one operation at a time."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(deadline - time.monotonic(), 0.1)
            sock: socket.socket | None = None
            try:
                sock = link.unix(Path(path))(left_s)
                return cls.over(sock, timeout_s=min(left_s, ATTEMPT_S))
            except (*NOT_THERE_YET, AgentLost, AgentUnavailable) as error:
                # What is said before the guest has opened its port is lost, so it is said again.
                if sock is not None:
                    sock.close()
                if time.monotonic() + LONGEST_PAUSE_S >= deadline:
                    raise AgentUnavailable(f"agent: no answer from the guest within {timeout_s:g} s") from error
            time.sleep(LONGEST_PAUSE_S)

    @classmethod
    def over(cls, sock: socket.socket, *, timeout_s: float = ANSWER_S) -> Self:
        """Take over one connected stream; operations follow each other on it."""

        def none(_: float) -> socket.socket:
            raise ConnectionRefusedError("there is one stream only")

        client = cls(none)
        client._connections.use_only(Link(sock), timeout_s)
        return client

    def wait(self, timeout_s: float, *, alive: Callable[[], bool] | None = None) -> Hello:
        """Wait until the agent answers; see `connect`."""
        deadline = time.monotonic() + timeout_s
        pause_s = FIRST_PAUSE_S
        while True:
            left_s = deadline - time.monotonic()
            try:
                found = self._connections.open(min(max(left_s, 0.1), ATTEMPT_S))
                self._connections.release(found)
                assert found.hello is not None
                return found.hello
            except (*NOT_THERE_YET, AgentLost, AgentUnavailable) as error:
                if alive is not None and not alive():
                    raise AgentUnavailable("agent: the guest ended before its agent answered") from error
                if time.monotonic() + pause_s >= deadline:
                    raise AgentUnavailable(f"agent: no answer from the guest within {timeout_s:g} s") from error
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, LONGEST_PAUSE_S)

    def _call(self, operation: str, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
        with self._link() as connection:
            return connection.call(operation, dict(arguments or {}), self._timeout_s)

    # Commands

    def start(
        self,
        argv: Sequence[Argument],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Argument | None = None,
        user: str | None = None,
        tty: Terminal | None = None,
        timeout_s: float | None = None,
    ) -> Process:
        """Start a command.

        Raises:
            CommandNotFound, CommandNotExecutable: as a shell's 127 and 126.
            AgentRefused: no such user or folder.
        """
        wish = requests.command(argv, stdin=True, env=env, cwd=cwd, user=user, tty=tty, timeout_s=timeout_s)
        connection = self._connections.reach()
        try:
            connection.send(connection.conversation.request("exec", wish))
            return Process(connection, argv, start_timeout_s=self._timeout_s, release=self._connections.release)
        except BaseException:
            self._connections.release(connection)
            raise

    def run(
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
        """Run a command to its end.

        Raises:
            CommandTimeout: it was killed after `timeout_s`, with everything it had started.
            AgentError: a stream of more than `limit_bytes`.
            Also what `start` raises.
        """
        process = self.start(argv, env=env, cwd=cwd, user=user, timeout_s=timeout_s)
        with process:
            stdout, stderr = process.communicate(input or b"", limit_bytes=limit_bytes)
        if process.timed_out:
            raise requests.timed_out(argv, timeout_s, stdout, stderr)
        return Completed(process.argv, process.wait(), stdout, stderr)

    # Files

    def put(self, source: str | os.PathLike[str], target: str, *, owner: str | None = None) -> Copied:
        """Copy a file or a folder of the host's into the guest, into `target` where that is a folder there.

        Raises:
            BadRequest: the source cannot be read.
            AgentRefused: the guest refused: no space, no folder, read-only.
        """
        path = Path(source)
        name = path.resolve().name
        wish = {"path": requests.plain("path", target), "name": name, **({"owner": owner} if owner else {})}
        return self._put(wish, copy_in.frames(path))

    def put_bytes(self, content: bytes, target: str, *, mode: int = 0o644, owner: str | None = None) -> Copied:
        """Write a file in the guest."""
        wish = {"path": requests.plain("path", target), **({"owner": owner} if owner else {})}
        return self._put(wish, copy_in.file_frames(content, mode))

    def _put(self, wish: dict[str, Any], frames: Iterator[bytes]) -> Copied:
        with self._link() as connection:
            connection.send(connection.conversation.request("put", wish))
            for frame in frames:
                connection.send(frame)
                # Above the limit wait until some is gone; below it only look whether the guest has given up.
                while connection.unsent_bytes > UNSENT_BYTES:
                    self._check_early(connection, time.monotonic() + self._timeout_s)
            while connection.unsent_bytes:
                self._check_early(connection, time.monotonic() + self._timeout_s)
            return requests.copied(connection.answer(self._timeout_s))

    def _check_early(self, connection: Link, deadline: float) -> None:
        before = connection.unsent_bytes
        for event in connection.step(deadline):
            if isinstance(event, Failed):
                raise event.error
        if connection.unsent_bytes == before and time.monotonic() >= deadline:
            raise AgentLost(f"agent: the guest takes nothing for {self._timeout_s:g} s")

    def get(
        self, source: str, target: str | os.PathLike[str], *, limits: copy_out.Limits | None = None
    ) -> Copied:  # fmt: skip
        """Copy a file or a folder of the guest's to the host, into `target` where that is a folder.

        Set-user-id bits and owners are not kept. Raises HostError where it cannot be written, AgentError beyond
        `limits`, AgentRefused where the guest has no such file.
        """
        name = PurePosixPath(source).name
        if not name or name == "..":
            name = "root"
        with self._link() as connection, copy_out.Unpacker(Path(target), name, limits) as unpacker:
            return self._get(connection, source, unpacker)

    def get_bytes(self, source: str, *, limit_bytes: int = CAPTURE_BYTES) -> bytes:
        """Return the content of a file of the guest's."""
        with self._link() as connection:
            collector = copy_out.Collector(source, limit_bytes)
            self._get(connection, source, collector)
            return bytes(collector.content)

    def _get(self, connection: Link, source: str, taker: copy_out.Taker) -> Copied:
        connection.send(connection.conversation.request("get", {"path": requests.plain("path", source)}))
        while True:
            deadline = time.monotonic() + self._timeout_s
            events = connection.step(deadline)
            if not events and time.monotonic() >= deadline:
                raise AgentLost(f"agent: nothing from the guest for {self._timeout_s:g} s")
            for event in events:
                if isinstance(event, Entry):
                    taker.entry(event.value)
                elif isinstance(event, Data):
                    taker.data(event.data)
                elif isinstance(event, Failed):
                    raise event.error
                elif isinstance(event, Reply):
                    taker.finish()
                    return requests.copied(event.value)

    # The guest as a whole

    def info(self) -> Info:
        """Return what the guest is and how it does."""
        return requests.info(self._call("info"))

    def ping(self) -> float:
        """Return how long an answer takes, in seconds."""
        started = time.monotonic()
        self._call("ping")
        return time.monotonic() - started

    def configure(self, **parts: Any) -> None:
        """Set hostname, interfaces, routes, dns, search, ssh_keys, mounts; see `requests.configuration`."""
        self._call("configure", requests.configuration(**parts))

    def become_another(self, **parts: Any) -> None:
        """Make a guest that went on from saved state one of its own: random numbers, the time, and what `configure`
        takes. One exchange, as whoever starts such a guest waits for it."""
        wanted: list[tuple[str, dict[str, Any]]] = [
            ("entropy", {"hex": secrets.token_hex(ENTROPY_BYTES)}),
            ("set-time", {"unix_ns": time.time_ns()}),
            ("configure", requests.configuration(**parts)),
        ]
        with self._link() as connection:
            connection.call_all(wanted, self._timeout_s)

    def shutdown(self, *, reboot: bool = False, grace_s: float = 5.0) -> None:
        """Ask the guest to power off; returns when it has begun to. Its end is the VM's to report."""
        mode = "reboot" if reboot else "power-off"
        self._call("shutdown", {"mode": mode, "grace_ms": round(grace_s * 1000)})

    def set_time(self, unix_ns: int | None = None) -> None:
        """Set the guest's clock, to the host's if nothing else is said."""
        self._call("set-time", {"unix_ns": time.time_ns() if unix_ns is None else unix_ns})

    def add_entropy(self) -> None:
        """Seed the guest's random numbers from the host's."""
        self._call("entropy", {"hex": secrets.token_hex(ENTROPY_BYTES)})

    def grow_root(self) -> Grown:
        """Make the guest's root file system as large as its disk."""
        return requests.grown(self._call("grow-root"))

    def freeze(self, *, limit_s: float = 30.0) -> None:
        """Freeze the guest's file systems until `thaw`, or until `limit_s` or this client's end."""
        if self._freezing is not None:
            raise BadRequest("freeze: the guest is frozen already")
        connection = self._connections.reach()
        try:
            connection.call("freeze", {"limit_ms": round(limit_s * 1000)}, self._timeout_s)
        except BaseException:
            if connection is not self._connections.only:
                connection.close()
            raise
        self._freezing = connection

    def thaw(self) -> None:
        """Let them go on. Without a freeze by this client, whatever is frozen."""
        connection, self._freezing = self._freezing, None
        if connection is None or connection is self._connections.only:
            self._call("thaw")
            return
        with contextlib.closing(connection), contextlib.suppress(AgentLost):
            connection.call("thaw", {}, self._timeout_s)

    @contextlib.contextmanager
    def frozen(self, *, limit_s: float = 30.0) -> Iterator[None]:
        """Freeze for the length of a block."""
        self.freeze(limit_s=limit_s)
        try:
            yield
        finally:
            self.thaw()

    def close(self) -> None:
        """Let go of every connection; a freeze ends, commands that were started keep theirs."""
        freezing, self._freezing = self._freezing, None
        if freezing is not None:
            freezing.close()
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


__all__ = ["AgentClient", "AgentError", "CommandTimeout", "Completed", "Process", "Terminal"]

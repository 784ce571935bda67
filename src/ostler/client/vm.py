"""`ostler.VM`: a guest from a few lines of Python.

    with ostler.VM("debian", memory="512M") as vm:
        print(vm.run(["uname", "-a"]).text)

    async with ostler.VM("debian") as vm:
        print((await vm.run(["uname", "-a"])).text)

The guest is a process of its own and ends with the block, or with this process, however that ends. What can go wrong is
in `ostler.errors`. A VM may be used from several threads; the asynchronous one runs its work in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ostler.client import guests, snapshots, warm
from ostler.client import plan as plans
from ostler.client.console import GuestConsole
from ostler.client.events import Events
from ostler.config import parse_request, parse_size
from ostler.config.request import read_request
from ostler.control.connection import Connection
from ostler.errors import AgentError, BadRequest, CommandFailed
from ostler.images.progress import Progress, silent

if TYPE_CHECKING:
    from ostler.agent.answers import Info
    from ostler.agent.client import AgentClient
    from ostler.agent.process import Process
    from ostler.agent.requests import Completed, Terminal
    from ostler.client.async_vm import AsyncVM
    from ostler.client.calls import CallsOf
    from ostler.client.memory import MemoryOf
    from ostler.client.running import RunningGuest
    from ostler.config import GuestRequest

T = TypeVar("T")
Argument = str | bytes | os.PathLike[str]


class VM:
    """A guest, started by `start` or by entering the block and ended by leaving it."""

    def __init__(
        self, image: str | None = None, *, file: str | os.PathLike[str] | None = None, progress: Progress = silent,
        **options: Any,
    ) -> None:  # fmt: skip
        """Describe a guest: an image, and any field of `ostler schema` as an option.

            VM("debian", memory="1G", cpus=2, ports=["8080:80"], volumes=["./site:/srv:ro"], env={"LANG": "C"})
            VM(file="guest.toml", memory="2G")

        Raises BadRequest naming what is wrong; nothing has been started or fetched then.
        """
        given = {"image": image, **options}
        self.request: GuestRequest = read_request(Path(file), **given) if file is not None else parse_request(**given)
        if self.request.image is None:
            raise BadRequest("image: missing, expected the name of one, such as debian")
        self._progress = progress
        self._guest: RunningGuest | None = None

    # -- life -------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the guest and wait until its agent answers; fetches or builds the image where it is missing.

        Raises ImageError, BadRequest, HostError; GuestCrash for a guest that does not come up.
        """
        if self._guest is not None:
            raise BadRequest(f"guest {self.name!r}: has been started already")
        guest = warm.start(
            plans.make(self.request, progress=self._progress), leash=True, remove=True, cold=self.request.cold
        )
        try:
            guest.configure()
        except BaseException:
            guest.end()
            raise
        for trouble in guest.troubles:
            self._progress(trouble)
        self._guest = guest
        return self

    def stop(self, *, grace_s: float = guests.DEFAULT_GRACE_S) -> None:
        """Shut the guest down in order, and by force after the grace period. No guest is no error."""
        if self._guest is not None:
            guests.stop(self._guest.entry, grace_s=grace_s)
            self.close()

    def close(self) -> None:
        """End the guest: in order if it could write to something that stays, else at once."""
        guest, self._guest = self._guest, None
        if guest is not None:
            guest.end()

    def wait(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Wait until the guest ends by itself; how it did, as `ostler wait --json` has it."""
        return self._running().wait(timeout_s)

    def __enter__(self) -> Self:
        return self if self._guest is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> AsyncVM:
        from ostler.client.async_vm import AsyncVM

        return await AsyncVM(self).__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # -- saved, and begun again -------------------------------------------------------------

    def snapshot(
        self, name: str, *, incremental: bool = False, freeze: bool = False, replace: bool = False
    ) -> dict[str, Any]:  # fmt: skip
        """Save the running guest under a name; it goes on. `pause_ms` of the result says how long it stood still.

            vm.snapshot("ready")
            with VM.restore("ready") as again: …

        With `freeze` its file systems are frozen meanwhile; an incremental one has what changed since the last whole
        one. Raises BadRequest for a name that is taken, and for a guest that cannot be saved.
        """
        guest = self._running()
        return snapshots.create(
            guest.entry, name, incremental=incremental, freeze=freeze, replace=replace, job=guest.plan.job
        )

    @classmethod
    def restore(cls, snapshot: str, *, name: str | None = None, ports: bool = True, accel: str | None = None) -> Self:
        """A guest that goes on from a snapshot, and runs already; leave its block, or `close` it, to end it.

        Without `ports` none of the host's lead to it: two guests cannot have the same. Raises BadRequest for a snapshot
        there is not, StateError for one that is damaged or cannot go on here.
        """
        guest = snapshots.restore(snapshot, name, leash=True, ports=ports, accel=accel)
        try:
            guest.configure()
        except BaseException:
            guest.end()
            raise
        return cls._of(guest)

    def fork(self, count: int = 1, *, names: Sequence[str] | None = None) -> list[VM]:
        """Children that go on from this instant, each with a name, a hostname, a network, random numbers and disks of
        its own; this guest pauses for milliseconds. They end with their blocks, `close`, or this process.

            for child in vm.fork(3): print(child.run(["hostname"]).text)

        Raises BadRequest for a guest that cannot be forked. Either all begin or none does.
        """
        guest = self._running()
        wanted = list(names) if names is not None else [None] * count
        children, _ = snapshots.fork(guest.entry, wanted, leash=True, job=guest.plan.job)
        return [VM._of(child) for child in children]

    @classmethod
    def _of(cls, guest: RunningGuest) -> Self:
        """A VM for a guest that runs already."""
        made = cls.__new__(cls)
        made.request = parse_request(
            image=str(guest.plan.facts.get("image") or guest.entry.name), name=guest.entry.name
        )
        made._progress = silent
        made._guest = guest
        return made

    # -- what it is -------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The guest's name on this host, as `ostler ps` shows it."""
        return self._guest.entry.name if self._guest else self.request.name or "not started"

    @property
    def agent(self) -> AgentClient:
        """The agent itself, for what has no method here: freeze, set_time, grow_root, …"""
        return self._running().agent

    def info(self) -> Info:
        """Addresses, load, memory, operating system, as the guest sees them."""
        return self._asked(lambda agent: agent.info())

    def stats(self) -> dict[str, Any]:
        """Processor time, memory, counters of disks and networks, as the host sees them."""
        return guests.request(self._running().entry, "stats")

    # -- commands ---------------------------------------------------------------------------

    def run(
        self, argv: Sequence[Argument], *, input: bytes | str | None = None, env: Mapping[str, str] | None = None,  # noqa: A002
        cwd: Argument | None = None, user: str | None = None, timeout_s: float | None = None, check: bool = False,
    ) -> Completed:  # fmt: skip
        """Run a command to its end: `returncode`, `stdout` and `stderr` as bytes, `text` as text.

        Raises:
            CommandNotFound, CommandNotExecutable: there is no such program.
            CommandTimeout: it was killed after `timeout_s`.
            CommandFailed: with `check`, its status was not 0.
            GuestCrash, GuestGone: the guest ended meanwhile.
        """
        given = input.encode() if isinstance(input, str) else input
        wanted = {**self._running().plan.job.env, **(env or {})}
        done = self._asked(
            lambda agent: agent.run(argv, input=given, env=wanted, cwd=cwd, user=user, timeout_s=timeout_s)
        )
        if check and done.returncode:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            said = f": {last}" if last else ""
            raise CommandFailed(
                f"{done.argv[0]}: ended with status {done.returncode} in {self.name}{said}",
                returncode=done.returncode, stdout=done.stdout, stderr=done.stderr,
            )  # fmt: skip
        return done

    def popen(
        self, argv: Sequence[Argument], *, env: Mapping[str, str] | None = None, cwd: Argument | None = None,
        user: str | None = None, tty: Terminal | None = None,
    ) -> Process:  # fmt: skip
        """Start a command and keep hold of it: `stdin`, `stdout`, `stderr`, `send_signal`, `resize`, `wait`."""
        wanted = {**self._running().plan.job.env, **(env or {})}
        return self._asked(lambda agent: agent.start(argv, env=wanted, cwd=cwd, user=user, tty=tty))

    # -- files ------------------------------------------------------------------------------

    def put(self, source: str | os.PathLike[str], target: str) -> None:
        """Copy a file or a folder of the host's into the guest."""
        self._asked(lambda agent: agent.put(source, target))

    def get(self, source: str, target: str | os.PathLike[str]) -> None:
        """Copy a file or a folder of the guest's to the host."""
        self._asked(lambda agent: agent.get(source, target))

    def write(self, path: str, content: bytes | str, *, mode: int = 0o644) -> None:
        """Write a file in the guest."""
        data = content.encode() if isinstance(content, str) else content
        self._asked(lambda agent: agent.put_bytes(data, path, mode=mode))

    def read(self, path: str) -> bytes:
        """The content of a file of the guest's."""
        return self._asked(lambda agent: agent.get_bytes(path))

    # -- the machine ------------------------------------------------------------------------

    def pause(self) -> None:
        """Hold the guest's processors where they are."""
        guests.request(self._running().entry, "pause")

    def resume(self) -> None:
        """Let them go on."""
        guests.request(self._running().entry, "resume")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Paused for the length of a block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    @property
    def memory(self) -> MemoryOf:
        """The guest's memory from outside: read, write, translate, watch; see `ostler.client.memory`."""
        from ostler.client.memory import MemoryOf

        return MemoryOf(self._running().entry)

    @property
    def calls(self) -> CallsOf:
        """What the guest says by Ostler's own calls; see `ostler.client.calls`."""
        from ostler.client.calls import CallsOf

        return CallsOf(self._running().entry)

    def inject(self, fault: str, **options: Any) -> dict[str, Any]:
        """Make something go wrong: docs/faults.md lists faults and their options.

        vm.inject("disk-error", device="disk0", count=3); vm.inject("hang", seconds=30); vm.inject("panic")
        """
        return guests.request(self._running().entry, "inject", fault=fault, **options)

    def on_fault(self, **policies: str) -> dict[str, str]:
        """Change what is to happen from now on, and return what holds: `vm.on_fault(panic="pause")`."""
        wanted: dict[str, Any] = {name.replace("_", "-"): policy for name, policy in policies.items()}
        return guests.request(self._running().entry, "fault-policy", **wanted)

    def reconnect(self) -> None:
        """Wait for the agent of a guest that was reset (the event `reset`), and hand it its settings again."""
        self._running().reconnect()

    def set_memory(self, size: str | int) -> None:
        """Ask the guest to keep so much of its memory ("256M", or bytes) and give back the rest; see `stats`."""
        guests.request(
            self._running().entry, "balloon", guest_bytes=parse_size(size) if isinstance(size, str) else size
        )

    def schedule(self, **shares: Any) -> dict[str, Any]:
        """Change the guest's share of the host's processors while it runs; how it is then, as `ostler sched` shows it.

            vm.schedule(weight=400, cap=150, reserve="30%", pin="0-1"); vm.schedule(cap=None)

        Percent are of one host CPU. What is not named stays. Raises BadRequest.
        """
        return guests.schedule(self._running().entry, **shares)

    def console(self, *, backlog_bytes: int = 0) -> GuestConsole:
        """The serial console: `read`, `write`, `expect`; a context manager."""
        with Connection.to(self._running().entry) as connection:
            return GuestConsole(connection.console(backlog_bytes=backlog_bytes))

    def events(self, *, timeout_s: float | None = None) -> Events:
        """What happens to the guest from now on, to its end: `paused`, `resumed`, `device`, `ended`, …

        An iterator and a context manager; next() raises TimeoutError when nothing happens for so long.
        """
        return Events(self._running().entry, timeout_s=timeout_s)

    def migrate(self, address: str, **wish: Any) -> dict[str, Any]:
        """Move the running guest to where `ostler receive` listens; it is not this object's any more then.

            vm.migrate("tcp://other:7777", tls=TlsFiles(cert, key, ca), bytes_per_s=200e6)

        `wish` has any field of `ostler.client.moving.Wish`. What is returned says how long it took (`elapsed_s`), how
        long the guest stood still (`pause_s`), and what was sent. An interrupt calls it off.

        Raises MigrationError and its kin: the guest runs on here, unless the message says otherwise.
        """
        from ostler.client import moving

        guest = self._running()
        facts = moving.migrate(guest.entry, moving.Wish(address=address, **wish))
        self.close()
        return facts

    # ---------------------------------------------------------------------------------------

    def _running(self) -> RunningGuest:
        if self._guest is None:
            raise BadRequest(f"guest {self.name!r}: is not running; use it in a `with` block or call start()")
        return self._guest

    def _asked(self, ask: Callable[[AgentClient], T]) -> T:
        """The agent's answer; where the guest has ended, how. Raises GuestPaused."""
        guest = self._running()
        guests.refuse_paused(guest.entry)
        try:
            return ask(guest.agent)
        except AgentError as error:
            raise guest.explain(error) from error

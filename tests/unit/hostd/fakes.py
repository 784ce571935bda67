"""Guests without machines: they start when told, are ready when their gate opens, and end when they are ended."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ostler.errors import GuestGone, GuestNotFound, HostError
from ostler.hostd import definition, starting
from ostler.hostd.database import Database, StateFolder
from ostler.hostd.definition import Definition
from ostler.hostd.host import Host
from ostler.hostd.launcher import EventTaker, Found
from ostler.hostd.opening import open_host
from ostler.images.progress import Progress

GIB = 1 << 30
LIMITS = {"memory": 8 * GIB, "cpu": 4000, "disk": 100 * GIB}
TIMEOUT_S = 20.0
KILLED = {"status": 0, "reason": "killed", "message": ""}
POWERED_OFF = {"status": 0, "reason": "power-off", "message": ""}


class Life:
    """One guest's process."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.end: dict[str, Any] = {}
        self.ended = threading.Event()
        self.takers: list[EventTaker] = []

    def finish(self, end: dict[str, Any]) -> None:
        if not self.ended.is_set():
            self.end = end
            self.ended.set()


class FakeLauncher:
    """Guests of a host; outlives the services that use it, as real ones do."""

    def __init__(self) -> None:
        self.lives: dict[str, Life] = {}
        self.log: list[tuple[str, str]] = []
        self.gates: dict[str, threading.Event] = {}
        """Guests that are not ready before their gate is opened."""
        self.hang: threading.Event | None = None
        """Nothing can be stopped before it is set."""
        self.broken: set[str] = set()
        """Guests that cannot be started."""
        self._lock = threading.Lock()

    def found(self) -> dict[str, Found]:
        with self._lock:
            return {
                name: Found(name, not life.ended.is_set(), life.facts, {"memory": GIB, "cpus": 1}, life.end)
                for name, life in self.lives.items()
            }

    def start(self, definition: Definition, say: Progress) -> None:
        say("starting")
        name = definition.name
        with self._lock:
            self.log.append(("start", name))
            if name in self.broken:
                raise HostError(f"guest {name!r}: is broken")
            self.lives[name] = Life({"created": time.time(), "image": definition.request.image})

    def make_ready(self, definition: Definition, say: Progress) -> None:
        say("waiting")
        life = self.lives[definition.name]
        gate = self.gates.get(definition.name)
        while gate is not None and not gate.wait(0.005):
            if life.ended.is_set():
                raise GuestGone(f"guest {definition.name!r}: ended before the command did (killed)")
        self.log.append(("ready", definition.name))

    def watch(self, name: str, take: EventTaker) -> dict[str, Any]:
        life = self.lives[name]
        life.takers.append(take)
        take({"event": "status", "state": "running", "pid": 1, "accelerator": "soft"})
        life.ended.wait()
        return life.end

    def ask(self, name: str, op: str, *, timeout_s: float | None = 30.0, **arguments: object) -> dict[str, Any]:  # noqa: ARG002
        life = self._alive(name)
        if op in {"pause", "resume"}:
            for take in life.takers:
                take({"event": {"pause": "paused", "resume": "resumed"}[op]})
            return {}
        if op == "stats":
            return {"uptime_ns": 10**9, "cpu_time_ns": 5, "vcpus": [{"cpu_time_ns": 4}], "memory": {"size_bytes": GIB}}
        return {}

    def stop(self, name: str, grace_s: float) -> dict[str, Any]:  # noqa: ARG002
        life = self._alive(name)
        self.log.append(("stop", name))
        if self.hang is not None:
            self.hang.wait(TIMEOUT_S)
        life.finish(POWERED_OFF)
        return life.end

    def kill(self, name: str) -> dict[str, Any]:
        life = self._alive(name)
        self.log.append(("kill", name))
        life.finish(KILLED)
        return life.end

    def forget(self, name: str) -> None:
        with self._lock:
            self.lives.pop(name, None)

    def logs(self, name: str, *, console: bool, lines: int | None) -> bytes:  # noqa: ARG002
        return f"{name} said\n".encode()

    def console(self, name: str, backlog_bytes: int) -> tuple[socket.socket, bytes]:  # noqa: ARG002
        self._alive(name)
        ours, theirs = socket.socketpair()
        threading.Thread(target=_echo, args=(theirs,), daemon=True).start()
        return ours, b"backlog"

    def names(self, what: str) -> list[str]:
        """Whose log entries of that kind there are, in order."""
        return [name for kind, name in self.log if kind == what]

    def _alive(self, name: str) -> Life:
        life = self.lives.get(name)
        if life is None or life.ended.is_set():
            raise GuestNotFound(f"guest {name!r}: is not running")
        return life


@contextlib.contextmanager
def _killed() -> Iterator[Any]:
    raise HostError("this service was killed")
    yield


def _echo(stream: socket.socket) -> None:
    with stream:
        while data := stream.recv(1024):
            stream.sendall(data.upper())


def table(name: str, /, *, memory: str = "1G", **host: Any) -> dict[str, Any]:
    """A definition as it is given."""
    return {"name": name, "image": "debian", "memory": memory, "host": host}


def guest(name: str, /, *, memory: str = "1G", **host: Any) -> Definition:
    """A judged one."""
    return definition.parse(None, table(name, memory=memory, **host))


@contextlib.contextmanager
def opened(
    folder: Path, launcher: FakeLauncher, *, later: Callable[[float, Callable[[], None]], object] | None = None,
    boot_id: str = "boot-1", files: dict[str, Definition] | None = None, crash: bool = False,
) -> Iterator[Host]:  # fmt: skip
    """A service over the launcher's guests; with `crash` it leaves without a word."""
    with StateFolder(folder) as state, contextlib.closing(Database(state)) as database:
        host = open_host(
            database, launcher, limits=dict(LIMITS), files=files, boot_id=boot_id,
            **({"call_later": later} if later is not None else {}),
        )  # fmt: skip
        try:
            yield host
        finally:
            if crash:
                # Threads of a process that was killed would write nothing any more.
                database.writing = _killed  # type: ignore[method-assign]
                with host.changed:
                    host.is_closing = True
                    host.changed.notify_all()
            else:
                host.close()


def until(host: Host, condition: Callable[[], bool]) -> None:
    """Wait for a state of the host; it wakes whoever waits at every change."""
    assert host.wait_for(condition, TIMEOUT_S), [each.model_dump() for each in host.listed().guests]


def bring_up(host: Host, name: str) -> None:
    """Define a guest, start it, and wait until it is ready."""
    host.define([guest(name)], replace=False)
    starting.begin_start(host, name, "test")
    until(host, lambda: host.guests[name].is_ready)

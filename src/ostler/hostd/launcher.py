"""How guests are reached: the contract of whoever starts, watches and ends them, and the real one.

All calls block, in a thread of their caller's. A guest is known by its name; what is said of it comes from its own
process or its folder, so that a service that has just been started knows as much as one that has started it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ostler.client import guests, keeper, plan, warm
from ostler.client.job import Job
from ostler.client.running import RunningGuest
from ostler.config import parse_guest
from ostler.control import runtime
from ostler.control.connection import Connection, ConnectionLost
from ostler.control.launch import Launched
from ostler.control.runtime import Entry
from ostler.errors import GuestNotFound, OstlerError
from ostler.images.progress import Progress

if TYPE_CHECKING:
    from ostler.client.plan import Plan
    from ostler.hostd.definition import Definition

Say = Progress
EventTaker = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A guest's folder, running or kept."""

    name: str
    is_running: bool
    facts: dict[str, Any]
    """What started it recorded: `image`, `command`, `ports`, `created`, …"""
    spec: dict[str, Any]
    end: dict[str, Any]
    """How it ended: `status`, `reason`, `message`; empty where nobody could say."""


class Launcher(Protocol):
    """Starts, watches and ends guests."""

    def found(self) -> dict[str, Found]:
        """All guests there are, whoever started them."""

    def start(self, definition: Definition, say: Say) -> None:
        """Start the guest's process; its processors run when this returns. Raises OstlerError."""

    def make_ready(self, definition: Definition, say: Say) -> None:
        """Wait for its agent, hand over what is the guest's own, start its command. Harmless where that was done."""

    def watch(self, name: str, take: EventTaker) -> dict[str, Any]:
        """Tell what happens to it, from `{"event": "status", …}` on, until it ends; how it did."""

    def ask(self, name: str, op: str, *, timeout_s: float | None = 30.0, **arguments: object) -> dict[str, Any]:
        """One request of the control protocol."""

    def stop(self, name: str, grace_s: float) -> dict[str, Any]:
        """Shut it down, and kill it after that time; how it ended."""

    def kill(self, name: str) -> dict[str, Any]:
        """End it at once; how it ended."""

    def forget(self, name: str) -> None:
        """Remove the folder of one that has ended."""

    def logs(self, name: str, *, console: bool, lines: int | None) -> bytes:
        """What its console, or its command, has said."""

    def console(self, name: str, backlog_bytes: int) -> tuple[socket.socket, bytes]:
        """Its console, the caller's to close, and what came before."""


class _AdoptedProcess:
    """A VM process that somebody else started: its lock says that it lives."""

    returncode: int | None = None

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self.pid = 0

    def poll(self) -> int | None:
        return None if self._entry.is_running() else 1

    def wait(self, timeout: float | None = None) -> int:  # noqa: ARG002 - the contract's
        guests.await_gone(self._entry)
        return 1

    def terminate(self) -> None:
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(OstlerError):
            guests.kill(self._entry)


class ProcessLauncher:
    """Guests are processes of this user (`ostler.control`)."""

    def __init__(self) -> None:
        self._begun: dict[str, RunningGuest] = {}

    def found(self) -> dict[str, Found]:
        return {entry.name: _found(entry) for entry in runtime.entries()}

    def start(self, definition: Definition, say: Say) -> None:
        wanted = _plan(definition, say)
        say("starting its process")
        self._begun[definition.name] = warm.start(wanted, leash=False, remove=False, cold=definition.request.cold)

    def make_ready(self, definition: Definition, say: Say) -> None:
        guest = self._begun.pop(definition.name, None) or self._adopt(definition, say)
        try:
            wanted = guest.plan
            if wanted.spec.vsock_cid is not None and (wanted.boot == "agent" or wanted.job.argv):
                say("waiting for its agent")
                guest.wait_for_agent(definition.host.ready_timeout_s).close()
                guest.configure()
                for trouble in guest.troubles:
                    say(trouble)
            if wanted.job.argv and wanted.is_service:
                say("starting its command")
                keeper.start(guest.entry, wanted.job, wanted.settings, again=True)
        finally:
            guest.release()

    def _adopt(self, definition: Definition, say: Say) -> RunningGuest:
        entry = runtime.find(definition.name)
        launched = Launched(entry, _AdoptedProcess(entry), None)
        wanted = _plan(definition, say)
        if (entry.path / runtime.ORIGIN).exists():
            from ostler.client.snapshots import RestoredGuest

            return RestoredGuest(launched, wanted)
        return RunningGuest(launched, wanted)

    def watch(self, name: str, take: EventTaker) -> dict[str, Any]:
        entry = runtime.find(name)
        with contextlib.suppress(GuestNotFound, ConnectionLost), Connection.to(entry) as connection:
            events = connection.events()
            take({"event": "status", **_status(entry)})
            for event in events:
                take(event)
                if event["event"] == "ended":
                    break
        # A process that answers nobody any more may still put its things away.
        guests.await_gone(entry)
        return entry.end

    def ask(self, name: str, op: str, *, timeout_s: float | None = 30.0, **arguments: object) -> dict[str, Any]:
        return guests.request(runtime.find(name), op, timeout_s=timeout_s, **arguments)

    def stop(self, name: str, grace_s: float) -> dict[str, Any]:
        return guests.stop(runtime.find(name), grace_s=grace_s)

    def kill(self, name: str) -> dict[str, Any]:
        return guests.kill(runtime.find(name))

    def forget(self, name: str) -> None:
        with contextlib.suppress(GuestNotFound):
            runtime.remove(runtime.find(name))

    def logs(self, name: str, *, console: bool, lines: int | None) -> bytes:
        read = guests.follow_console if console else guests.follow_output
        return b"".join(read(runtime.find(name), lines=lines, follow=False))

    def console(self, name: str, backlog_bytes: int) -> tuple[socket.socket, bytes]:
        with Connection.to(runtime.find(name)) as connection:
            attached = connection.console(backlog_bytes=backlog_bytes)
        return attached.socket, attached.backlog + attached.first


def _found(entry: Entry) -> Found:
    facts, spec = entry.facts, runtime.read_json(entry.path / runtime.SPEC)
    is_running = entry.is_running()
    return Found(entry.name, is_running, facts, spec, {} if is_running else entry.end)


def _status(entry: Entry) -> dict[str, Any]:
    return guests.request(entry, "status", timeout_s=guests.LOOK_TIMEOUT_S)


def _plan(definition: Definition, say: Say) -> Plan:
    from ostler.images import KERNELS, store

    image = definition.request.image
    if image is not None and (image not in KERNELS or store.find(image) is not None):
        return plan.make(definition.request, progress=say)
    return _kernel_plan(definition, say)


def _kernel_plan(definition: Definition, say: Say) -> Plan:
    """Of a kernel alone: nobody in it answers, and it runs until it ends by itself."""
    from ostler.images import initrd, kernels

    request, words = definition.request, ["console=ttyS0"]
    kernel, ramdisk = request.kernel, request.initrd
    if kernel is None:
        assert request.image is not None
        ours = kernels.fetch(request.image, say)
        kernel, ramdisk = ours.image, ramdisk or initrd.busybox(ours, say)
    spec = parse_guest(
        kernel=kernel, initrd=ramdisk, append=" ".join([*words, *([request.append] if request.append else [])]),
        memory=request.memory, cpus=request.cpus, cpu=request.cpu, accel=request.accel, disks=request.disks,
        nets=request.nets or (), ports=request.ports, test_devices=request.test_devices, **request.treatment,
    )  # fmt: skip
    ports = [str(port) for port in request.ports]
    facts = {"image": request.image or str(kernel), "command": [], "ports": ports, "durable": False, "service": False}
    return plan.Plan(
        name=definition.name, spec=spec, job=Job((), {}, None, None), boot="init", is_service=False,
        is_durable=False, facts=facts,
    )  # fmt: skip

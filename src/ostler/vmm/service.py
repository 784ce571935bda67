"""What a VM process does for its clients: the operations of the control protocol (docs/control-protocol.md).

All of it runs on the loop's thread. `stop` asks the guest by its power button and ends it after a grace period; an
agent in the guest is the client's to ask, who speaks its protocol.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ostler.control.logfile import LOG_BYTES
from ostler.control.runtime import Entry
from ostler.control.wire import Message, pack_error
from ostler.devices.virtio.balloon import Balloon
from ostler.devices.virtio.blk import Block
from ostler.errors import BadRequest, OstlerError
from ostler.vmm.hub import HubConsole
from ostler.vmm.loop import NS_PER_MS
from ostler.vmm.processors import End, EndKind
from ostler.vmm.run import GuestProcess
from ostler.vmm.server import Connection, ControlServer

if TYPE_CHECKING:
    from ostler.vmm.migrate_out import Migration

DEFAULT_GRACE_S, MAX_GRACE_S = 30.0, 3600.0
MAX_STATUS, MAX_REASON = 255, 200
SHARES = ("weight", "cap", "reserve", "pin")
Statistics = Callable[[], Message]
Operation = Callable[[Connection, object, Message], Message | None]
"""The connection, the request's number, its arguments; None where the connection is answered later."""


class GuestService:
    """Implements `vmm.server.Service` for one guest."""

    def __init__(
        self, process: GuestProcess, server: ControlServer, hub: HubConsole, facts: Message, entry: Entry | None = None
    ) -> None:
        self._process = process
        self._server = server
        self._hub = hub
        self._facts = facts
        self._entry = entry
        self._started_ns = time.monotonic_ns()
        self._waiting: list[tuple[Connection, object]] = []
        self._grace = process.loop.new_timer()
        self._grace.call(self._kill_now)
        self._migration: Migration | None = None
        self.killed = False
        self.verdict: Message = {}
        """What a client says of the end: the status and reason of the command the guest was there for."""
        self.sources: dict[str, Statistics] = {}
        """Counters of devices and back ends by name, for `stats`."""
        self._operations: dict[str, Operation] = {
            "status": self._status,
            "inspect": self._inspect,
            "stats": self._stats,
            "pause": self._pause,
            "resume": self._resume,
            "power-button": self._power_button,
            "stop": self._stop,
            "kill": self._kill,
            "wait": self._wait,
            "events": self._events,
            "console": self._console,
            "balloon": self._balloon,
            "schedule": self._schedule,
            "migrate": self._migrate,
            "migrate-cancel": self._migrate_cancel,
            "migrate-limit": self._migrate_limit,
            "migrate-post-copy": self._migrate_post_copy,
        }

    def add_operations(self, operations: Mapping[str, Operation]) -> None:
        """Serve these too: parts of the process that are not always there."""
        self._operations |= operations

    def serve(self, connection: Connection, number: object, op: str, arguments: Message) -> Message | None:
        """Do what is asked for. Raises OstlerError."""
        operation = self._operations.get(op)
        if operation is None:
            raise BadRequest(f"control request {op!r}: not known; expected one of {', '.join(self._operations)}")
        return operation(connection, number, arguments)

    def _moves(self) -> Migration:
        if self._entry is None:
            raise BadRequest("migrate: expected a guest with a runtime folder")
        if self._migration is None:
            # What it needs (TLS, compression) is no guest's business that stays where it is.
            from ostler.vmm.migrate_out import Migration

            self._migration = Migration(self._process, self._entry, self.announce, self._has_moved)
        return self._migration

    def _migrate(self, connection: Connection, number: object, arguments: Message) -> None:
        def prepare() -> None:
            # A tenth of a second's work, which the guest's devices are not to wait for.
            with contextlib.suppress(ImportError):
                importlib.import_module("ostler.vmm.migrate_out")
            self._process.loop.call_soon(begin)

        def begin() -> None:
            try:
                self._moves().start(connection, number, arguments)
            except OstlerError as error:
                connection.send({"id": number, "error": pack_error(error)})

        threading.Thread(target=prepare, name="migrate-prepare", daemon=True).start()

    def _migrate_cancel(self, _connection: Connection, _number: object, _arguments: Message) -> Message:
        return self._moves().cancel()

    def _migrate_limit(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        return self._moves().limit(arguments)

    def _migrate_post_copy(self, _connection: Connection, _number: object, _arguments: Message) -> Message:
        return self._moves().post_copy()

    def _has_moved(self) -> None:
        self.verdict = {"status": 0, "reason": "migrated"}

    def close(self) -> None:
        """The guest has ended: nothing goes on behind its back."""
        if self._migration is not None:
            self._migration.close()

    def announce(self, event: str, **values: object) -> None:
        """Tell whoever listens; on the loop's thread."""
        self._server.broadcast({"event": event, "time": time.time(), **values})

    def on_loop(self, call: Callable[[], None]) -> None:
        """Run something where the service runs; from any thread."""
        self._process.loop.call_soon(call)

    def report(self, device: str, text: str) -> None:
        """A device is in trouble: said to whoever listens, and written down. On the loop's thread."""
        print(f"{device}: {text}", file=sys.stderr, flush=True)  # noqa: T201
        self.announce("device", device=device, message=text)

    def ended(self, end: Message) -> None:
        """The guest has ended: everyone who waits is told, and everyone who listens."""
        self.announce("ended", **end)
        for connection, number in self._waiting:
            connection.reply(number, end)
        self._waiting.clear()

    def _status(self, _connection: Connection, _number: object, _arguments: Message) -> Message:
        moving = self._migration.status() if self._migration is not None else None
        return {
            "name": self._facts["name"],
            "pid": os.getpid(),
            "state": "paused" if self._process.is_paused else "running",
            "uptime_s": (time.monotonic_ns() - self._started_ns) / 1e9,
            "accelerator": self._facts["accelerator"],
            "resets": self._process.resets,
            **({"migration": moving} if moving is not None else {}),
        }

    def _inspect(self, connection: Connection, number: object, arguments: Message) -> Message:
        return {**self._status(connection, number, arguments), **self._facts}

    def _stats(self, _connection: Connection, _number: object, _arguments: Message) -> Message:
        usage = zip(self._process.processors, self._process.shares.usage(), strict=True)
        processors = [
            {"id": each.vcpu.id, "thread_id": each.thread_id, "cpu_time_ns": used.run_ns, **used.as_message()}
            for each, used in usage
        ]
        memory = self._process.machine.memory
        result: dict[str, Any] = {
            "uptime_ns": time.monotonic_ns() - self._started_ns,
            "vcpus": processors,
            "cpu_time_ns": time.process_time_ns(),
            "memory": {
                "size_bytes": self._process.machine.spec.memory_bytes,
                "touched_bytes": memory.touched_bytes,
                "process_rss_bytes": _resident_bytes(),
            },
        }
        if counters := self._process.machine.vm.statistics():
            result["engine"] = counters
        devices = self._process.machine.devices.items()
        result["disks"] = [{"name": name, **each.counters()} for name, each in devices if isinstance(each, Block)]
        result["nets"] = [{"name": each.name, **each.device.counters()} for each in self._process.networks]
        if (balloon := self._find_balloon()) is not None:
            result["balloon"] = self._balloon_facts(balloon)
        return {**result, **{name: counted() for name, counted in self.sources.items()}}

    def _balloon(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        """Ask the guest to keep so much of its memory; it may take its time, and `stats` says how far it is."""
        balloon = self._find_balloon()
        if balloon is None:
            raise BadRequest("balloon: this guest has none")
        size = self._process.machine.spec.memory_bytes
        wanted = arguments.get("guest_bytes", size)
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 <= wanted <= size:
            raise BadRequest(f"size {wanted!r}: expected 0 to {size} bytes, which is the guest's memory")
        with self._process.lock:
            balloon.set_target(wanted)
        return self._balloon_facts(balloon)

    def _schedule(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        """Change what is given of weight, cap, reserve and pin; say how it is now."""
        if wanted := {name: arguments[name] for name in SHARES if name in arguments}:
            schedule = self._process.shares.schedule.changed(**wanted)
            self._process.schedule(schedule)
            if isinstance(spec := self._facts.get("spec"), dict):
                spec |= {f"cpu_{name}": value for name, value in schedule.model_dump(mode="json").items()}
            self.announce("scheduled", **schedule.model_dump(mode="json"))
        return self._process.shares.facts()

    def _find_balloon(self) -> Balloon | None:
        found = self._process.machine.devices.get("balloon")
        return found if isinstance(found, Balloon) else None

    def _balloon_facts(self, balloon: Balloon) -> Message:
        """What it holds, and what the guest last said of its memory; it is asked to say it anew."""
        with self._process.lock:
            balloon.ask_statistics()
            return {"held_bytes": balloon.actual_bytes, "discarded_bytes": balloon.discarded_bytes,
                    "guest": dict(balloon.statistics)}  # fmt: skip

    def _pause(self, _connection: Connection, _number: object, _arguments: Message) -> Message:
        if not self._process.is_paused:
            self._process.pause()
            self.announce("paused")
        return {}

    def _resume(self, _connection: Connection, _number: object, _arguments: Message) -> Message:
        if self._migration is not None:
            self._migration.take_back()
        if self._process.is_paused:
            self._process.resume()
            self.announce("resumed")
        return {}

    def _power_button(self, _connection: Connection, _number: object, _arguments: Message) -> Message:
        with self._process.lock:
            self._process.machine.board.pm.press_power_button()
        self.announce("power-button")
        return {}

    def _stop(self, connection: Connection, number: object, arguments: Message) -> None:
        grace_s = _number_of(arguments, "grace_s", DEFAULT_GRACE_S, MAX_GRACE_S)
        self._note_verdict(arguments)
        self._resume(connection, number, {})
        if arguments.get("button", True):
            self._power_button(connection, number, {})
        self._grace.arm(time.monotonic_ns() + int(grace_s * 1000) * NS_PER_MS)
        self._waiting.append((connection, number))

    def _kill(self, connection: Connection, number: object, arguments: Message) -> None:
        self._note_verdict(arguments)
        self._waiting.append((connection, number))
        self._kill_now()

    def _note_verdict(self, arguments: Message) -> None:
        if "status" in arguments:
            status = int(_number_of(arguments, "status", 0, MAX_STATUS))
            self.verdict = {"status": status, "reason": str(arguments.get("reason", "command ended"))[:MAX_REASON]}

    def _kill_now(self) -> None:
        self.killed = True
        self._process.quit()

    def _wait(self, connection: Connection, number: object, _arguments: Message) -> None:
        self._waiting = [(each, its) for each, its in self._waiting if each.is_open]
        self._waiting.append((connection, number))

    def _events(self, connection: Connection, _number: object, _arguments: Message) -> Message:
        connection.wants_events = True
        return {}

    def _console(self, connection: Connection, number: object, arguments: Message) -> None:
        backlog = int(_number_of(arguments, "backlog_bytes", 0, LOG_BYTES))
        said = self._hub.backlog(backlog)
        taken, unsent, typed = connection.release({"id": number, "ok": {"backlog_bytes": len(said)}})
        self._hub.attach(taken, first=unsent + said, typed=typed)


def _number_of(arguments: Message, name: str, default: float, limit: float) -> float:
    value = arguments.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= limit:
        raise BadRequest(f"{name} {value!r}: expected a number from 0 to {limit:g}")
    return float(value)


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - read often
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def describe(end: End, *, killed: bool) -> Message:
    """The end of a guest that did not crash, as clients are told it."""
    status = end.code if end.kind is EndKind.DEBUG_EXIT else 0
    reason = "killed" if killed and end.kind is EndKind.QUIT else end.kind.value
    return {"status": status, "reason": reason, "message": ""}

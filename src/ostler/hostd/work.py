"""What jobs do with guests that run: commands, snapshots, copies, moves. Each begins one and returns it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ostler.agent.client import AgentClient
from ostler.client import guests, moving, snapshots
from ostler.control import runtime
from ostler.errors import BadRequest, MigrationCancelled
from ostler.hostd import claims
from ostler.hostd.host import Host
from ostler.hostd.jobs import Job
from ostler.hostd.models import ExecWish, ForkWish, MigrateWish, RestoreWish, SnapshotWish
from ostler.hostd.opening import look
from ostler.hostd.problems import NotFound
from ostler.snapshot import store as snapshot_store

KEPT_OUTPUT_BYTES = 1 << 20
REACH_TIMEOUT_S = 30.0


def begin_exec(host: Host, name: str, wish: ExecWish, by: str) -> Job:
    """Run a command in a guest and keep what it says."""
    guest = host.running(name)

    def work(job: Job) -> dict[str, Any]:
        job.say(f"running {wish.argv[0]}")
        with guests.reach_agent(runtime.find(name), timeout_s=REACH_TIMEOUT_S) as agent:
            return _execute(agent, wish, job)

    return host.begin("exec", guest, by, work, can_cancel=True)


def _execute(agent: AgentClient, wish: ExecWish, job: Job) -> dict[str, Any]:
    with agent.start(wish.argv, env=wish.env, cwd=wish.cwd, user=wish.user, timeout_s=wish.timeout_s) as process:
        job.cancel = process.kill
        job.check()
        kept = _Kept()
        process.exchange(wish.stdin.encode(), kept.take)
        if process.timed_out:
            raise BadRequest(f"command {wish.argv[0]!r}: not ended within {wish.timeout_s:g} s, and killed")
        return {"returncode": process.wait(), **kept.result()}


class _Kept:
    """The first megabyte of each stream."""

    def __init__(self) -> None:
        self._streams: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
        self._truncated = False

    def take(self, stream: int, data: bytes) -> None:
        kept = self._streams[stream]
        room = KEPT_OUTPUT_BYTES - len(kept)
        kept += data[:room]
        self._truncated |= len(data) > room

    def result(self) -> dict[str, Any]:
        stdout, stderr = (bytes(self._streams[each]).decode(errors="replace") for each in (1, 2))
        return {"stdout": stdout, "stderr": stderr, "truncated": self._truncated}


def begin_snapshot(host: Host, name: str, wish: SnapshotWish, by: str) -> Job:
    """Save a guest that runs; it goes on."""
    guest = host.running(name)
    if wish.name in snapshot_store.names() and not wish.replace:
        raise BadRequest(f"snapshot {wish.name!r}: is there already; expected another name, or replace")

    def work(job: Job) -> dict[str, Any]:
        job.say("saving its memory")
        done = snapshots.create(
            runtime.find(name), wish.name, incremental=wish.incremental, freeze=wish.freeze, replace=wish.replace
        )
        return {"snapshot": wish.name, "pause_ms": done.get("pause_ms")}

    return host.begin("snapshot", guest, by, work)


def begin_restore(host: Host, name: str, wish: RestoreWish, by: str) -> Job:
    """Start guests that go on from a snapshot."""
    if name not in snapshot_store.names():
        raise NotFound(f"snapshot {name!r}: not known")
    found = snapshot_store.find(name)
    ports = wish.count == 1
    names = _names(host, wish.name, wish.count, found.manifest.guest)

    def work(job: Job) -> dict[str, Any]:
        made: list[str] = []
        for number, wanted in enumerate(names):
            job.check()
            job.say(f"starting {wanted}", number / len(names))
            guest = snapshots.start(found, wanted, leash=False, remove=False, ports=ports, accel=wish.accel)
            try:
                guest.configure()
            except BaseException:
                guest.end()
                raise
            guest.release()
            made.append(guest.entry.name)
            look(host)
        return {"guests": made}

    asked = [claims.of_copy(each, found.manifest.spec, ports=ports) for each in names]
    return host.begin_making("restore", wish.name, by, work, asked=asked, can_cancel=True)


def begin_fork(host: Host, name: str, wish: ForkWish, by: str) -> Job:
    """Start children of a guest that runs."""
    guest = host.running(name)
    names = _names(host, wish.name, wish.count, name)

    def work(job: Job) -> dict[str, Any]:
        job.say("catching its memory")
        children, pause_ms = snapshots.fork(runtime.find(name), names, remove=False)
        for child in children:
            child.release()
        look(host)
        return {"children": [child.entry.name for child in children], "pause_ms": pause_ms}

    asked = [claims.of_copy(each, guest.spec, ports=False) for each in names]
    return host.begin_making("fork", guest.name, by, work, asked=asked)


def begin_migrate(host: Host, name: str, wish: MigrateWish, by: str) -> Job:
    """Move a guest to where somebody listens for it."""
    from ostler.migration.address import tls_files

    guest = host.running(name)
    tls = tls_files(*(Path(each) if each else None for each in (wish.tls_cert, wish.tls_key, wish.tls_ca)))
    wanted = moving.Wish(
        address=wish.address, tls=tls, insecure=wish.insecure, streams=wish.streams, compression=wish.compression,
        bytes_per_s=wish.bytes_per_s or None, downtime_ms=wish.downtime_ms, name=wish.name, post_copy=wish.post_copy,
    )  # fmt: skip
    wanted.check()

    def work(job: Job) -> dict[str, Any]:
        entry = runtime.find(name)
        job.cancel = lambda: moving.cancel(entry)
        facts = moving.migrate(entry, wanted, told=_progress(job))
        if "error" in facts:
            raise MigrationCancelled(str(facts["error"]))
        return facts

    return host.begin("migrate", guest, by, work, alone=True, can_cancel=True)


def _progress(job: Job) -> Callable[[str, dict[str, Any]], None]:
    most = 0

    def told(_name: str, facts: dict[str, Any]) -> None:
        nonlocal most
        left = int(facts.get("left_bytes", 0))
        most = max(most, left)
        done = 1 - left / most if most else None
        job.say(f"{facts.get('phase')}, round {facts.get('round')}, {left >> 20} MiB left", done)

    return told


def _names(host: Host, name: str | None, count: int, stem: str) -> list[str]:
    """One name for each: numbered where there are several, made up of `stem` where there is none.

    Raises BadRequest for one in use.
    """
    if name is None:
        return [runtime.new_name(stem) for _ in range(count)]
    names = [name] if count == 1 else [f"{name}-{number}" for number in range(1, count + 1)]
    for each in names:
        runtime.check_name(each)
        if each in host.guests:
            raise BadRequest(f"guest {each!r}: is known already; expected another name")
    return names

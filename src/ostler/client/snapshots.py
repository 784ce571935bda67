"""Snapshots of running guests, and guests that go on from them.

A guest that goes on is another one than it was: it gets a name of its own and, from its agent, the hostname that
belongs to it, the time of day, and random bytes of its own. Its connections over vsock are gone, those over the network
as good as gone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from ostler.agent.client import AgentClient
from ostler.client import guests, running
from ostler.client.job import Job
from ostler.client.plan import Plan, as_hostname
from ostler.client.restored import RestoredGuest
from ostler.config import GuestSpec
from ostler.control.runtime import Entry, check_name, new_name
from ostler.errors import OstlerError, StateError
from ostler.snapshot import store
from ostler.snapshot.manifest import Manifest
from ostler.snapshot.store import Snapshot

AGENT_TIMEOUT_S = 60.0
FREEZE_LIMIT_S = 60.0
# What the runtime folder says of one guest and not of those that go on from it.
OWN_FACTS = {"name", "created", "remove", "ports"}


def create(
    entry: Entry, name: str, *, incremental: bool = False, freeze: bool = False, replace: bool = False,
    job: Job | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Save a running guest, which goes on; what the VM process says of it: `pause_ms`, `id`, `parent`.

    With `freeze` its file systems are frozen by its agent meanwhile, so that what is on disk is whole by itself.

    Raises BadRequest for a name that is taken and a guest that cannot be saved, AgentError, HostError.
    """
    with store.workspace(name, replace=replace) as folder, _frozen(entry, wanted=freeze):
        return guests.request(
            entry, "snapshot", timeout_s=None, folder=str(folder), incremental=incremental,
            manifest={"name": name, "frozen": freeze, **described(entry, job)},
        )  # fmt: skip


def described(entry: Entry, job: Job | None = None) -> dict[str, Any]:
    """What a manifest records of a guest beyond its machine."""
    from importlib.metadata import version

    facts = {key: value for key, value in entry.facts.items() if key not in OWN_FACTS}
    return {"ostler": version("ostler"), "facts": facts, "job": asdict(job) if job else {}}


@contextlib.contextmanager
def _frozen(entry: Entry, *, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with AgentClient.connect(entry.vsock_socket, timeout_s=AGENT_TIMEOUT_S, alive=entry.is_running) as agent:
        agent.freeze(limit_s=FREEZE_LIMIT_S)
        try:
            yield
        finally:
            agent.thaw()


def plan(
    snapshot: Snapshot, name: str | None = None, *, ports: bool = True, accel: str | None = None
) -> tuple[Plan, dict[str, Any]]:
    """How to start a guest that goes on from a snapshot, and its origin. Raises StateError, BadRequest.

    Without `ports` none of the host's lead to it, as two guests cannot have the same.
    """
    found = snapshot.manifest
    changes: dict[str, Any] = {"cpu": found.model}
    if not ports:
        changes["ports"] = ()
    if accel is not None:
        changes["accel"] = accel
    try:
        spec = GuestSpec.model_validate({**found.spec, **changes})
        job = Job(**{**_NO_JOB, **found.job})
    except (ValueError, TypeError) as error:
        raise StateError(f"snapshot {snapshot.name!r}: its specification: {_first_line(error)}") from error
    chosen = check_name(name) if name else new_name(found.guest)
    facts = {**found.facts, "origin": snapshot.name, "durable": False, "ports": [str(port) for port in spec.ports]}
    made = Plan(
        name=chosen, spec=spec, job=job, boot="agent", is_service=False, is_durable=False, facts=facts,
        settings={"hostname": as_hostname(chosen)},
    )  # fmt: skip
    # A fork's is gone with the parent, so that nobody need prepare for more of the same.
    once = {"once": True} if PurePath(found.memory).is_absolute() else {}
    return made, {"snapshot": str(snapshot.folder), **once}


_NO_JOB: dict[str, Any] = {"argv": (), "env": {}, "cwd": None, "user": None}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def restore(
    name: str, guest_name: str | None = None, *, leash: bool = False, remove: bool = True, ports: bool = True,
    accel: str | None = None,
) -> RestoredGuest:  # fmt: skip
    """Start a guest that goes on from a snapshot; it runs when this returns.

    Raises BadRequest, StateError, HostError.
    """
    return start(store.find(name), guest_name, leash=leash, remove=remove, ports=ports, accel=accel)


def start(
    snapshot: Snapshot, guest_name: str | None = None, *, leash: bool, remove: bool, ports: bool,
    accel: str | None = None,
) -> RestoredGuest:  # fmt: skip
    """The same of a snapshot that was found."""
    made, origin = plan(snapshot, guest_name, ports=ports, accel=accel)
    launched = running.launch_plan(made, leash=leash, remove=remove, origin=origin)
    return running.hold(launched, lambda: RestoredGuest(launched, made))


def fork(
    entry: Entry, names: Sequence[str | None], *, leash: bool = False, remove: bool = True, job: Job | None = None,
    begun: Callable[[RestoredGuest], None] | None = None,
) -> tuple[list[RestoredGuest], float]:  # fmt: skip
    """Children of a running guest, one for each name, and for how many milliseconds the parent stood still.

    Each runs and is configured when this returns. Either all begin or none does. Raises BadRequest, HostError.
    """
    from ostler.client.forks import fork as made

    return made(entry, names, leash=leash, remove=remove, job=job, begun=begun)


def summary(snapshot: Snapshot) -> dict[str, Any]:
    """What `ostler snapshot ls` shows of one."""
    found = snapshot.manifest
    return {
        "name": snapshot.name, "guest": found.guest, "image": found.facts.get("image"), "created": found.created,
        "memory_bytes": found.memory_bytes, "disk_bytes": snapshot.disk_bytes, "parent": found.parent,
        "frozen": found.frozen, "model": found.model,
    }  # fmt: skip


def summaries() -> list[dict[str, Any]]:
    """Of all; one that cannot be read says why."""
    found: list[dict[str, Any]] = []
    for name in store.names():
        try:
            found.append(summary(store.find(name)))
        except OstlerError as error:
            found.append({"name": name, "error": str(error)})
    return found


def details(manifest: Manifest) -> Mapping[str, Any]:
    """All that is recorded, without the checksums."""
    known: dict[str, Any] = json.loads(manifest.model_dump_json(exclude={"files"}))
    known["files"] = {name: facts.size_bytes for name, facts in manifest.files.items()}
    return known


__all__ = ["RestoredGuest", "create", "fork", "restore", "start", "summaries"]

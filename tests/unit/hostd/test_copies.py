"""Forks and restored guests are admitted as others are, while they are being made too."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ostler.client import snapshots
from ostler.control import runtime
from ostler.control.runtime import Entry
from ostler.errors import AdmissionRefused
from ostler.hostd import claims, work
from ostler.hostd.host import Host
from ostler.hostd.jobs import Job
from ostler.hostd.models import ForkWish, GuestState, JobState, RestoreWish
from ostler.snapshot import store
from tests.unit.hostd.fakes import GIB, TIMEOUT_S, FakeLauncher, Life, bring_up, opened

SPEC: dict[str, Any] = {
    "memory": GIB, "cpu_reserve": 25.0, "ports": [{"host": 80, "protocol": "tcp"}],
    "nets": [{"kind": "bridge", "interface": "br0", "ip": "10.0.0.2/24"}, {"kind": "passt", "ip": "10.0.0.3/24"}],
}  # fmt: skip


class Copies:
    """What `ostler.client.snapshots` makes, without processes."""

    def __init__(self, launcher: FakeLauncher) -> None:
        self._launcher = launcher
        self.gate = threading.Event()
        self.gate.set()

    def fork(self, _entry: Entry, names: Sequence[str], **_options: object) -> tuple[list[Any], float]:
        assert self.gate.wait(TIMEOUT_S)
        return [self._made(name) for name in names], 1.0

    def start(self, _found: object, name: str, **_options: object) -> Any:
        assert self.gate.wait(TIMEOUT_S)
        return self._made(name)

    def _made(self, name: str) -> Any:
        self._launcher.lives[name] = Life({"created": 1.0})
        nothing = contextlib.nullcontext
        return SimpleNamespace(entry=SimpleNamespace(name=name), release=nothing, configure=nothing, end=nothing)


@pytest.fixture
def launcher() -> FakeLauncher:
    return FakeLauncher()


@pytest.fixture
def copies(launcher: FakeLauncher, monkeypatch: pytest.MonkeyPatch) -> Copies:
    made = Copies(launcher)
    monkeypatch.setattr(snapshots, "fork", made.fork)
    monkeypatch.setattr(snapshots, "start", made.start)
    monkeypatch.setattr(runtime, "find", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr(store, "names", lambda: ["saved"])
    spec = {"memory": 3 * GIB, "ports": SPEC["ports"]}
    monkeypatch.setattr(store, "find", lambda _name: SimpleNamespace(manifest=SimpleNamespace(spec=spec, guest="db")))
    return made


@pytest.fixture
def host(tmp_path: Path, launcher: FakeLauncher) -> Iterator[Host]:
    with opened(tmp_path, launcher) as found:
        bring_up(found, "db")
        yield found


def done(host: Host, job: Job) -> dict[str, Any]:
    view = host.jobs.wait(job.id, TIMEOUT_S)
    assert view is not None
    assert view.state is JobState.DONE
    assert view.result is not None
    return view.result


def test_fork_more_than_there_is_memory_for_is_refused_as_a_whole(host: Host, copies: Copies) -> None:
    assert copies.gate.is_set()
    with pytest.raises(AdmissionRefused, match="'c-7': memory: asked 1088 MiB, 576 MiB left of 8192 MiB"):
        work.begin_fork(host, "db", ForkWish(name="c", count=7), "test")

    assert [*host.guests] == ["db"]
    assert host.resources()["memory"].promised == GIB + claims.PROCESS_BYTES


def test_fork_holds_what_its_children_will_while_they_are_made(host: Host, copies: Copies) -> None:
    copies.gate.clear()
    job = work.begin_fork(host, "db", ForkWish(name="c", count=6), "test")

    with pytest.raises(AdmissionRefused, match="memory"):
        work.begin_fork(host, "db", ForkWish(), "test")
    assert host.resources()["memory"].promised == 7 * (GIB + claims.PROCESS_BYTES)
    copies.gate.set()
    found = done(host, job)

    assert found["children"] == [f"c-{number}" for number in range(1, 7)]
    # They are known when the job is done, and counted once.
    assert all(host.guests[name].state is GuestState.RUNNING for name in found["children"])
    assert host.resources()["memory"].promised == 7 * (GIB + claims.PROCESS_BYTES)


def test_fork_that_failed_holds_nothing(host: Host, copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise OSError("no")

    assert copies.gate.is_set()
    monkeypatch.setattr(snapshots, "fork", fail)
    job = work.begin_fork(host, "db", ForkWish(count=6), "test")
    host.jobs.wait(job.id, TIMEOUT_S)

    assert host.resources()["memory"].promised == GIB + claims.PROCESS_BYTES


def test_restore_is_admitted_with_its_ports_only_where_it_is_one(host: Host, copies: Copies) -> None:
    assert copies.gate.is_set()
    done(host, work.begin_restore(host, "saved", RestoreWish(name="one"), "test"))
    host.guests["one"].spec = {"memory": 3 * GIB, "ports": SPEC["ports"]}

    with pytest.raises(AdmissionRefused, match="'two': port tcp/80: is 'one''s already"):
        work.begin_restore(host, "saved", RestoreWish(name="two"), "test")
    with pytest.raises(AdmissionRefused, match="'two-2': memory: asked 3136 MiB"):
        work.begin_restore(host, "saved", RestoreWish(name="two", count=2), "test")
    host.limits["memory"] = 64 * GIB
    found = done(host, work.begin_restore(host, "saved", RestoreWish(count=2), "test"))

    assert [name.startswith("db-") for name in found["guests"]] == [True, True]


def test_claim_of_a_copy_is_what_it_goes_on_with() -> None:
    claim = claims.of_copy("c", SPEC, ports=True)

    assert claim.quantities == {"memory": GIB + claims.PROCESS_BYTES, "cpu": 250}
    assert claim.exclusives == {"port tcp/80", "address 10.0.0.2"}
    assert claims.of_copy("c", SPEC, ports=False).exclusives == {"address 10.0.0.2"}

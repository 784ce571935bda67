"""Guests brought up in order and down in reverse, restarted, called off."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ostler.errors import AdmissionRefused, BadRequest
from ostler.hostd import starting, stopping
from ostler.hostd.host import Host
from ostler.hostd.models import GuestState, JobState
from tests.unit.hostd.fakes import FakeLauncher, bring_up, guest, opened, until

CRASHED = {"status": 3, "reason": "TripleFault", "message": "a triple fault"}


def state(host: Host, name: str) -> GuestState:
    return host.guests[name].state


def is_up(host: Host, *names: str) -> Callable[[], bool]:
    return lambda: all(host.guests[name].is_ready for name in names)


@pytest.fixture
def launcher() -> FakeLauncher:
    return FakeLauncher()


def test_begin_start_dependencies_are_ready_first(tmp_path: Path, launcher: FakeLauncher) -> None:
    launcher.gates["db"] = threading.Event()
    with opened(tmp_path, launcher) as host:
        host.define([guest("db"), guest("web", depends_on=["db"])], replace=False)

        job = starting.begin_start(host, "web", "test")
        until(host, lambda: ("start", "db") in launcher.log)
        assert state(host, "web") is GuestState.WAITING
        launcher.gates["db"].set()
        until(host, is_up(host, "web"))

        assert launcher.log == [("start", "db"), ("ready", "db"), ("start", "web"), ("ready", "web")]
        assert job is not None
        done = host.jobs.wait(job.id, 10)
        assert done is not None
        assert done.state is JobState.DONE


def test_begin_all_independent_guests_start_at_once(tmp_path: Path, launcher: FakeLauncher) -> None:
    for name in ("a", "b"):
        launcher.gates[name] = threading.Event()
    with opened(tmp_path, launcher) as host:
        host.define([guest("a"), guest("b")], replace=False)
        starting.begin_all(host, ["a", "b"], "test")

        # Neither is ready, and both were begun.
        until(host, lambda: sorted(launcher.names("start")) == ["a", "b"])
        for gate in launcher.gates.values():
            gate.set()
        until(host, is_up(host, "a", "b"))


def test_begin_start_failed_dependency_fails_who_waits(tmp_path: Path, launcher: FakeLauncher) -> None:
    launcher.broken.add("db")
    with opened(tmp_path, launcher) as host:
        host.define([guest("db"), guest("web", depends_on=["db"])], replace=False)
        job = starting.begin_start(host, "web", "test")
        assert job is not None
        done = host.jobs.wait(job.id, 10)

        assert done is not None
        assert done.state is JobState.FAILED
        assert done.message == "guest 'web': 'db', which it depends on, is failed"
        assert state(host, "web") is GuestState.FAILED
        assert host.guests["db"].reason == "guest 'db': is broken"
        assert launcher.names("start") == ["db"]


def test_begin_stop_users_end_first(tmp_path: Path, launcher: FakeLauncher) -> None:
    with opened(tmp_path, launcher) as host:
        host.define([guest("db"), guest("cache", depends_on=["db"]), guest("web", depends_on=["cache"])], replace=False)
        starting.begin_start(host, "web", "test")
        until(host, is_up(host, "web"))

        job = stopping.begin_stop(host, "db", "test")
        host.jobs.wait(job.id, 10)

        assert launcher.names("stop") == ["web", "cache", "db"]
        assert {state(host, name) for name in ("db", "cache", "web")} == {GuestState.ENDED}


def test_begin_stop_start_that_waits_is_called_off(tmp_path: Path, launcher: FakeLauncher) -> None:
    launcher.gates["db"] = threading.Event()
    with opened(tmp_path, launcher) as host:
        host.define([guest("db")], replace=False)
        begun = starting.begin_start(host, "db", "test")
        until(host, lambda: state(host, "db") is GuestState.STARTING and bool(launcher.names("start")))

        ending = stopping.begin_stop(host, "db", "test")
        host.jobs.wait(ending.id, 10)

        assert begun is not None
        ended = host.jobs.wait(begun.id, 10)
        assert ended is not None
        assert ended.state is JobState.CANCELLED
        assert state(host, "db") is GuestState.ENDED
        assert not launcher.found()["db"].is_running


def test_over_crash_is_restarted_with_back_off(tmp_path: Path, launcher: FakeLauncher) -> None:
    delays: list[float] = []
    pending: list[Callable[[], None]] = []

    def later(delay_s: float, call: Callable[[], None]) -> None:
        delays.append(delay_s)
        pending.append(call)

    with opened(tmp_path, launcher, later=later) as host:
        wish = {"policy": "on-failure", "delay_s": 2, "limit": 2}
        host.define([guest("db", restart=wish)], replace=False)
        starting.begin_start(host, "db", "test")
        for _ in range(2):
            until(host, is_up(host, "db"))
            launcher.lives["db"].finish(CRASHED)
            until(host, lambda: bool(pending))
            assert state(host, "db") is GuestState.BACKING_OFF
            pending.pop()()
        until(host, is_up(host, "db"))
        launcher.lives["db"].finish(CRASHED)
        until(host, lambda: state(host, "db") is GuestState.FAILED)

        assert delays == [2, 4]
        assert host.guests["db"].reason == "given up after 2 restarts in a row"


def test_over_guest_that_was_stopped_stays_so(tmp_path: Path, launcher: FakeLauncher) -> None:
    with opened(tmp_path, launcher) as host:
        host.define([guest("db", restart={"policy": "always"})], replace=False)
        starting.begin_start(host, "db", "test")
        until(host, is_up(host, "db"))
        stopping.kill(host, "db")

        assert state(host, "db") is GuestState.ENDED
        assert launcher.names("start") == ["db"]


def test_begin_restart_ends_and_starts(tmp_path: Path, launcher: FakeLauncher) -> None:
    with opened(tmp_path, launcher) as host:
        bring_up(host, "db")
        job = stopping.begin_restart(host, "db", "test")
        done = host.jobs.wait(job.id, 10)

        assert done is not None
        assert done.state is JobState.DONE
        assert launcher.names("start") == ["db", "db"]
        assert state(host, "db") is GuestState.RUNNING


def test_define_more_than_there_is_is_refused_and_keeps_nothing(tmp_path: Path, launcher: FakeLauncher) -> None:
    with opened(tmp_path, launcher) as host:
        host.define([guest("db", memory="6G", autostart=True)], replace=False)
        with pytest.raises(AdmissionRefused, match="guest 'web': memory: asked 4160 MiB, 1984 MiB left of 8192 MiB"):
            host.define([guest("web", memory="4G", autostart=True)], replace=False)

        assert list(host.store.definitions()) == ["db"]


def test_begin_start_beside_what_autostart_is_promised_is_refused(tmp_path: Path, launcher: FakeLauncher) -> None:
    with opened(tmp_path, launcher) as host:
        host.define([guest("db", memory="6G", autostart=True), guest("web", memory="4G")], replace=False)

        with pytest.raises(AdmissionRefused, match="memory"):
            starting.begin_start(host, "web", "test")
        assert launcher.log == []


@pytest.mark.parametrize(
    ("definitions", "said"),
    [
        ([guest("a", depends_on=["b"]), guest("b", depends_on=["a"])], "a cycle"),
        ([guest("a", depends_on=["nobody"])], "which is not defined"),
    ],
)
def test_define_impossible_graph_is_refused(
    tmp_path: Path, launcher: FakeLauncher, definitions: list[object], said: str
) -> None:
    with opened(tmp_path, launcher) as host:
        with pytest.raises(BadRequest, match=said):
            host.define(definitions, replace=False)  # type: ignore[arg-type]
        assert host.guests == {}


def test_undefine_guest_others_need_is_refused(tmp_path: Path, launcher: FakeLauncher) -> None:
    with opened(tmp_path, launcher) as host:
        host.define([guest("db"), guest("web", depends_on=["db"])], replace=False)
        with pytest.raises(BadRequest, match="'web' depends on it"):
            host.undefine(host.find("db"))
        host.undefine(host.find("web"))
        host.undefine(host.find("db"))

        assert host.guests == {}

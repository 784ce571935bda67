"""What a service finds that begins after another one."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from pathlib import Path

import pytest

from ostler.errors import BadRequest
from ostler.hostd import starting, stopping
from ostler.hostd.models import GuestState, JobState
from ostler.hostd.opening import look
from tests.unit.hostd.fakes import FakeLauncher, Life, bring_up, guest, opened, until


def test_open_after_crash_adopts_what_runs_and_settles_jobs(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    launcher.gates["slow"] = threading.Event()
    with opened(tmp_path, launcher, crash=True) as host:
        host.define([guest("db"), guest("slow")], replace=False)
        starting.begin_start(host, "db", "test")
        until(host, lambda: host.guests["db"].is_ready)
        job = starting.begin_start(host, "slow", "test")
        until(host, lambda: ("start", "slow") in launcher.log)
        until(host, lambda: host.guests["slow"].state is GuestState.STARTING)
    assert job is not None
    launcher.gates["slow"].set()

    with opened(tmp_path, launcher) as host:
        assert host.guests["db"].state is GuestState.RUNNING
        assert host.guests["db"].is_ready
        # Its machine runs already: it is made ready, not started again.
        until(host, lambda: host.guests["slow"].is_ready)
        assert launcher.names("start") == ["db", "slow"]
        settled = host.jobs.get(job.id)
        assert settled is not None
        assert settled.state is JobState.INTERRUPTED
        assert "its start is being completed" in settled.message


def test_open_guest_that_ended_meanwhile_follows_its_policy(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    with opened(tmp_path, launcher, crash=True) as host:
        host.define([guest("db", restart={"policy": "on-failure", "delay_s": 0}), guest("once")], replace=False)
        starting.begin_all(host, ["db", "once"], "test")
        until(host, lambda: host.guests["db"].is_ready and host.guests["once"].is_ready)
    launcher.lives["db"].finish({"status": 3, "reason": "GuestPanic", "message": "panic"})
    launcher.lives["once"].finish({"status": 0, "reason": "power-off", "message": ""})

    with opened(tmp_path, launcher) as host:
        until(host, lambda: host.guests["db"].is_ready)
        assert launcher.names("start").count("db") == 2
        assert host.guests["once"].state is GuestState.ENDED


def test_open_starts_autostart_in_order_and_only_after_a_boot(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    with opened(tmp_path, launcher) as host:
        host.define([guest("db", autostart=True), guest("web", autostart=True, depends_on=["db"])], replace=False)
    with opened(tmp_path, launcher, boot_id="boot-2") as host:
        until(host, lambda: host.guests["web"].is_ready)
        assert launcher.names("start") == ["db", "web"]
        job = stopping.begin_stop(host, "web", "test")
        host.jobs.wait(job.id, 10)
    with opened(tmp_path, launcher, boot_id="boot-2") as host:
        # Who stopped it wanted it stopped, and a restart of the service changes nothing.
        assert host.guests["web"].state is GuestState.ENDED
    launcher.lives.clear()
    with opened(tmp_path, launcher, boot_id="boot-3") as host:
        until(host, lambda: host.guests["web"].is_ready)


def test_open_stop_that_had_its_effect_is_done(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    with opened(tmp_path, launcher, crash=True) as host:
        bring_up(host, "db")
        stuck = threading.Event()
        launcher.hang = stuck
        job = stopping.begin_stop(host, "db", "test")
        until(host, lambda: host.guests["db"].state is GuestState.STOPPING)
    launcher.lives["db"].finish({"status": 0, "reason": "power-off", "message": ""})

    with opened(tmp_path, launcher) as host:
        settled = host.jobs.get(job.id)
        assert settled is not None
        assert settled.state is JobState.DONE
        stuck.set()


def test_open_bad_definition_is_told_as_broken_and_keeps_nobody_else(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    with opened(tmp_path, launcher) as host:
        host.define([guest("db"), guest("web", autostart=True), guest("user", depends_on=["db"])], replace=False)
        host.store.put_definitions({"db": {"image": "debian", "memory": "plenty"}})
    with opened(tmp_path, launcher, boot_id="boot-2") as host:
        until(host, lambda: host.guests["web"].is_ready)
        view = host.guests["db"].view()
        assert (view.state, view.defined) == (GuestState.BROKEN, True)
        assert view.reason is not None
        assert "memory 'plenty'" in view.reason
        told = [each.data for each in host.events.since(0) if each.kind == "definition"]
        assert told == [{"name": "db", "what": "broken", "reason": view.reason}]
        with pytest.raises(BadRequest, match="'db': its definition is broken: memory 'plenty'"):
            starting.begin_start(host, "user", "test")
        # Everything that looks at all of them goes on.
        assert stopping.begin_stop_all(host, "test")

        host.define([guest("db")], replace=True)
        assert host.guests["db"].view().state is GuestState.DEFINED
        starting.begin_start(host, "user", "test")
        until(host, lambda: host.guests["user"].is_ready)


def test_open_broken_definition_of_a_guest_that_runs_leaves_it_running(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    with opened(tmp_path, launcher, crash=True) as host:
        bring_up(host, "db")
        host.store.put_definitions({"db": {"imagge": "debian"}})
    with opened(tmp_path, launcher) as host:
        assert host.guests["db"].view().state is GuestState.RUNNING
        host.jobs.wait(stopping.begin_stop(host, "db", "test").id, 20)
        assert host.guests["db"].view().state is GuestState.BROKEN
        host.undefine(host.guests["db"])
        assert host.store.definitions() == {}


@pytest.mark.parametrize("content", ['{"id": 7}', "not JSON", "null"])
def test_open_unreadable_job_is_told_as_interrupted_and_keeps_nothing_else(tmp_path: Path, content: str) -> None:
    launcher = FakeLauncher()
    launcher.gates["slow"] = threading.Event()
    with opened(tmp_path, launcher, crash=True) as host:
        host.define([guest("slow")], replace=False)
        job = starting.begin_start(host, "slow", "test")
        until(host, lambda: host.guests["slow"].state is GuestState.STARTING)
    assert job is not None
    launcher.gates["slow"].set()
    _overwrite(tmp_path, "UPDATE jobs SET content = ?", content)

    with opened(tmp_path, launcher) as host:
        settled = host.jobs.get(job.id)
        assert settled is not None
        assert (settled.id, settled.kind, settled.guest, settled.state) == (
            job.id,
            "start",
            "slow",
            JobState.INTERRUPTED,
        )
        assert [each.id for each in host.jobs.listed(guest="slow", state=JobState.INTERRUPTED, limit=9)] == [job.id]


def test_open_what_is_not_json_is_a_broken_definition(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    with opened(tmp_path, launcher) as host:
        host.define([guest("db")], replace=False)
        bring_up(host, "web")
    _overwrite(tmp_path, "UPDATE definitions SET content = ? WHERE name = 'db'", "{")
    _overwrite(tmp_path, "UPDATE guests SET ending = ?", "{")

    with opened(tmp_path, launcher) as host:
        assert host.guests["db"].view().state is GuestState.BROKEN
        assert host.guests["web"].view().state is not GuestState.BROKEN


def _overwrite(folder: Path, statement: str, value: str) -> None:
    with contextlib.closing(sqlite3.connect(folder / "host.db")) as raw, raw:
        assert raw.execute(statement, (value,)).rowcount


def test_look_strangers_come_and_go(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    with opened(tmp_path, launcher) as host:
        launcher.lives["stranger"] = Life({"image": "debian", "created": 1.0})
        look(host)
        assert host.guests["stranger"].view().state is GuestState.RUNNING
        assert not host.guests["stranger"].view().defined
        launcher.lives.pop("stranger").finish({"status": 0, "reason": "killed"})
        look(host)

        assert "stranger" not in host.guests


def test_open_events_go_on_counting(tmp_path: Path) -> None:
    launcher = FakeLauncher()
    with opened(tmp_path, launcher, crash=True) as host:
        host.define([guest("db")], replace=False)
        last = host.events.last
    with opened(tmp_path, launcher) as host:
        assert host.events.last > last

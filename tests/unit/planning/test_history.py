"""Samples on disk: kept, bounded, read by others; a damaged file is set aside."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ostler.errors import BadRequest, HostError
from ostler.planning import history, records
from ostler.planning.history import HOST, History, Sample, read


def sample(time_s: float, guest: str = "web", cpus: float = 0.5) -> Sample:
    return Sample(time_s, guest, 60.0, cpus, 512 << 20, 100 << 20, 1.0, 2.0, 125_000.0, 0.0, vcpus=1)


def test_history_samples_come_back_in_order_and_by_guest(tmp_path: Path) -> None:
    now = time.time()
    with History(tmp_path / "deep" / "usage.sqlite") as kept:
        kept.add([sample(now), sample(now - 60, "db")])

        path = tmp_path / "deep" / "usage.sqlite"
        assert [each.guest for each in read(path)] == ["db", "web"]
        assert read(path, since_s=now - 1) == [sample(now)]
        assert [each.time_s for each in read(path, guest="db")] == [now - 60]
        assert read(path, since_s=now) == []
        assert [each.guest for each in read(path, until_s=now - 60)] == ["db"]
        assert [each.guest for each in read(path, limit=1)] == ["db"]


def test_history_is_bounded_by_age_and_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_TIDY_EVERY", 0)
    now = time.time()
    with History(tmp_path / "usage", max_rows=3, kept_s=1000) as kept:
        kept.add([sample(now - 2000)])
        assert read(tmp_path / "usage") == []
        kept.add([sample(now - age) for age in (5, 4, 3, 2, 1)])
        kept.add([sample(now)])

    assert [each.time_s for each in read(tmp_path / "usage")] == [now - 2, now - 1, now]


def test_history_file_that_is_no_database_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "usage"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(HostError):
        read(path)

    with History(path) as kept:
        kept.add([sample(1e9 + time.time())])

    assert len(read(path)) == 1
    assert path.with_name("usage.damaged").exists()


def test_history_of_the_version_before_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "usage"
    with History(path) as kept:
        kept.add([sample(time.time())])
    with contextlib.closing(sqlite3.connect(path)) as old:
        for column in ("run_cpus", "wait_cpus"):
            old.execute(f"ALTER TABLE samples DROP COLUMN {column}")
        old.execute("PRAGMA user_version=1")
        old.commit()

    with History(path) as kept:
        kept.add([replace(sample(time.time()), run_cpus=0.25)])

    assert [each.run_cpus for each in read(path)] == [0.0, 0.25]


def test_history_of_a_version_to_come_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "usage"
    with contextlib.closing(sqlite3.connect(path)) as new:
        new.execute("PRAGMA user_version=99")

    with pytest.raises(HostError, match="version 99 of another Ostler, expected 2"):
        History(path)


def test_read_nothing_kept_yet_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path / "none") == []


def test_records_become_an_estate_of_this_host(tmp_path: Path) -> None:
    path = tmp_path / "usage"
    with pytest.raises(BadRequest, match="no samples"):
        records.from_history(path)
    with History(path) as kept:
        kept.add([sample(time.time(), guest=HOST)])
        with pytest.raises(BadRequest, match="no samples"):
            records.from_history(path)
        kept.add([sample(time.time() - age, cpus=age) for age in (1, 2, 3)])

    _, estate = records.from_history(path)

    (guest,) = estate.guests
    assert guest.cpu_samples == (3, 2, 1)
    assert guest.host == estate.hosts[0].name
    assert (guest.memory, guest.memory_used, guest.network_mbit_s) == (512 << 20, 100 << 20, 1.0)


def test_records_many_samples_are_thinned_and_keep_their_peak() -> None:
    samples = [sample(at, cpus=9.0 if at == 5_555 else 0.1) for at in range(10_000)]

    (guest,) = records.this_host(samples)["guests"]

    assert len(guest["cpu_samples"]) <= records.MAX_CPU_SAMPLES
    assert max(guest["cpu_samples"]) == 9.0

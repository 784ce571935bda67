"""Rates between two looks at guests' counters."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from ostler.client.sampling import Recorder, Sampler
from ostler.planning import history


def stats(seconds: float, cpu_s: float, read: int = 0, received: int = 0) -> dict[str, Any]:
    return {
        "uptime_ns": round(seconds * 1e9),
        "cpu_time_ns": round(cpu_s * 1e9),
        "vcpus": [{"id": 0}, {"id": 1}],
        "memory": {"size_bytes": 1000, "process_rss_bytes": 300},
        "disks": [{"read_bytes": read, "written_bytes": 2 * read}, {"read_bytes": read}],
        "nets": [{"received_bytes": received}],
    }


def test_look_twice_gives_rates_of_guests_that_were_there_both_times() -> None:
    looks = [{"web": stats(10, 1), "gone": stats(1, 1)}, {"web": stats(20, 6, 500, 100), "new": stats(1, 1)}]
    sampler = Sampler(lambda: looks.pop(0), clock=lambda: 42.0)

    assert sampler.look() == []
    (sample,) = sampler.look()

    assert (sample.guest, sample.time_s, sample.interval_s, sample.cpus, sample.vcpus) == ("web", 42.0, 10.0, 0.5, 2)
    assert (sample.read_bytes_per_s, sample.written_bytes_per_s, sample.received_bytes_per_s) == (100, 100, 10)
    assert (sample.memory_bytes, sample.resident_bytes) == (1000, 300)


def test_look_guest_that_began_anew_gives_no_sample() -> None:
    looks = [{"web": stats(100, 50, 10)}, {"web": stats(5, 1, 0)}, {"web": stats(6, 1.25, 0)}]
    sampler = Sampler(lambda: looks.pop(0), clock=lambda: 42.0)

    assert sampler.look() == []
    assert sampler.look() == []
    assert [each.cpus for each in sampler.look()] == [0.25]


def test_look_counters_that_ran_backwards_give_no_sample() -> None:
    looks = [{"web": stats(1, 1, 10)}, {"web": stats(2, 2, 5)}]
    sampler = Sampler(lambda: looks.pop(0))

    sampler.look()

    assert sampler.look() == []


def test_recorder_keeps_samples_until_it_is_closed(tmp_path: Path) -> None:
    looked, looks = threading.Event(), [{"web": stats(at, at / 2)} for at in range(1, 20)]

    def read() -> dict[str, Any]:
        if len(looks) < 17:
            looked.set()
        return looks.pop(0) if len(looks) > 1 else looks[0]

    with Recorder(tmp_path / "usage", Sampler(read), every_s=0.001):
        assert looked.wait(60)

    assert {each.guest for each in history.read(tmp_path / "usage")} == {"web"}


def test_recorder_that_cannot_write_goes_on(tmp_path: Path) -> None:
    looks = [{"web": stats(at, at / 2)} for at in (1, 2, 3)]
    recorder = Recorder(tmp_path / "usage", Sampler(lambda: looks.pop(0)))
    recorder._history.close()

    recorder.keep()
    recorder.keep()

    assert len(looks) == 1

"""Rates between two looks at guests' counters."""

from __future__ import annotations

from typing import Any

from ostler.client.sampling import Sampler


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

"""Rates between two looks at counters, and keeping them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ostler.hostd import sampling
from ostler.hostd.models import GuestStats, HostStats, StatsSample
from ostler.hostd.sampling import Recorder, between
from ostler.planning import history
from ostler.planning.history import HOST, Sample

SECOND_NS = 1_000_000_000


def guest(uptime_s: float, cpu_s: float, read: int = 0, name: str = "web") -> GuestStats:
    return GuestStats(
        name=name, time=1000 + uptime_s, uptime_s=uptime_s, cpu_time_ns=round(cpu_s * SECOND_NS),
        vcpu_time_ns=[round(cpu_s / 4 * SECOND_NS)] * 2, vcpu_wait_ns=[round(cpu_s / 8 * SECOND_NS), 0],
        memory_bytes=1000, memory_touched_bytes=500, memory_resident_bytes=300, disk_read_bytes=read,
        disk_written_bytes=2 * read, net_received_bytes=3 * read, net_sent_bytes=4 * read,
    )  # fmt: skip


def look(at: float, *guests: GuestStats, busy_s: float = 0, sent: int = 0) -> StatsSample:
    host = HostStats(
        time=at, cpus=2, cpu_busy_ns=round(busy_s * SECOND_NS), cpu_idle_ns=0, cpu_steal_ns=0, memory_bytes=8000,
        memory_available_bytes=6000, disk_read_bytes=0, disk_written_bytes=0, net_received_bytes=0, net_sent_bytes=sent,
    )  # fmt: skip
    return StatsSample(host=host, guests=[*guests])


def guests_of(earlier: StatsSample, later: StatsSample) -> list[Sample]:
    return [each for each in between(earlier, later) if each.guest != HOST]


def test_between_gives_rates_of_guests_that_were_there_both_times() -> None:
    earlier = look(0, guest(10, 1), guest(5, 5, name="gone"))
    (found,) = guests_of(earlier, look(60, guest(20, 6, 500), guest(1, 1, name="new")))

    assert (found.guest, found.time_s, found.interval_s, found.vcpus) == ("web", 1020, 10, 2)
    assert (found.cpus, found.run_cpus, found.wait_cpus) == (0.5, 0.25, 0.0625)
    assert (found.read_bytes_per_s, found.written_bytes_per_s) == (50, 100)
    assert (found.received_bytes_per_s, found.sent_bytes_per_s) == (150, 200)
    assert (found.memory_bytes, found.resident_bytes) == (1000, 300)


@pytest.mark.parametrize("later", [guest(5, 1), guest(10, 12), guest(20, 9), guest(20, 12, 4)])
def test_between_guest_that_began_anew_gives_no_sample(later: GuestStats) -> None:
    assert guests_of(look(0, guest(10, 10, 5)), look(60, later)) == []


def test_between_gives_the_host_too_and_no_rate_of_it_below_nothing() -> None:
    (found,) = between(look(10, busy_s=5, sent=100), look(70, busy_s=65, sent=40))

    assert (found.guest, found.interval_s, found.cpus, found.vcpus) == (HOST, 60, 1.0, 2)
    assert (found.memory_bytes, found.resident_bytes, found.sent_bytes_per_s) == (8000, 2000, 0)
    assert [*between(look(10), look(10))] == []


def test_row_has_amounts_and_no_name_for_the_host() -> None:
    host, web = between(look(0, guest(10, 1)), look(60, guest(20, 6, 500), busy_s=30))

    assert sampling.row(host).guest is None
    assert sampling.row(host).cpu_time_ns == 30 * SECOND_NS
    row = sampling.row(web)
    assert (row.guest, row.cpu_time_ns, row.run_ns, row.wait_ns) == (
        "web", 5 * SECOND_NS, SECOND_NS * 5 // 2, SECOND_NS * 5 // 8,
    )  # fmt: skip
    assert (row.disk_read_bytes, row.disk_written_bytes, row.disk_bytes, row.net_bytes) == (500, 1000, 1500, 3500)


def test_recorder_keeps_samples_until_it_is_closed(tmp_path: Path) -> None:
    looked, looks = threading.Event(), [look(at, guest(at, at / 2)) for at in range(1, 20)]

    def read() -> StatsSample:
        if len(looks) < 17:
            looked.set()
        return looks.pop(0) if len(looks) > 1 else looks[0]

    with Recorder(tmp_path / "usage", read, every_s=0.001):
        assert looked.wait(60)

    assert {each.guest for each in history.read(tmp_path / "usage")} == {"web", HOST}


def test_recorder_that_cannot_write_goes_on(tmp_path: Path) -> None:
    looks = [look(at, guest(at, at / 2)) for at in (1, 2, 3)]
    recorder = Recorder(tmp_path / "usage", lambda: looks.pop(0))
    recorder._history.close()

    recorder.keep()
    recorder.keep()

    assert len(looks) == 1

"""What is kept of guests' and the host's use over time: counters read again and again, and the rates between two looks.

`ostler.planning.history` is where it is kept; `ostler plan`, `/v1/samples` and the dashboard's charts read it there. A
guest's first look gives no sample; nor does one whose counters ran backwards, for it is another run of that name.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from ostler.errors import OstlerError
from ostler.hostd.models import GuestStats, HostStats, SampleRow, StatsSample
from ostler.planning.history import HOST, INTERVAL_S, History, Sample


class Recorder:
    """Keeps samples while it is open, by a thread of its own; a context manager.

    A minute that cannot be kept, for want of space, is a minute without samples.
    """

    def __init__(self, path: Path, look: Callable[[], StatsSample], *, every_s: float = INTERVAL_S) -> None:
        """Raises HostError where the file cannot be made."""
        self._history, self._look, self._every_s = History(path), look, every_s
        self._before: StatsSample | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="samples", daemon=True)

    def keep(self) -> None:
        """Look once, and keep what was used since the last look."""
        with contextlib.suppress(OstlerError, OSError):
            now, before = self._look(), self._before
            self._before = now
            if before is not None:
                self._history.add(between(before, now))

    def _run(self) -> None:
        while True:
            self.keep()
            if self._stop.wait(self._every_s):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._history.close()


def between(earlier: StatsSample, later: StatsSample) -> Iterator[Sample]:
    """The host's sample, and one of each guest that was there both times."""
    if later.host.time > earlier.host.time:
        yield _host(earlier.host, later.host)
    known = {each.name: each for each in earlier.guests}
    for each in later.guests:
        if each.name in known and (sample := _guest(known[each.name], each)) is not None:
            yield sample


def _guest(earlier: GuestStats, later: GuestStats) -> Sample | None:
    """The rates between two looks at one guest; None where they are not of the same run of it."""
    # Its own clock: it stands still where the host's time was set.
    took_s = later.uptime_s - earlier.uptime_s
    if took_s <= 0:
        return None
    rates = {
        "cpus": (later.cpu_time_ns - earlier.cpu_time_ns) / took_s / 1e9,
        "run_cpus": (sum(later.vcpu_time_ns) - sum(earlier.vcpu_time_ns)) / took_s / 1e9,
        "wait_cpus": (sum(later.vcpu_wait_ns or ()) - sum(earlier.vcpu_wait_ns or ())) / took_s / 1e9,
        **_throughput(earlier, later, took_s),
    }
    if min(rates.values()) < 0:
        return None
    return Sample(
        time_s=later.time, guest=later.name, interval_s=took_s, memory_bytes=later.memory_bytes,
        resident_bytes=later.memory_resident_bytes, vcpus=len(later.vcpu_time_ns), **rates,
    )  # fmt: skip


def _host(earlier: HostStats, later: HostStats) -> Sample:
    took_s = later.time - earlier.time
    busy = (later.cpu_busy_ns - earlier.cpu_busy_ns) / took_s / 1e9
    # Counters of the kernel's may go back a little, and go with a disk or a network card that is taken away.
    return Sample(
        time_s=later.time, guest=HOST, interval_s=took_s, cpus=max(0.0, busy), run_cpus=max(0.0, busy),
        wait_cpus=max(0.0, (later.cpu_steal_ns - earlier.cpu_steal_ns) / took_s / 1e9),
        memory_bytes=later.memory_bytes, resident_bytes=later.memory_bytes - later.memory_available_bytes,
        vcpus=later.cpus, **{name: max(0.0, rate) for name, rate in _throughput(earlier, later, took_s).items()},
    )  # fmt: skip


def _throughput(earlier: GuestStats | HostStats, later: GuestStats | HostStats, took_s: float) -> dict[str, float]:
    return {
        "read_bytes_per_s": (later.disk_read_bytes - earlier.disk_read_bytes) / took_s,
        "written_bytes_per_s": (later.disk_written_bytes - earlier.disk_written_bytes) / took_s,
        "received_bytes_per_s": (later.net_received_bytes - earlier.net_received_bytes) / took_s,
        "sent_bytes_per_s": (later.net_sent_bytes - earlier.net_sent_bytes) / took_s,
    }


def row(sample: Sample) -> SampleRow:
    """As the API has it: amounts, so that rows add up."""
    took_s = sample.interval_s
    read, written = round(sample.read_bytes_per_s * took_s), round(sample.written_bytes_per_s * took_s)
    received, sent = round(sample.received_bytes_per_s * took_s), round(sample.sent_bytes_per_s * took_s)
    return SampleRow(
        time=sample.time_s, interval_s=took_s, guest=sample.guest if sample.guest != HOST else None,
        cpu_time_ns=round(sample.cpus * took_s * 1e9), run_ns=round(sample.run_cpus * took_s * 1e9),
        wait_ns=round(sample.wait_cpus * took_s * 1e9), memory_bytes=sample.resident_bytes,
        disk_bytes=read + written, disk_read_bytes=read, disk_written_bytes=written,
        net_bytes=received + sent, net_received_bytes=received, net_sent_bytes=sent,
    )  # fmt: skip

"""What guests use: asked of their processes, shared by everyone who wants to know, kept once a minute."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, Self

from ostler.errors import OstlerError
from ostler.hostd.guest import ALIVE
from ostler.hostd.host import Host
from ostler.hostd.inventory import host_stats
from ostler.hostd.models import GuestStats, HostStats, SampleRow, StatsSample

SHARED_FOR_S = 0.4
KEPT_EVERY_S = 60.0


class Statistics:
    """Any thread; a guest is asked once for all who ask at about the same time."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lock = threading.Lock()
        self._last: StatsSample | None = None
        self._asked = float("-inf")

    def sample(self) -> StatsSample:
        """The host and all guests that run and answer, not older than half a second."""
        with self._lock:
            if self._last is None or time.monotonic() - self._asked > SHARED_FOR_S:
                self._asked = time.monotonic()
                with self._host.changed:
                    names = sorted(each.name for each in self._host.guests.values() if each.state in ALIVE)
                found = []
                for name in names:
                    # One that ends just now, or hangs, is left out.
                    with contextlib.suppress(OstlerError, OSError):
                        found.append(self.guest(name))
                self._last = StatsSample(host=host_stats(), guests=found)
            return self._last

    def guest(self, name: str, *, raw: bool = False) -> GuestStats:
        """One guest's. Raises OstlerError."""
        return guest_stats(name, self._host.launcher.ask(name, "stats", timeout_s=5.0), raw=raw)


def guest_stats(name: str, said: dict[str, Any], *, raw: bool = False) -> GuestStats:
    """From the control protocol's reply."""
    memory, disks, nets = said.get("memory", {}), said.get("disks", []), said.get("nets", [])
    vcpus = said.get("vcpus", [])

    def each_of(key: str) -> list[int] | None:
        return [int(vcpu[key]) for vcpu in vcpus] if vcpus and all(key in vcpu for vcpu in vcpus) else None

    return GuestStats(
        name=name, time=time.time(), uptime_s=said.get("uptime_ns", 0) / 1e9, cpu_time_ns=said.get("cpu_time_ns", 0),
        vcpu_time_ns=each_of("cpu_time_ns") or [], vcpu_wait_ns=each_of("wait_ns"), vcpu_halt_ns=each_of("halt_ns"),
        memory_bytes=memory.get("size_bytes", 0), memory_touched_bytes=memory.get("touched_bytes", 0),
        memory_resident_bytes=memory.get("process_rss_bytes", 0),
        disk_read_bytes=_sum(disks, "read_bytes"), disk_written_bytes=_sum(disks, "written_bytes"),
        net_received_bytes=_sum(nets, "received_bytes"), net_sent_bytes=_sum(nets, "sent_bytes"),
        raw=said if raw else None,
    )  # fmt: skip


def _sum(items: list[dict[str, Any]], key: str) -> int:
    return sum(int(each.get(key, 0)) for each in items)


class History:
    """Writes a row a minute for each guest, and one for the host; a context manager."""

    def __init__(self, host: Host, statistics: Statistics, *, every_s: float = KEPT_EVERY_S) -> None:
        self._host, self._statistics, self._every_s = host, statistics, every_s
        self._before: StatsSample | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="history", daemon=True)

    def keep(self) -> None:
        """One interval: from the last call to now."""
        now = self._statistics.sample()
        if self._before is not None:
            self._host.store.add_samples(rows(self._before, now))
        self._before = now

    def _run(self) -> None:
        while True:
            with contextlib.suppress(OstlerError, OSError):
                self.keep()
            if self._stop.wait(self._every_s):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()


def rows(before: StatsSample, now: StatsSample) -> list[SampleRow]:
    """What was used between two samples. A guest that is new, or began anew, counts from its own beginning."""
    took = max(0.001, now.host.time - before.host.time)
    found = [_host_row(before.host, now.host, took)]
    earlier = {each.name: each for each in before.guests}
    for each in now.guests:
        last = earlier.get(each.name)
        if last is not None and last.uptime_s > each.uptime_s:
            last = None
        cpu, disk, net = (_used(each)[index] - (_used(last)[index] if last is not None else 0) for index in range(3))
        found.append(
            SampleRow(
                time=now.host.time, interval_s=took, guest=each.name, cpu_time_ns=cpu,
                memory_bytes=each.memory_resident_bytes, disk_bytes=disk, net_bytes=net,
            )
        )  # fmt: skip
    return found


def _used(stats: GuestStats) -> tuple[int, int, int]:
    return (
        stats.cpu_time_ns, stats.disk_read_bytes + stats.disk_written_bytes,
        stats.net_received_bytes + stats.net_sent_bytes,
    )  # fmt: skip


def _host_row(before: HostStats, now: HostStats, took: float) -> SampleRow:
    disk = now.disk_read_bytes + now.disk_written_bytes - before.disk_read_bytes - before.disk_written_bytes
    net = now.net_received_bytes + now.net_sent_bytes - before.net_received_bytes - before.net_sent_bytes
    return SampleRow(
        time=now.time, interval_s=took, guest=None, cpu_time_ns=now.cpu_busy_ns - before.cpu_busy_ns,
        memory_bytes=now.memory_bytes - now.memory_available_bytes, disk_bytes=disk, net_bytes=net,
    )  # fmt: skip

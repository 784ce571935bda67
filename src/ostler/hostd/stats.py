"""What guests use: asked of their processes, shared by everyone who wants to know."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from ostler.errors import OstlerError
from ostler.hostd.guest import ALIVE
from ostler.hostd.host import Host
from ostler.hostd.inventory import host_stats
from ostler.hostd.models import GuestStats, StatsSample

SHARED_FOR_S = 0.4


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

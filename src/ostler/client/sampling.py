"""Samples of this user's guests: their counters read again and again, and the rates between two looks.

The host's service has a `Recorder` look every `history.INTERVAL_S`. A guest's first look gives no sample; nor does one
whose counters ran backwards, for it is another guest of that name.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

from ostler.client import guests
from ostler.control import runtime
from ostler.control.runtime import Entry
from ostler.errors import OstlerError
from ostler.planning.history import INTERVAL_S, History, Sample

LOOK_TIMEOUT_S = 2.0
Stats = dict[str, Any]
_RATES = (
    ("read_bytes_per_s", "disks", "read_bytes"),
    ("written_bytes_per_s", "disks", "written_bytes"),
    ("received_bytes_per_s", "nets", "received_bytes"),
    ("sent_bytes_per_s", "nets", "sent_bytes"),
)


def read_stats(entries: Iterable[Entry] | None = None) -> dict[str, Stats]:
    """The counters of every guest that runs and answers, by name."""
    found = {}
    for entry in runtime.entries() if entries is None else entries:
        if entry.is_running():
            with contextlib.suppress(OstlerError, OSError):
                found[entry.name] = guests.request(entry, "stats", timeout_s=LOOK_TIMEOUT_S)
    return found


class Sampler:
    """Remembers each guest's last counters."""

    def __init__(
        self, read: Callable[[], dict[str, Stats]] = read_stats, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._read, self._clock = read, clock
        self._last: dict[str, Stats] = {}

    def look(self) -> list[Sample]:
        """Read all counters once; a sample for each guest that was there the last time too."""
        now_s, found = self._clock(), self._read()
        samples = [
            sample
            for name, stats in found.items()
            if name in self._last and (sample := sample_between(name, self._last[name], stats, now_s)) is not None
        ]
        self._last = found
        return samples


class Recorder:
    """Keeps samples while it is open, by a thread of its own; a context manager.

    A minute that cannot be kept, for want of space, is a minute without samples.
    """

    def __init__(self, path: Path, sampler: Sampler | None = None, *, every_s: float = INTERVAL_S) -> None:
        """Raises HostError where the file cannot be made."""
        self._history, self._sampler, self._every_s = History(path), sampler or Sampler(), every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def keep(self) -> None:
        """Look once."""
        with contextlib.suppress(OstlerError, OSError):
            self._history.add(self._sampler.look())

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


def sample_between(guest: str, earlier: Stats, later: Stats, time_s: float) -> Sample | None:
    """The rates between two looks at one guest; None where they are not of the same run of it."""
    interval_s = (later["uptime_ns"] - earlier["uptime_ns"]) / 1e9
    cpu_s = (later["cpu_time_ns"] - earlier["cpu_time_ns"]) / 1e9
    rates = {
        name: (_sum(later, devices, counter) - _sum(earlier, devices, counter)) / interval_s if interval_s > 0 else -1.0
        for name, devices, counter in _RATES
    }
    if interval_s <= 0 or cpu_s < 0 or min(rates.values()) < 0:
        return None
    memory = later["memory"]
    return Sample(
        time_s=time_s,
        guest=guest,
        interval_s=interval_s,
        cpus=cpu_s / interval_s,
        memory_bytes=memory["size_bytes"],
        resident_bytes=memory["process_rss_bytes"],
        vcpus=len(later["vcpus"]),
        **rates,
    )


def _sum(stats: Stats, devices: str, counter: str) -> int:
    return sum(int(each.get(counter, 0)) for each in stats.get(devices, ()))

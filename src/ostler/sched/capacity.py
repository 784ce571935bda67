"""How much of the host's CPUs there is for guests: what they used, and what nobody used.

Other programs are not Ostler's to hold back. What they take is gone, and what is left is divided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ostler.sched.table import Entry

FIRST_LOOK_NS, LOOK_NS = 300_000_000, 1_000_000_000
LEAST = 0.1
"""Of a CPU: a host where guests get nothing at all cannot be shared fairly anyway."""
_NEW_PART = 0.5


class Capacity:
    """Measures over a second or so, and remembers a little of the seconds before."""

    def __init__(self) -> None:
        self.part = 1.0
        """Of each CPU, for guests."""
        self._since_ns: int | None = None
        self._idle_ns: Mapping[int, int] = {}
        self._before: dict[tuple[int, int], Entry] = {}
        self._looks = 0

    def is_due(self, now_ns: int) -> bool:
        """Whether `look` has something to measure by now."""
        return self._since_ns is None or now_ns - self._since_ns >= (LOOK_NS if self._looks > 1 else FIRST_LOOK_NS)

    def look(self, now_ns: int, *, idle_ns: Mapping[int, int], entries: Iterable[Entry], cpus: frozenset[int]) -> None:
        """`cpus` are those where guests compete; `idle_ns` counts up, by CPU, and is empty where nobody says."""
        now = {(entry.slot, entry.pid): entry for entry in entries}
        stale = any(self._before[each].written_ns == now[each].written_ns for each in now.keys() & self._before.keys())
        if self._since_ns is not None and cpus and idle_ns and now_ns > self._since_ns and not stale:
            guests = sum(_rate(self._before[each], now[each]) for each in now.keys() & self._before.keys())
            free_ns = sum(max(0, idle_ns[cpu] - self._idle_ns.get(cpu, 0)) for cpu in cpus & idle_ns.keys())
            seen = (guests + free_ns / (now_ns - self._since_ns)) / len(cpus)
            seen = min(1.0, max(LEAST, seen))
            self.part = seen if self._looks < 2 else self.part + _NEW_PART * (seen - self.part)
        self._looks += 1
        self._since_ns, self._idle_ns, self._before = now_ns, idle_ns, now


def _rate(before: Entry, after: Entry) -> float:
    """CPUs a guest used between two of its own entries: each is as old as its process made it."""
    passed_ns = after.written_ns - before.written_ns
    return max(0, after.used_ns - before.used_ns) / passed_ns if passed_ns > 0 else 0.0

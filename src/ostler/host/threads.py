"""What the kernel knows of single threads of this process: processor time, waiting for a processor, affinity.

/proc/PID/task/TID/schedstat has three numbers: time on a processor, time runnable without one, turns (Linux's
Documentation/scheduler/sched-stats.rst). A kernel without them, or something that only looks like one, gives no second
number. A thread that a control group throttles counts as runnable.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable

CPUCLOCK_SCHED, CPUCLOCK_PER_THREAD = 2, 4
_SCHEDSTAT_BYTES = 96


def cpu_time_ns(tid: int) -> int:
    """Processor time a thread of this process has used; 0 where it has ended."""
    try:
        # The thread's clock by the kernel's own encoding (include/linux/posix-timers_types.h): asking libc
        # for it (pthread_getcpuclockid) must not be done for a thread that may have ended.
        return time.clock_gettime_ns(~tid << 3 | CPUCLOCK_PER_THREAD | CPUCLOCK_SCHED)
    except OSError:
        return 0


class RunDelay:
    """How long one thread has been runnable without running; keeps a descriptor."""

    def __init__(self, tid: int) -> None:
        try:
            self._fd = os.open(f"/proc/self/task/{tid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def read_ns(self) -> int | None:
        """None where the kernel does not say, and for a thread that has ended."""
        if self._fd < 0:
            return None
        try:
            return int(os.pread(self._fd, _SCHEDSTAT_BYTES, 0).split()[1])
        except (OSError, ValueError, IndexError):
            return None

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def usable_cpus() -> frozenset[int]:
    """Host CPUs this process may use."""
    return frozenset(os.sched_getaffinity(0))


def pin(tid: int, cpus: Iterable[int]) -> bool:
    """Bind a thread of this process; whether any of the CPUs is there. One that has ended is fine."""
    try:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(tid, cpus)
    except OSError:
        return False
    return True


class IdleTimes:
    """How long each host CPU has been idle, from /proc/stat."""

    def __init__(self) -> None:
        self._tick_ns = 10**9 // os.sysconf("SC_CLK_TCK")

    def read_ns(self) -> dict[int, int]:
        """By CPU; empty where nobody says."""
        try:
            with open("/proc/stat", "rb") as file:  # noqa: PTH123 - read often
                return self.parse(file.read())
        except OSError:
            return {}

    def parse(self, text: bytes) -> dict[int, int]:
        """The `cpuN` lines: user, nice, system, idle, iowait, … in ticks (proc_stat(5))."""
        found = {}
        for line in text.splitlines():
            words = line.split()
            if len(words) > 5 and words[0].startswith(b"cpu") and words[0][3:].isdigit():
                found[int(words[0][3:])] = (int(words[4]) + int(words[5])) * self._tick_ns
        return found

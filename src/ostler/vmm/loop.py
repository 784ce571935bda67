"""The event loop of a VM process: file descriptors, timers, and wake-ups from other threads.

It runs in the main thread, where Python delivers signals, so that Ctrl-C and SIGTERM unwind it
like any exception. Devices arm timers from processor threads: a nearer deadline wakes the loop.
poll(2) and not epoll(7), because standard input may be a file or /dev/null, which epoll refuses.
"""

from __future__ import annotations

import contextlib
import heapq
import select
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Self

from ostler.host.eventfd import EventFd

NS_PER_MS = 1_000_000


class HostClock:
    """The host's clocks, as devices want them."""

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        return time.time_ns()


class LoopTimer:
    """One alarm. `arm` and `disarm` are safe from any thread."""

    __slots__ = ("_expired", "_lock", "_loop", "deadline_ns")

    def __init__(self, loop: EventLoop, lock: AbstractContextManager[object] | None) -> None:
        self._loop = loop
        self._lock = lock or contextlib.nullcontext()
        self._expired: Callable[[], None] = _nothing
        self.deadline_ns: int | None = None

    def call(self, expired: Callable[[], None]) -> None:
        self._expired = expired

    def arm(self, deadline_ns: int) -> None:
        if deadline_ns != self.deadline_ns:
            self.deadline_ns = deadline_ns
            self._loop.schedule(deadline_ns, self)

    def disarm(self) -> None:
        # Its entry stays in the heap and is recognised as stale when its time comes.
        self.deadline_ns = None

    def fire(self, deadline_ns: int) -> None:
        """Called by the loop; does nothing if the deadline was changed since."""
        with self._lock:
            if self.deadline_ns == deadline_ns:
                self.deadline_ns = None
                self._expired()


class EventLoop:
    """Owns its wake-up descriptor; a context manager."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._wake = EventFd()
        self._poll.register(self._wake, select.POLLIN)
        self._readers: dict[int, Callable[[], None]] = {}
        self._heap: list[tuple[int, int, LoopTimer]] = []
        self._sequence = 0
        self._lock = threading.Lock()
        self._calls: list[Callable[[], None]] = []
        self._stopping = False

    def new_timer(self, *, lock: AbstractContextManager[object] | None = None) -> LoopTimer:
        """An alarm on this loop, whose expiry runs under the lock if one is given."""
        return LoopTimer(self, lock)

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back while `fd` is readable or at its end. Loop thread only."""
        self._readers[fd] = callback
        self._poll.register(fd, select.POLLIN)

    def remove_reader(self, fd: int) -> None:
        """Undo `add_reader`; unknown descriptors are fine. Loop thread only."""
        if self._readers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run in the loop's thread; from any thread and from signal handlers."""
        self._calls.append(callback)
        self._wake.signal()

    def stop(self) -> None:
        """End `run` after the current round; from any thread."""
        self._stopping = True
        self._wake.signal()

    def schedule(self, deadline_ns: int, timer: LoopTimer) -> None:
        """Enter a deadline; wakes the loop if it is the nearest one now."""
        with self._lock:
            self._sequence += 1
            heapq.heappush(self._heap, (deadline_ns, self._sequence, timer))
            nearest = self._heap[0][0] == deadline_ns
        if nearest:
            self._wake.signal()

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopping:
            for fd, _ in self._poll.poll(self._timeout_ms()):
                if fd == self._wake.fd:
                    self._wake.drain()
                elif fd in self._readers:
                    self._readers[fd]()
            self._run_calls()
            self._run_timers()

    def _timeout_ms(self) -> int | None:
        if self._calls:
            return 0
        with self._lock:
            if not self._heap:
                return None
            remaining_ns = self._heap[0][0] - time.monotonic_ns()
        # Rounded up, or the loop would spin through the last part of a millisecond.
        return max(-(-remaining_ns // NS_PER_MS), 0)

    def _run_calls(self) -> None:
        calls, self._calls = self._calls, []
        for callback in calls:
            callback()

    def _run_timers(self) -> None:
        while True:
            with self._lock:
                if not self._heap or self._heap[0][0] > time.monotonic_ns():
                    return
                deadline_ns, _, timer = heapq.heappop(self._heap)
            timer.fire(deadline_ns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._wake.close()


def _nothing() -> None:
    """A timer nobody told what to do."""

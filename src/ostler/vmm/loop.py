"""The event loop of a VM process: file descriptors, timers, and wake-ups from other threads.

It runs in the main thread, where Python delivers signals, so that Ctrl-C and SIGTERM unwind it
like any exception. Devices arm timers from processor threads: a nearer deadline wakes the loop.

epoll(7): a round costs what is ready, not what is watched, and a guest has many descriptors (a pair
per virtqueue, sockets per connection). Files and /dev/null, which epoll refuses because they are
always ready, are kept apart and called every round, as poll(2) would have it.

A callback may close descriptors and open others that get the same numbers. What epoll reported of a
number before it was given up is not about its new owner, and is left for the next round to tell.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Self

from ostler.host.eventfd import EventFd

NS_PER_MS = 1_000_000
FOREVER_NS = 1 << 63
BROKEN = select.EPOLLHUP | select.EPOLLERR
READABLE, WRITABLE = select.EPOLLIN | BROKEN, select.EPOLLOUT


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
            self._loop.nearer(deadline_ns)

    def disarm(self) -> None:
        # The loop may wake once for nothing.
        self.deadline_ns = None

    def fire(self, now_ns: int) -> None:
        """Called by the loop; under the lock the deadline may turn out to have moved."""
        with self._lock:
            if self.deadline_ns is not None and self.deadline_ns <= now_ns:
                self.deadline_ns = None
                self._expired()


class EventLoop:
    """Owns its wake-up descriptor; a context manager."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = EventFd()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._readers: dict[int, Callable[[], None]] = {}
        self._writers: dict[int, Callable[[], None]] = {}
        # What epoll was told of each descriptor, and those it refuses.
        self._watched: dict[int, int] = {}
        self._always_ready: set[int] = set()
        # Given up in this round: what is still to be served of it is the former owner's.
        self._given_up: set[int] = set()
        # A handful, made while the board is wired: looking at each is cheaper than a heap, which a
        # guest that arms and disarms without end would fill.
        self._timers: list[LoopTimer] = []
        self._sleeps_until_ns = 0
        # One object for ever: a thread on its way to append would otherwise do so to a list served before.
        self._calls: deque[Callable[[], None]] = deque()
        self._stopping = False

    def new_timer(self, *, lock: AbstractContextManager[object] | None = None) -> LoopTimer:
        """An alarm on this loop, whose expiry runs under the lock if one is given."""
        timer = LoopTimer(self, lock)
        self._timers.append(timer)
        return timer

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back while `fd` is readable or at its end. Loop thread only."""
        self._readers[fd] = callback
        self._watch(fd)

    def remove_reader(self, fd: int) -> None:
        """Undo `add_reader`, before `fd` is closed; unknown descriptors are fine. Loop thread only."""
        if self._readers.pop(fd, None) is not None:
            self._watch(fd)

    def add_writer(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back while `fd` takes bytes or is broken; remove it when there is nothing to write. Loop thread only."""
        self._writers[fd] = callback
        self._watch(fd)

    def remove_writer(self, fd: int) -> None:
        """Undo `add_writer`, before `fd` is closed; unknown descriptors are fine. Loop thread only."""
        if self._writers.pop(fd, None) is not None:
            self._watch(fd)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run in the loop's thread; from any thread and from signal handlers."""
        self._calls.append(callback)
        self._wake.signal()

    def stop(self) -> None:
        """End `run` after the current round; from any thread."""
        self._stopping = True
        self._wake.signal()

    def nearer(self, deadline_ns: int) -> None:
        """A timer has this deadline now: wake the loop if it means to sleep longer."""
        if deadline_ns < self._sleeps_until_ns:
            self._wake.signal()

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopping:
            ready = self._epoll.poll(self._timeout_s())
            self._given_up.clear()
            for fd, events in ready:
                if fd == self._wake.fd:
                    self._wake.drain()
                else:
                    self._serve(fd, events)
            for fd in [*self._always_ready]:
                self._serve(fd, READABLE | WRITABLE)
            self._run_calls()
            self._run_timers()

    def _serve(self, fd: int, events: int) -> None:
        """Tell whoever watches `fd`. A callback may have removed it, or the other one, in this round."""
        if fd in self._given_up:
            return
        if events & READABLE and (reader := self._readers.get(fd)):
            reader()
        # A hang-up is the reader's to see, by reading what came before it; the writer's where nobody reads.
        writer = self._writers.get(fd)
        if writer and (events & select.EPOLLOUT or (events & BROKEN and fd not in self._readers)):
            writer()

    def _watch(self, fd: int) -> None:
        """Tell epoll what is wanted of `fd` now. Nothing wanted is not watched at all: a hang-up would spin."""
        wanted = (select.EPOLLIN if fd in self._readers else 0) | (select.EPOLLOUT if fd in self._writers else 0)
        known = self._watched.get(fd, 0)
        if not wanted:
            self._given_up.add(fd)
        if fd in self._always_ready:
            if not wanted:
                self._always_ready.discard(fd)
        elif wanted and not known:
            try:
                self._epoll.register(fd, wanted)
            except PermissionError:
                self._always_ready.add(fd)
                return
            self._watched[fd] = wanted
        elif wanted and wanted != known:
            self._epoll.modify(fd, wanted)
            self._watched[fd] = wanted
        elif known and not wanted:
            del self._watched[fd]
            self._epoll.unregister(fd)

    def _timeout_s(self) -> float | None:
        # Announced before the deadlines are read: a timer armed in between then wakes the loop.
        self._sleeps_until_ns = FOREVER_NS
        deadlines = [timer.deadline_ns for timer in self._timers]
        nearest_ns = min((each for each in deadlines if each is not None), default=FOREVER_NS)
        self._sleeps_until_ns = nearest_ns
        if self._calls or self._always_ready:
            return 0
        if nearest_ns == FOREVER_NS:
            return None
        # Python rounds up to epoll's milliseconds, or the loop would spin through the last part of one.
        return max((nearest_ns - time.monotonic_ns()) / 1e9, 0)

    def _run_calls(self) -> None:
        # What these ask for in turn is for the next round.
        for _ in range(len(self._calls)):
            self._calls.popleft()()

    def _run_timers(self) -> None:
        now_ns = time.monotonic_ns()
        for timer in self._timers:
            deadline_ns = timer.deadline_ns
            if deadline_ns is not None and deadline_ns <= now_ns:
                timer.fire(now_ns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._wake.close()
        self._epoll.close()


def _nothing() -> None:
    """A timer nobody told what to do."""

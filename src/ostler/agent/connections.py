"""Connections to one agent: each operation under way has its own, and leaves it to the next one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ostler.agent.link import Link, Opener
from ostler.agent.protocol import Hello, Phase
from ostler.errors import AgentLost

IDLE_CONNECTIONS = 2
"""So many are kept for the next operation; a new one costs the guest a process."""
NOT_THERE_YET = (FileNotFoundError, ConnectionError, TimeoutError, BlockingIOError)
"""What opening a connection raises while the guest is not ready for one."""


class Connections:
    """May be used from several threads, unless there is one stream `only`."""

    def __init__(self, opener: Opener, timeout_s: float) -> None:
        self._opener = opener
        self._timeout_s = timeout_s
        self._idle: list[Link] = []
        self._lock = threading.Lock()
        self.only: Link | None = None
        """The one stream there is, on which operations follow each other."""
        self.hello: Hello | None = None

    def use_only(self, link: Link, timeout_s: float) -> None:
        """Take over the one stream there is, and greet."""
        self.only = link
        self.hello = link.greet(timeout_s)

    def open(self, timeout_s: float) -> Link:
        """A new connection that has greeted. Raises OSError, AgentLost, AgentUnavailable."""
        found = Link(self._opener(timeout_s))
        try:
            self.hello = found.greet(timeout_s)
        except BaseException:
            found.close()
            raise
        return found

    @contextlib.contextmanager
    def link(self) -> Iterator[Link]:
        """One connection for one operation."""
        if self.only is not None:
            yield self.only
            return
        found = self.reach()
        try:
            yield found
        finally:
            self.release(found)

    def release(self, used: Link) -> None:
        """Keep a connection for the next operation, or close it."""
        if used is self.only:
            if used.conversation.phase is not Phase.IDLE:
                used.close()  # there is no other way to stop what is under way
            return
        with self._lock:
            if len(self._idle) < IDLE_CONNECTIONS and used.is_reusable():
                self._idle.append(used)
                return
        used.close()

    def reach(self) -> Link:
        """A connection that is idle, or a new one; to be given to `release`. Raises AgentLost."""
        if self.only is not None:
            return self.only
        while True:
            with self._lock:
                found = self._idle.pop() if self._idle else None
            if found is None:
                break
            if found.is_reusable():  # a guest that was reset or restored meanwhile has hung up
                return found
            found.close()
        try:
            return self.open(self._timeout_s)
        except NOT_THERE_YET as error:
            raise AgentLost(f"agent: not reachable any more ({error})") from error

    def close(self) -> None:
        """Let go of those that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for held in (self.only, *idle):
            if held is not None:
                held.close()
        self.only = None

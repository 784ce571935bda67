"""What happens, numbered, kept for a while, told to whoever listens. Any thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ostler.hostd.models import EventView

KEPT = 1000
Listener = Callable[[EventView], None]
"""Called in whatever thread the event comes from; must neither block nor raise."""


class EventLog:
    """Numbers go on where an earlier service left off: `first` is that number."""

    def __init__(self, first: int = 1) -> None:
        self._kept: deque[EventView] = deque(maxlen=KEPT)
        self._next = first
        self._listeners: set[Listener] = set()
        self._lock = threading.Lock()

    @property
    def last(self) -> int:
        """The newest event's number, or that before the first."""
        return self._next - 1

    def publish(self, kind: str, guest: str | None, data: dict[str, Any]) -> EventView:
        """Something happened."""
        with self._lock:
            event = EventView(id=self._next, time=time.time(), kind=kind, guest=guest, data=data)
            self._next += 1
            self._kept.append(event)
            # Under the lock, so that everyone hears events in their order.
            for listener in self._listeners:
                listener(event)
        return event

    def since(self, number: int, limit: int = KEPT) -> list[EventView]:
        """Those after that number, as far as they are kept, oldest first."""
        with self._lock:
            return [each for each in self._kept if each.id > number][:limit]

    def listen(self, listener: Listener, since: int | None = None) -> list[EventView]:
        """Tell `listener` of everything from now on; returns what it missed after `since`."""
        with self._lock:
            self._listeners.add(listener)
            return [] if since is None else [each for each in self._kept if each.id > since]

    def leave(self, listener: Listener) -> None:
        """Tell it no more."""
        with self._lock:
            self._listeners.discard(listener)

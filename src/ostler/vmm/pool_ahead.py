"""Which guests the pool makes before they are asked for: one each of what was asked for last, for a minute.

A guest that waits takes some megabytes and a process of passt's, so there are few. OSTLER_POOL=bare has none. Whatever
of the environment could make another guest of the same words is part of what was asked for.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

MOST = 2
KEPT_S = 60.0
_RELEVANT = ("OSTLER_", "XDG_", "LC_", "LANG")
_RELEVANT_NAMES = frozenset({"PATH", "HOME", "TMPDIR", "USER"})


@dataclass(frozen=True, slots=True)
class Task:
    """A guest to be made."""

    spec: str
    origin: Mapping[str, Any]
    environment: Mapping[str, str]
    place: Path

    @classmethod
    def of(cls, request: Mapping[str, Any], place: Path) -> Self | None:
        """What a request asks for; None for a guest that boots, and for one of which there will not be another."""
        origin, spec, environment = request.get("origin"), request.get("spec"), request.get("environment")
        if not isinstance(origin, dict) or not isinstance(spec, str) or not isinstance(environment, dict):
            return None
        if origin.get("once") or environment.get("OSTLER_POOL") == "bare":
            return None
        return cls(spec, origin, environment, place)

    @property
    def key(self) -> tuple[object, ...]:
        """The same for whoever can have the same guest."""
        names = (name for name in self.environment if name.startswith(_RELEVANT) or name in _RELEVANT_NAMES)
        return self.spec, *sorted(self.origin.items()), *((name, self.environment[name]) for name in sorted(names))


class Waiting(Protocol):
    """A child that makes a guest and waits: `ostler.vmm.pool.Spare`."""

    pid: int
    socket: socket.socket
    is_ready: bool

    def hear(self) -> bool:
        """Whether it has said that it is ready; its socket is readable."""

    def give(self, request: bytes, fds: list[int]) -> int:
        """Hand a request over."""

    def dismiss(self) -> None:
        """Have it end."""


@dataclass(slots=True)
class _Wanted:
    task: Task
    used_s: float
    spare: Waiting | None = None
    failed: bool = False
    """It could not be made, or died: not tried again, as whoever asks for it has the same trouble."""


class Ahead:
    """Those that wait, and those that are to be made. Times are of one clock, in seconds."""

    def __init__(self) -> None:
        self._wanted: dict[tuple[object, ...], _Wanted] = {}

    @property
    def spares(self) -> list[Waiting]:
        """Children that were begun."""
        return [each.spare for each in self._wanted.values() if each.spare is not None]

    @property
    def ready(self) -> int:
        """How many wait for whoever asks for them."""
        return sum(each.is_ready for each in self.spares)

    @property
    def sockets(self) -> list[socket.socket]:
        """Of those that have not said that they are ready; of the others too, for they may end."""
        return [each.socket for each in self.spares]

    def take(self, task: Task, now_s: float) -> Waiting | None:
        """A guest for whoever asks for this one, who may want more of the same; None where none is ready."""
        found = self._wanted.pop(task.key, None) or _Wanted(task, now_s)
        # The one asked for last is the last to go.
        self._wanted[task.key] = found
        found.used_s = now_s
        while len(self._wanted) > MOST:
            self._forget(next(iter(self._wanted)))
        if found.spare is None or not found.spare.is_ready:
            return None
        spare, found.spare = found.spare, None
        return spare

    def missing(self) -> Task | None:
        """What is to be made next."""
        return next((each.task for each in self._wanted.values() if each.spare is None and not each.failed), None)

    def add(self, task: Task, spare: Waiting) -> None:
        """It is being made."""
        self._wanted[task.key].spare = spare

    def hear(self, readable: Iterable[object]) -> None:
        """Children whose sockets have something say that they are ready, or have ended."""
        for each in self._wanted.values():
            if each.spare is not None and each.spare.socket in readable and not each.spare.hear():
                each.spare.dismiss()
                each.spare, each.failed = None, True

    def forget_old(self, now_s: float) -> None:
        """Dismiss what nobody has asked for in a while."""
        for key in [key for key, each in self._wanted.items() if now_s - each.used_s > KEPT_S]:
            self._forget(key)

    def _forget(self, key: tuple[object, ...]) -> None:
        spare = self._wanted.pop(key).spare
        if spare is not None:
            spare.dismiss()

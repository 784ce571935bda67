"""Long work, and what happens."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from ostler.hostd.models.base import View
from ostler.hostd.models.problems import Problem


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    """The service ended before the job did, and what it was doing did not come to its end."""


class JobView(View):
    """Long work. It goes on when its caller has gone, and is remembered when the service has."""

    id: str
    kind: str
    """`start`, `stop`, `restart`, `exec`, `snapshot`, `restore`, `fork`, `migrate`, `remove`."""
    guest: str | None
    state: JobState
    progress: float | None
    """From 0 to 1, where it can be said."""
    message: str
    """What it does now, or how it ended, in one line."""
    created: float
    started: float | None
    ended: float | None
    by: str
    """Who asked for it: see `Caller`."""
    result: dict[str, Any] | None
    """What came of it; see docs/rest-api.md for each kind's."""
    problem: Problem | None


class JobList(View):
    jobs: list[JobView]


class EventView(View):
    """Something that happened."""

    id: int
    """Grows by one with each; goes on counting after a restart of the service."""
    time: float
    kind: str
    """`guest`, `job`, `definition`, `host`, or what a guest's process says: `guest.device`, `guest.panic`, …"""
    guest: str | None
    data: dict[str, Any]
    """`guest`: a GuestView. `job`: a JobView. Else what docs/rest-api.md says."""


class EventList(View):
    events: list[EventView]
    last: int
    """The newest event's id; 0 before the first."""

"""Long work: numbered by chance, kept in the database, told as events, done by a bounded number of threads.

A job is kept before it begins: whoever was answered "begun" finds it after a crash of the service, which then says
truthfully what has become of it (`Jobs.settle`). Threads take jobs in the order in which they were made; whoever makes
a job that waits for others makes those first, so that waiting never stops what is waited for.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ostler.errors import BadRequest, HostError, MigrationCancelled, OstlerError
from ostler.hostd.events import EventLog
from ostler.hostd.models import JobState, JobView, Problem
from ostler.hostd.problems import problem_of
from ostler.hostd.store import Store

MAX_AT_A_TIME, MAX_OPEN = 64, 1000
TOLD_EVERY_S, KEPT_EVERY_S = 0.5, 2.0
ENDED = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED, JobState.INTERRUPTED})
Work = Callable[["Job"], dict[str, Any] | None]


class Cancelled(OstlerError):
    """The job was called off."""


@dataclass(slots=True)
class Job:
    """One that is under way: how its work speaks of it."""

    view: JobView
    _jobs: Jobs
    cancel: Callable[[], None] | None = None
    """Calls it off from another thread; None where that cannot be done now."""
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    _told: float = 0

    @property
    def id(self) -> str:
        return self.view.id

    def say(self, step: str, fraction: float | None = None) -> None:
        """What it does now, and how far it is. Told now and then only."""
        self._jobs.say(self, " ".join(step.split())[:500], fraction)

    def check(self) -> None:
        """Raises Cancelled once it has been called off."""
        if self.is_cancelled.is_set():
            raise Cancelled("called off")


class _Workers:
    """Threads that do not keep the service from ending; made as they are wanted."""

    def __init__(self, most: int) -> None:
        self._most, self._threads, self._idle = most, 0, 0
        self._waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False

    def submit(self, call: Callable[[], None]) -> None:
        with self._lock:
            self._waiting.put(call)
            if self._idle >= self._waiting.qsize() or self._threads >= self._most:
                return
            self._threads += 1
        threading.Thread(target=self._serve, name=f"job-{self._threads}", daemon=True).start()

    def close(self) -> None:
        """What has not begun will not."""
        self._is_closed = True

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            call = self._waiting.get()
            with self._lock:
                self._idle -= 1
            if self._is_closed:
                return
            call()


class Jobs:
    """All that are under way, and the way to the others."""

    def __init__(self, store: Store, events: EventLog, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._events, self._clock = store, events, clock
        self._open: dict[str, Job] = {}
        self._unsaved: dict[str, JobView] = {}
        self._changed = threading.Condition()
        self._workers = _Workers(MAX_AT_A_TIME)
        self.ended: dict[tuple[str, str], int] = {}
        """How many of each kind came to each state, for the metrics."""

    def begin(self, kind: str, guest: str | None, by: str, work: Work, *, can_cancel: bool = False) -> Job:
        """Have it done. Raises DatabaseFull where it could not be kept: then it is not begun."""
        view = JobView(
            id=secrets.token_hex(8), kind=kind, guest=guest, state=JobState.QUEUED, progress=None, message="",
            created=self._clock(), started=None, ended=None, by=by, result=None, problem=None,
        )  # fmt: skip
        job = Job(view, self)
        if can_cancel:
            job.cancel = job.is_cancelled.set
        with self._changed:
            if len(self._open) >= MAX_OPEN:
                raise HostError(f"jobs: {MAX_OPEN} are under way; expected to wait for some of them")
            self._store.put_jobs([view])
            self._open[view.id] = job
        self._tell(view)
        self._workers.submit(lambda: self._run(job, work))
        return job

    def under_way(self, identifier: str) -> Job | None:
        """The job, if it has not ended."""
        with self._changed:
            return self._open.get(identifier)

    def say(self, job: Job, message: str, progress: float | None) -> None:
        """See `Job.say`."""
        with self._changed:
            job.view = job.view.model_copy(update={"message": message, "progress": progress})
        now = time.monotonic()
        if now - job._told >= TOLD_EVERY_S:
            job._told = now
            self._tell(job.view)

    def cancel(self, identifier: str) -> JobView:
        """Call a job off. Raises BadRequest for one that cannot be, and one that has ended."""
        with self._changed:
            job = self._open.get(identifier)
        if job is None:
            raise BadRequest(f"job {identifier!r}: has ended")
        if job.cancel is None:
            raise BadRequest(f"job {identifier!r}: a {job.view.kind} cannot be called off now")
        job.is_cancelled.set()
        job.cancel()
        return job.view

    def get(self, identifier: str) -> JobView | None:
        """One, as it is now."""
        with self._changed:
            if (job := self._open.get(identifier)) is not None:
                return job.view
            if (unsaved := self._unsaved.get(identifier)) is not None:
                return unsaved
        return self._store.job(identifier)

    def wait(self, identifier: str, timeout_s: float) -> JobView | None:
        """The job once it has ended, or as it is after the time-out."""
        with self._changed:
            self._changed.wait_for(lambda: identifier not in self._open, timeout_s)
        return self.get(identifier)

    def listed(self, *, guest: str | None, state: JobState | None, limit: int) -> list[JobView]:
        """Newest first."""
        kept = self._store.jobs(guest=guest, state=None, limit=limit if state is None else 1000)
        with self._changed:
            newer = {**self._unsaved, **{name: job.view for name, job in self._open.items()}}
        found = [newer.get(each.id, each) for each in kept]
        return [each for each in found if state is None or each.state is state][:limit]

    @property
    def open_count(self) -> int:
        return len(self._open)

    def settle(self, judge: Callable[[JobView], tuple[JobState, str]]) -> list[JobView]:
        """At the start of a service: what has become of the jobs its forerunner left open."""
        left = self._store.open_jobs()
        now = self._clock()
        settled = []
        for view in left:
            state, message = judge(view)
            problem = None
            if state is not JobState.DONE:
                problem = Problem(status=500, kind="Interrupted", message=message)
            settled.append(
                view.model_copy(update={"state": state, "message": message, "ended": now, "problem": problem})
            )
        if settled:
            self._store.put_jobs(settled)
        return settled

    def close(self, timeout_s: float = 5.0) -> None:
        """Begin no more, and leave those under way a moment. What then still runs is interrupted."""
        self._workers.close()
        with self._changed:
            self._changed.wait_for(lambda: not self._running(), timeout_s)
        self.save_again()

    def save_again(self) -> None:
        """Keep what could not be kept when it ended: the disk was full."""
        with self._changed:
            unsaved = [*self._unsaved.values()]
        if unsaved:
            with contextlib.suppress(OstlerError):
                self._store.put_jobs(unsaved)
                with self._changed:
                    for view in unsaved:
                        self._unsaved.pop(view.id, None)

    def _running(self) -> list[Job]:
        return [job for job in self._open.values() if job.view.state is JobState.RUNNING]

    def _run(self, job: Job, work: Work) -> None:
        self._update(job, state=JobState.RUNNING, started=self._clock())
        ending: dict[str, Any]
        try:
            job.check()
            result = work(job)
            ending = {"state": JobState.DONE, "result": result or {}, "progress": 1.0}
        except (Cancelled, MigrationCancelled):
            ending = {"state": JobState.CANCELLED, "message": "called off"}
        except Exception as error:
            state = JobState.CANCELLED if job.is_cancelled.is_set() else JobState.FAILED
            problem = problem_of(error)
            ending = {"state": state, "message": problem.message, "problem": problem}
        self._end(job, ending)

    def _update(self, job: Job, **changes: Any) -> None:
        with self._changed:
            job.view = job.view.model_copy(update=changes)
        # That it runs is news, and no more than that: it is open either way.
        self._tell(job.view)

    def _end(self, job: Job, ending: dict[str, Any]) -> None:
        view = job.view.model_copy(update={**ending, "ended": self._clock()})
        try:
            self._store.put_jobs([view])
            unsaved = False
        except OstlerError:
            unsaved = True
        with self._changed:
            job.view = view
            if unsaved:
                self._unsaved[view.id] = view
            self._open.pop(view.id, None)
            key = (view.kind, view.state.value)
            self.ended[key] = self.ended.get(key, 0) + 1
            self._changed.notify_all()
        self._tell(view)

    def _tell(self, view: JobView) -> None:
        self._events.publish("job", view.guest, view.model_dump(mode="json"))

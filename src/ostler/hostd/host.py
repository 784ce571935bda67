"""The service's heart: guests, what is to become of them, and the lock around both.

`Host` answers from memory and begins jobs; `ostler.hostd.starting` and `stopping` are what the jobs of those names do,
`ostler.hostd.work` the others, and `ostler.hostd.following` what follows from a guest's end. State changes in one
place, `Host.set`, which numbers and tells every change.

One lock guards all guests. Nothing under it waits for a guest: what takes time is a job.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ostler.errors import BadRequest, OstlerError
from ostler.hostd import admission, claims, ordering
from ostler.hostd.admission import Claim
from ostler.hostd.definition import Definition
from ostler.hostd.events import EventLog
from ostler.hostd.guest import ALIVE, Guest
from ostler.hostd.jobs import Job, Jobs, Work
from ostler.hostd.launcher import Launcher
from ostler.hostd.models import GuestList, GuestState, GuestView, JobView, Quantity
from ostler.hostd.problems import NotFound
from ostler.hostd.store import Remembered, Store

Later = Callable[[float, Callable[[], None]], object]
"""Calls something after so many seconds, in some thread; tests bring their own clock."""
Restart = Callable[["Host", Guest, int], None]
"""Starts a guest of that life whose time to back off is over: what is above this module."""


def later(delay_s: float, call: Callable[[], None]) -> object:
    """By a thread that does not keep the service from ending."""
    timer = threading.Timer(delay_s, call)
    timer.daemon = True
    timer.start()
    return timer


class Host:
    """All guests of one host; see `ostler.hostd.opening.open_host` for how it begins."""

    def __init__(
        self, store: Store, launcher: Launcher, *, restart: Restart, limits: dict[str, int],
        ratios: dict[str, float] | None = None, parallel_starts: int = 4, call_later: Later = later,
        first_event: int = 1,
    ) -> None:  # fmt: skip
        self.store, self.launcher, self.limits, self.ratios = store, launcher, limits, ratios or {}
        self.events = EventLog(first_event)
        self.jobs = Jobs(store, self.events)
        self.restart, self.call_later = restart, call_later
        self.slots = threading.BoundedSemaphore(parallel_starts)
        self.guests: dict[str, Guest] = {}
        self.changed = threading.Condition(threading.RLock())
        self.started = time.time()
        self.is_closing = False
        # By job: what guests will hold that it is making.
        self._held: dict[str, list[Claim]] = {}
        self._version = 0
        self._rendered: tuple[int, bytes] = (-1, b"")

    # Looking

    def listed(self) -> GuestList:
        """All guests, by name."""
        with self.changed:
            views = [self.guests[name].view() for name in sorted(self.guests)]
            return GuestList(guests=views, version=self._version)

    def list_json(self) -> bytes:
        """The same as JSON; made anew only after a change."""
        version, rendered = self._rendered
        if version != self._version:
            found = self.listed()
            rendered = found.model_dump_json().encode()
            self._rendered = (found.version, rendered)
        return rendered

    def find(self, name: str) -> Guest:
        """The guest of that name. Raises NotFound."""
        with self.changed:
            if (found := self.guests.get(name)) is None:
                raise NotFound(f"guest {name!r}: not known")
            return found

    def graph(self) -> dict[str, tuple[str, ...]]:
        """Who depends on whom, of all that are defined."""
        with self.changed:
            return {name: each.host.depends_on for name, each in self.guests.items() if each.is_defined}

    def promised(self) -> list[Claim]:
        """What is held: by every guest that is active, for every one that starts with the host, or is being made."""
        with self.changed:
            held = {each.name: each.claim for each in self.guests.values() if each.is_active or each.host.autostart}
            self._held = {job: claims for job, claims in self._held.items() if self.jobs.under_way(job) is not None}
            for claim in itertools.chain.from_iterable(self._held.values()):
                held.setdefault(claim.holder, claim)
            return [*held.values()]

    def resources(self) -> dict[str, Quantity]:
        """What there is to promise."""
        claims = self.promised()
        found = {}
        for name in admission.QUANTITIES:
            capacity, used = self.limits.get(name, 0), admission.total(claims, name)
            ratio = float(self.ratios.get(name, 1))
            found[name] = Quantity(capacity=capacity, ratio=ratio, promised=used, left=max(0, capacity - used))
        return found

    # Changing

    def set(self, guest: Guest, **changes: Any) -> None:
        """Change a guest, tell of it, wake whoever waits."""
        with self.changed:
            before = guest.view()
            for name, value in changes.items():
                setattr(guest, name, value)
            after = guest.view()
            if after != before or guest.name not in self.guests:
                self.guests[guest.name] = guest
                self._version += 1
                self.events.publish("guest", guest.name, after.model_dump(mode="json"))
            self.changed.notify_all()

    def drop(self, guest: Guest) -> None:
        """The guest is not known any more."""
        with self.changed:
            if self.guests.pop(guest.name, None) is not None:
                self._version += 1
                data = {**guest.view().model_dump(mode="json"), "removed": True}
                self.events.publish("guest", guest.name, data)
            self.changed.notify_all()

    def admit(self, definition: Definition, *, starts: bool) -> None:
        """Raise AdmissionRefused where the host cannot give what it asks.

        One that is started, or starts with the host, has to fit beside all that is promised; one that is only defined
        has to fit by itself.
        """
        asked = Guest(definition.name, definition).claim
        beside = self.promised() if starts or definition.host.autostart else []
        admission.require(self.limits, beside, asked)

    def begin_making(
        self, kind: str, guest: str | None, by: str, work: Work, *, asked: Sequence[Claim], can_cancel: bool = False
    ) -> Job:  # fmt: skip
        """A job that makes guests: what they will hold is theirs from now on. Raises AdmissionRefused for a lack."""
        with self.changed:
            admission.require(self.limits, self.promised(), *asked)
            job = self.jobs.begin(kind, guest, by, work, can_cancel=can_cancel)
            self._held[job.id] = [*asked]
            return job

    def admit_share(self, guest: Guest, reserve_percent: float) -> None:
        """Raise AdmissionRefused where a running guest cannot be given so much of the processors."""
        asked = claims.with_share(guest.claim, {"cpu_reserve": reserve_percent})
        admission.require(self.limits, self.promised(), asked)

    def define(self, definitions: Iterable[Definition], *, replace: bool) -> list[GuestView]:
        """Define guests: all or none. Raises BadRequest for a name in use, a cycle, a lack; DatabaseFull."""
        new = {each.name: each for each in definitions}
        with self.changed:
            graph = {**self.graph(), **{name: each.host.depends_on for name, each in new.items()}}
            for name, definition in new.items():
                known = self.guests.get(name)
                if known is not None and not replace:
                    what = "is defined already" if known.is_defined else "runs already, without a definition"
                    raise BadRequest(f"guest {name!r}: {what}; expected another name")
                ordering.in_order(graph, [name])
                self._admit_beside(definition, new)
            self.store.put_definitions({name: each.table for name, each in new.items()})
            for name, definition in new.items():
                what = "changed" if name in self.guests else "defined"
                self._redefine(self.guests.get(name) or Guest(name), definition)
                self.events.publish("definition", name, {"name": name, "what": what})
        self.store.database.back_up()
        return [self.find(name).view() for name in new]

    def _redefine(self, guest: Guest, definition: Definition) -> None:
        if guest.broken is None:
            self.set(guest, definition=definition)
            return
        state = GuestState.DEFINED if guest.state is GuestState.BROKEN else guest.state
        self.set(guest, definition=definition, broken=None, state=state, reason=None)

    def _admit_beside(self, definition: Definition, new: dict[str, Definition]) -> None:
        asked = Guest(definition.name, definition).claim
        beside: list[Claim] = []
        if definition.host.autostart or self._is_active(definition.name):
            others = [Guest(each.name, each).claim for each in new.values() if each.host.autostart]
            beside = [*others, *(each for each in self.promised() if each.holder not in new)]
        admission.require(self.limits, beside, asked)

    def _is_active(self, name: str) -> bool:
        return name in self.guests and self.guests[name].is_active

    def undefine(self, guest: Guest) -> None:
        """Forget a guest that does not run: definition, folder, log. Raises BadRequest where others depend on it."""
        with self.changed:
            if guest.is_active or guest.job is not None:
                raise BadRequest(f"guest {guest.name!r}: is {guest.state.value}; stop it first")
            if users := sorted(ordering.needing(self.graph(), guest.name)):
                raise BadRequest(f"guest {guest.name!r}: {users[0]!r} depends on it; expected one that nobody needs")
            if guest.is_defined:
                self.store.drop_definition(guest.name)
                self.events.publish("definition", guest.name, {"name": guest.name, "what": "removed"})
            self.drop(guest)
        self.launcher.forget(guest.name)
        self.store.database.back_up()

    def remember(self, guest: Guest, phase: str) -> None:
        """Keep what a service after this one has to know. Strangers are not kept."""
        if guest.definition is not None:
            known = Remembered(guest.is_wanted, phase, guest.restarts, guest.ending)
            self.store.put_guest(guest.name, known)

    # Jobs

    def begin(
        self, kind: str, guest: Guest, by: str, work: Work, *, alone: bool = False, can_cancel: bool = False
    ) -> Job:
        """A job for a guest; `alone`: nothing else of that kind meanwhile. Raises BadRequest where there is."""
        with self.changed:
            if not alone:
                return self.jobs.begin(kind, guest.name, by, work, can_cancel=can_cancel)
            if guest.job is not None:
                view = self.jobs.get(guest.job)
                raise BadRequest(f"guest {guest.name!r}: a job is under way ({view.kind if view else '?'} {guest.job})")
            job = self.jobs.begin(
                kind, guest.name, by, lambda job: self._alone(guest, job, work), can_cancel=can_cancel
            )
            self.set(guest, job=job.id)
            return job

    def _alone(self, guest: Guest, job: Job, work: Work) -> dict[str, Any] | None:
        try:
            return work(job)
        finally:
            with self.changed:
                if guest.job == job.id and guest.name in self.guests:
                    self.set(guest, job=None)

    def ask(self, name: str, op: str, *, timeout_s: float | None = 30.0, **arguments: object) -> dict[str, Any]:
        """A request of a guest that runs. Raises BadRequest for one that does not."""
        guest = self.running(name)
        return self.launcher.ask(guest.name, op, timeout_s=timeout_s, **arguments)

    def running(self, name: str) -> Guest:
        """The guest, if its process lives. Raises NotFound, BadRequest."""
        guest = self.find(name)
        if guest.state not in ALIVE and guest.state is not GuestState.STARTING:
            raise BadRequest(f"guest {name!r}: is {guest.state.value}, expected one that runs")
        return guest

    def wait_for(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait for a state; whether it came. Called without the lock."""
        with self.changed:
            return self.changed.wait_for(condition, timeout_s)

    def close(self) -> None:
        """End the service, not its guests."""
        with self.changed:
            self.is_closing = True
            self.events.publish("host", None, {"what": "stopping"})
            self.changed.notify_all()
        self.jobs.close()
        with contextlib.suppress(OstlerError):
            self.store.database.set_meta("next_event", str(self.events.last + 1))
        self.store.database.back_up()


def job_of(job: Job) -> JobView:
    """For whoever asked for it."""
    return job.view

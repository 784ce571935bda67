"""Guests brought up: each after what it depends on, made ready by its agent.

A start that fails leaves nothing half started. Once a guest is ready, its watcher (`ostler.hostd.following`) decides.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from ostler.errors import BadRequest, OstlerError
from ostler.hostd import admission, ordering
from ostler.hostd.following import over, rest, watch
from ostler.hostd.guest import ALIVE, Guest
from ostler.hostd.host import Host
from ostler.hostd.jobs import Cancelled, Job
from ostler.hostd.models import GuestState

HOST = "host"
# A dependency in one of these will not become ready by itself.
_HOPELESS = frozenset({GuestState.DEFINED, GuestState.ENDED, GuestState.FAILED, GuestState.STOPPING})


def begin_start(host: Host, name: str, by: str, *, after_s: float | None = None) -> Job | None:
    """Start a guest, and first what it needs; its own job. None where it runs already.

    Raises NotFound, BadRequest for one that is not defined or that something else is being done with, AdmissionRefused.
    """
    with host.changed:
        guest = host.find(name)
        refuse_undefined(guest)
        order = ordering.in_order(host.graph(), [name])
        missing = [each for each in order if not _is_up(host.guests[each])]
        for each in missing:
            refuse_undefined(host.guests[each])
            _refuse_busy(host, host.guests[each])
        # What is admitted together can be started together.
        admission.require(host.limits, host.promised(), *(host.guests[each].claim for each in missing))
        made: dict[str, Job] = {}
        for each in missing:
            wanted = host.guests[each]
            if wanted.job is None:
                made[each] = _begin_one(host, wanted, by, after_s if each == name else None)
        if name in made:
            return made[name]
        return host.jobs.under_way(guest.job) if guest.job else None


def begin_all(host: Host, names: list[str], by: str) -> list[Job]:
    """Start several, as far as each can be: one that cannot is told as failed, and keeps nobody else."""
    made = []
    for name in ordering.in_order(host.graph(), names):
        try:
            if (job := begin_start(host, name, by)) is not None:
                made.append(job)
        except OstlerError as error:
            host.set(host.find(name), state=GuestState.FAILED, reason=str(error))
    return made


def complete(host: Host, guest: Guest) -> Job:
    """Finish the start of a guest whose service died in the middle of it."""
    assert guest.definition is not None
    return host.begin("start", guest, HOST, lambda job: _make_ready(host, guest, job), alone=True, can_cancel=True)


def restart(host: Host, guest: Guest, run: int) -> None:
    """Start a guest whose time to back off is over, if it still is what it was then."""
    with host.changed:
        if host.is_closing or guest.run != run or guest.state is not GuestState.BACKING_OFF:
            return
        try:
            begin_start(host, guest.name, HOST)
        except OstlerError as error:
            rest(host, guest, GuestState.FAILED, str(error))


def start(host: Host, guest: Guest, job: Job, after_s: float | None) -> dict[str, Any]:
    """What the job of a start does; `after_s` instead of the definition's delay."""
    definition = guest.definition
    assert definition is not None
    try:
        _await_needed(host, guest, job)
        _pause(job, definition.host.delay_s if after_s is None else after_s)
        with host.changed:
            host.admit(definition, starts=True)
            guest.is_wanted = True
            guest.run += 1
            host.remember(guest, "launching")
            host.set(guest, state=GuestState.STARTING, ending=None, reason=None, facts={}, next_start=None)
        with host.slots:
            job.check()
            host.launcher.start(definition, job.say)
            _note_start(host, guest)
            if definition.host.readiness == "none":
                host.set(guest, state=GuestState.RUNNING, is_ready=True, ready_at=time.time())
            return _make_ready(host, guest, job)
    except BaseException as error:
        _start_failed(host, guest, job, error)
        raise


def _is_up(guest: Guest) -> bool:
    return guest.state in ALIVE and guest.state is not GuestState.STOPPING


def refuse_undefined(guest: Guest) -> None:
    """Raise BadRequest for one that cannot be started."""
    if guest.broken is not None:
        raise BadRequest(f"guest {guest.name!r}: its definition is broken: {guest.broken.why}; define it anew")
    if guest.definition is None:
        raise BadRequest(f"guest {guest.name!r}: is not defined here; expected one that is")


def _refuse_busy(host: Host, guest: Guest) -> None:
    if guest.job is None:
        return
    view = host.jobs.get(guest.job)
    if view is not None and view.kind not in {"start", "restart"}:
        raise BadRequest(f"guest {guest.name!r}: a job is under way ({view.kind} {guest.job})")


def _begin_one(host: Host, guest: Guest, by: str, after_s: float | None) -> Job:
    guest.is_wanted = True
    if by != HOST:
        guest.restarts = 0
    job = host.begin("start", guest, by, lambda job: start(host, guest, job, after_s), alone=True, can_cancel=True)
    host.set(guest, state=GuestState.WAITING, next_start=None, reason=None, ending=None)
    return job


def _note_start(host: Host, guest: Guest) -> None:
    found = host.launcher.found().get(guest.name)
    with host.changed:
        if found is not None:
            host.set(guest, facts=found.facts, spec=found.spec)
        watch(host, guest)


def _make_ready(host: Host, guest: Guest, job: Job) -> dict[str, Any]:
    definition = guest.definition
    assert definition is not None
    try:
        host.launcher.make_ready(definition, job.say)
    except OstlerError as error:
        if definition.host.readiness == "none" and guest.state in ALIVE:
            # Nobody waits for it; what its agent had to say is told, and it runs on.
            host.events.publish("guest.trouble", guest.name, {"message": str(error)})
        elif guest.state is GuestState.STARTING or not guest.is_ready:
            _start_failed(host, guest, job, error)
            raise
    with host.changed:
        _let_go(guest, job)
        if guest.ending is not None:
            over(host, guest, guest.ending)
            return {"guest": guest.name}
        if guest.state is GuestState.STARTING:
            host.set(guest, state=GuestState.RUNNING)
        host.set(guest, is_ready=True, ready_at=guest.ready_at or time.time())
        # Found again as half started, it would only be told once more what it knows.
        with contextlib.suppress(OstlerError):
            host.remember(guest, "ready")
    return {"guest": guest.name}


def _let_go(guest: Guest, job: Job) -> None:
    """The job has done its part: what follows from it may be another one."""
    if guest.job == job.id:
        guest.job = None


def _start_failed(host: Host, guest: Guest, job: Job, error: BaseException) -> None:
    """Leave nothing half started; the restart policy counts it as a failure, unless it was called off."""
    with host.changed:
        if guest.state not in {GuestState.WAITING, GuestState.STARTING}:
            return
        was_started = guest.state is GuestState.STARTING
    if was_started:
        with contextlib.suppress(OstlerError):
            host.launcher.kill(guest.name)
    with host.changed:
        _let_go(guest, job)
        if isinstance(error, Cancelled) or not guest.is_wanted:
            guest.is_wanted = False
            rest(host, guest, GuestState.ENDED, "its start was called off")
            return
        text = " ".join(str(error).split()) or type(error).__name__
        over(host, guest, guest.ending or {"status": 1, "reason": "not started"}, reason=text)


def _await_needed(host: Host, guest: Guest, job: Job) -> None:
    needed = [host.find(name) for name in guest.host.depends_on]

    def is_decided() -> bool:
        if job.is_cancelled.is_set() or host.is_closing:
            return True
        return all(each.is_ready for each in needed) or any(_is_hopeless(each) for each in needed)

    for each in needed:
        if not each.is_ready:
            job.say(f"waiting for {each.name}")
            break
    with host.changed:
        # Whoever cancels wakes everyone who waits.
        job.cancel = lambda: _wake(host)
    host.wait_for(is_decided)
    job.check()
    if host.is_closing:
        raise Cancelled("the service ends")
    for each in needed:
        if not each.is_ready:
            raise BadRequest(f"guest {guest.name!r}: {each.name!r}, which it depends on, is {each.state.value}")


def _is_hopeless(guest: Guest) -> bool:
    return guest.state in _HOPELESS and guest.job is None


def _wake(host: Host) -> None:
    with host.changed:
        host.changed.notify_all()


def _pause(job: Job, delay_s: float) -> None:
    if delay_s > 0:
        job.say(f"waiting {delay_s:g} s")
        job.is_cancelled.wait(delay_s)
        job.check()

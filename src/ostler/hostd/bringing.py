"""Guests brought up and down: what the jobs of starting, stopping and restarting do, and what follows from an end.

A guest's end is seen by its watcher, a thread that listens to its process, whoever asked for the end; what follows
(stay ended, back off, restart) is decided there and nowhere else, but for a guest that has not been ready yet, whose
start fails instead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from ostler.errors import BadRequest, GuestNotFound, OstlerError
from ostler.hostd import ordering, restarting
from ostler.hostd.guest import ALIVE, Guest, has_failed, ran_s, state_of
from ostler.hostd.host import Host
from ostler.hostd.jobs import Cancelled, Job
from ostler.hostd.models import GuestState

HOST = "host"
# A dependency in one of these will not become ready by itself.
_HOPELESS = frozenset({GuestState.DEFINED, GuestState.ENDED, GuestState.FAILED, GuestState.STOPPING})
_STATES_BY_EVENT = {"paused": GuestState.PAUSED, "resumed": GuestState.RUNNING}


def begin_start(host: Host, name: str, by: str, *, after_s: float | None = None) -> Job | None:
    """Start a guest, and first what it needs; its own job. None where it runs already.

    Raises NotFound, BadRequest for one that is not defined or that something else is being done with, AdmissionRefused.
    """
    with host.changed:
        guest = host.find(name)
        _refuse_undefined(guest)
        order = ordering.in_order(host.graph(), [name])
        missing = [each for each in order if not _is_up(host.guests[each])]
        for each in missing:
            _refuse_undefined(host.guests[each])
            _refuse_busy(host, host.guests[each])
        _admit_all(host, missing)
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


def begin_stop(host: Host, name: str, by: str, grace_s: float | None = None) -> Job:
    """Stop a guest, and first what depends on it; its own job. A start that is under way is called off."""
    with host.changed:
        host.find(name)
        graph = host.graph()
        users = ordering.needing(graph, name)
        order = [each for each in ordering.in_order(graph) if each in users and host.guests[each].is_active]
        for each in reversed(order):
            _begin_stopping(host, host.guests[each], by, grace_s)
        return _begin_stopping(host, host.guests[name], by, grace_s)


def begin_stop_all(host: Host, by: str) -> list[Job]:
    """Stop all that are defined here, each before what it depends on."""
    with host.changed:
        order = [each for each in ordering.in_order(host.graph()) if host.guests[each].is_active]
        return [_begin_stopping(host, host.guests[each], by, None) for each in reversed(order)]


def begin_restart(host: Host, name: str, by: str, grace_s: float | None = None) -> Job:
    """Stop a guest and start it again; what depends on it runs on meanwhile."""
    with host.changed:
        guest = host.find(name)
        _refuse_undefined(guest)

        def work(job: Job) -> dict[str, Any]:
            _stop(host, guest, job, grace_s, wait_for_users=False)
            return _start(host, guest, job, None)

        return host.begin("restart", guest, by, work, alone=True, can_cancel=True)


def kill(host: Host, name: str) -> None:
    """End a guest at once, and leave it ended."""
    guest = host.find(name)
    with host.changed:
        guest.is_wanted = False
        _call_off(host, guest)
        if guest.state is GuestState.BACKING_OFF:
            _rest(host, guest, GuestState.ENDED)
            return
        if not _lives(guest) and guest.state is not GuestState.WAITING:
            raise BadRequest(f"guest {name!r}: is {guest.state.value}, expected one that runs")
        host.remember(guest, "")
    with contextlib.suppress(GuestNotFound):
        host.launcher.kill(name)
    host.wait_for(lambda: not guest.is_active, 10)


def watch(host: Host, guest: Guest) -> None:
    """Follow a guest that runs, in a thread of its own, to its end."""
    run = guest.run
    threading.Thread(target=_watch, args=(host, guest, run), name=f"watch-{guest.name}", daemon=True).start()


def complete(host: Host, guest: Guest) -> Job:
    """Finish the start of a guest whose service died in the middle of it."""
    assert guest.definition is not None
    return host.begin("start", guest, HOST, lambda job: _make_ready(host, guest, job), alone=True, can_cancel=True)


def over(host: Host, guest: Guest, ending: dict[str, Any], *, reason: str | None = None) -> None:
    """A guest has ended: what follows."""
    with host.changed:
        host.set(guest, ending=ending, is_ready=False, ready_at=None, pid=None, accelerator=None)
        if guest.broken is not None:
            host.set(guest, state=GuestState.BROKEN, reason=guest.broken.why)
            return
        if guest.definition is None:
            host.set(guest, state=state_of(ending), reason=reason)
            return
        if ending.get("reason") == "migrated":
            guest.is_wanted = False
        decision = restarting.Decision(None, 0, "")
        if guest.is_wanted and not host.is_closing:
            ran = ran_s(guest, ending)
            decision = restarting.decide(
                guest.host.restart, restarts=guest.restarts, ran_s=ran, has_failed=has_failed(ending)
            )
        guest.restarts = decision.restarts
        if decision.delay_s is None:
            said = "; ".join(each for each in (reason, decision.reason) if each)
            _rest(host, guest, GuestState.FAILED if reason and guest.is_wanted else state_of(ending), said or None)
            return
        host.set(guest, state=GuestState.BACKING_OFF, next_start=time.time() + decision.delay_s, reason=reason)
        with contextlib.suppress(OstlerError):
            host.remember(guest, "")
        run = guest.run
        host.call_later(decision.delay_s, lambda: _restart_now(host, guest, run))


def _restart_now(host: Host, guest: Guest, run: int) -> None:
    with host.changed:
        if host.is_closing or guest.run != run or guest.state is not GuestState.BACKING_OFF:
            return
        try:
            begin_start(host, guest.name, HOST)
        except OstlerError as error:
            _rest(host, guest, GuestState.FAILED, str(error))


def _rest(host: Host, guest: Guest, state: GuestState, reason: str | None = None) -> None:
    host.set(guest, state=state, next_start=None, reason=reason)
    # What cannot be kept now is found out again by the next service.
    with contextlib.suppress(OstlerError):
        host.remember(guest, "")


def _is_up(guest: Guest) -> bool:
    return guest.state in ALIVE and guest.state is not GuestState.STOPPING


def _lives(guest: Guest) -> bool:
    return guest.state in ALIVE or guest.state is GuestState.STARTING


def _refuse_undefined(guest: Guest) -> None:
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


def _admit_all(host: Host, names: list[str]) -> None:
    """Each of them beside the others: what is admitted together can be started together."""
    from ostler.errors import AdmissionRefused
    from ostler.hostd import admission

    beside = host.promised()
    for name in names:
        claim = host.guests[name].claim
        if (lack := admission.check(host.limits, beside, claim)) is not None:
            raise AdmissionRefused(admission.sentence(name, lack), lack=lack)
        beside = [*(each for each in beside if each.holder != name), claim]


def _begin_one(host: Host, guest: Guest, by: str, after_s: float | None) -> Job:
    guest.is_wanted = True
    if by != HOST:
        guest.restarts = 0
    job = host.begin("start", guest, by, lambda job: _start(host, guest, job, after_s), alone=True, can_cancel=True)
    host.set(guest, state=GuestState.WAITING, next_start=None, reason=None, ending=None)
    return job


def _start(host: Host, guest: Guest, job: Job, after_s: float | None) -> dict[str, Any]:
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
            _rest(host, guest, GuestState.ENDED, "its start was called off")
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


def _begin_stopping(host: Host, guest: Guest, by: str, grace_s: float | None) -> Job:
    guest.is_wanted = False
    _call_off(host, guest)
    wanted = guest.host.stop_grace_s if grace_s is None else grace_s
    # A start that was called off still has its guest for a moment: the job waits for that.
    return host.begin("stop", guest, by, lambda job: _stop(host, guest, job, wanted, wait_for_users=True))


def _call_off(host: Host, guest: Guest) -> None:
    if guest.job is None:
        return
    with contextlib.suppress(BadRequest):
        host.jobs.cancel(guest.job)
    if guest.state is GuestState.STARTING:
        # Whoever waits for its agent learns that it has ended.
        threading.Thread(target=_kill_quietly, args=(host, guest.name), daemon=True).start()


def _kill_quietly(host: Host, name: str) -> None:
    with contextlib.suppress(OstlerError):
        host.launcher.kill(name)


def _stop(host: Host, guest: Guest, job: Job, grace_s: float | None, *, wait_for_users: bool) -> dict[str, Any]:
    grace = guest.host.stop_grace_s if grace_s is None else grace_s
    if wait_for_users:
        users = [host.find(name) for name in ordering.needing(host.graph(), guest.name)]
        job.say("waiting for what depends on it")
        host.wait_for(lambda: host.is_closing or all(not each.is_active for each in users))
        host.wait_for(lambda: host.is_closing or guest.job in {None, job.id})
    with host.changed:
        guest.is_wanted = False
        if guest.state is GuestState.BACKING_OFF:
            _rest(host, guest, GuestState.ENDED)
        if guest.state not in ALIVE:
            return {"ending": guest.ending or {}}
        run = guest.run
        host.remember(guest, "ready")
        host.set(guest, state=GuestState.STOPPING, is_ready=False)
    job.say("shutting it down")
    with contextlib.suppress(GuestNotFound):
        host.launcher.stop(guest.name, grace)
    host.wait_for(lambda: guest.run != run or guest.state is not GuestState.STOPPING, grace + 20)
    return {"ending": guest.ending or {}}


def _watch(host: Host, guest: Guest, run: int) -> None:
    ending: dict[str, Any] = {}
    try:
        ending = host.launcher.watch(guest.name, lambda event: _heard(host, guest, run, event))
    except OstlerError as error:
        ending = {"status": 1, "reason": "died", "message": str(error)}
    if not ending:
        ending = {"status": 1, "reason": "died", "message": "its VM process was killed"}
    with host.changed:
        if guest.run != run or host.is_closing:
            return
        if guest.state is GuestState.STARTING:
            # Its start fails, and says how it ended.
            guest.ending = ending
            host.changed.notify_all()
            return
        over(host, guest, ending)


def _heard(host: Host, guest: Guest, run: int, event: dict[str, Any]) -> None:
    kind = str(event.get("event"))
    with host.changed:
        if guest.run != run:
            return
        if kind == "status":
            host.set(guest, accelerator=event.get("accelerator"), pid=event.get("pid"))
            if event.get("state") == "paused" and guest.state is GuestState.RUNNING:
                host.set(guest, state=GuestState.PAUSED)
        elif (state := _STATES_BY_EVENT.get(kind)) is not None:
            if guest.state in {GuestState.RUNNING, GuestState.PAUSED}:
                host.set(guest, state=state)
        elif kind != "ended":
            if kind == "scheduled":
                guest.spec = {**guest.spec, "cpu_reserve": event.get("reserve")}
            host.events.publish(f"guest.{kind}", guest.name, {k: v for k, v in event.items() if k != "event"})

"""Guests brought down, each before what it depends on; killed, and stopped to be started again."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from ostler.errors import BadRequest, GuestNotFound, OstlerError
from ostler.hostd import ordering
from ostler.hostd.following import rest
from ostler.hostd.guest import ALIVE, Guest
from ostler.hostd.host import Host
from ostler.hostd.jobs import Job
from ostler.hostd.models import GuestState
from ostler.hostd.starting import refuse_undefined, start


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
        refuse_undefined(guest)

        def work(job: Job) -> dict[str, Any]:
            _stop(host, guest, job, grace_s, wait_for_users=False)
            return start(host, guest, job, None)

        return host.begin("restart", guest, by, work, alone=True, can_cancel=True)


def kill(host: Host, name: str) -> None:
    """End a guest at once, and leave it ended."""
    guest = host.find(name)
    with host.changed:
        guest.is_wanted = False
        _call_off(host, guest)
        if guest.state is GuestState.BACKING_OFF:
            rest(host, guest, GuestState.ENDED)
            return
        if not _lives(guest) and guest.state is not GuestState.WAITING:
            raise BadRequest(f"guest {name!r}: is {guest.state.value}, expected one that runs")
        host.remember(guest, "")
    with contextlib.suppress(GuestNotFound):
        host.launcher.kill(name)
    host.wait_for(lambda: not guest.is_active, 10)


def _lives(guest: Guest) -> bool:
    return guest.state in ALIVE or guest.state is GuestState.STARTING


def _begin_stopping(host: Host, guest: Guest, by: str, grace_s: float | None) -> Job:
    guest.is_wanted = False
    _call_off(host, guest)
    wanted = guest.host.stop_grace_s if grace_s is None else grace_s
    # A start that was called off still has its guest for a moment: the job waits for that.
    return host.begin("stop", guest, by, lambda job: _stop(host, guest, job, wanted, wait_for_users=True))


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
            rest(host, guest, GuestState.ENDED)
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

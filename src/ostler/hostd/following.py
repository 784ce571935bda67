"""A guest followed to its end, and what comes after it.

A guest's end is seen by its watcher, a thread that listens to its process, whoever asked for the end; what follows
(stay ended, back off, restart) is decided here and nowhere else, but for a guest that has not been ready yet, whose
start fails instead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from ostler.errors import OstlerError
from ostler.hostd import restarting
from ostler.hostd.guest import Guest, has_failed, ran_s, state_of
from ostler.hostd.host import Host
from ostler.hostd.models import GuestState

_STATES_BY_EVENT = {"paused": GuestState.PAUSED, "resumed": GuestState.RUNNING}


def watch(host: Host, guest: Guest) -> None:
    """Follow a guest that runs, in a thread of its own, to its end."""
    run = guest.run
    threading.Thread(target=_watch, args=(host, guest, run), name=f"watch-{guest.name}", daemon=True).start()


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
            rest(host, guest, GuestState.FAILED if reason and guest.is_wanted else state_of(ending), said or None)
            return
        host.set(guest, state=GuestState.BACKING_OFF, next_start=time.time() + decision.delay_s, reason=reason)
        with contextlib.suppress(OstlerError):
            host.remember(guest, "")
        run = guest.run
        host.call_later(decision.delay_s, lambda: host.restart(host, guest, run))


def rest(host: Host, guest: Guest, state: GuestState, reason: str | None = None) -> None:
    """Leave a guest that has ended as it is, and remember that."""
    host.set(guest, state=state, next_start=None, reason=reason)
    # What cannot be kept now is found out again by the next service.
    with contextlib.suppress(OstlerError):
        host.remember(guest, "")


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

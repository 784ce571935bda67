"""How a service begins: what its forerunner left, which guests run, which are to be started; and how it keeps looking.

Guests outlive the service. Each that runs is adopted as it is; one whose start was under way is completed; one that
ended meanwhile is treated as if its end had been seen; jobs that were open get a truthful end.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any, Self

from ostler.errors import BadRequest, OstlerError
from ostler.hostd import definition, following, ordering, starting
from ostler.hostd.database import Database
from ostler.hostd.definition import Definition
from ostler.hostd.guest import Broken, Guest
from ostler.hostd.host import Host
from ostler.hostd.launcher import Found, Launcher
from ostler.hostd.models import GuestState, JobState, JobView
from ostler.hostd.store import Remembered, Store

LOOK_EVERY_S = 2.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_EVENTS_AHEAD = 10_000


def open_host(
    database: Database, launcher: Launcher, *, limits: dict[str, int], files: dict[str, Definition] | None = None,
    boot_id: str | None = None, **options: Any,
) -> Host:  # fmt: skip
    """A service's host, with everything adopted and the starting begun.

    `files` are definitions that win over those that are kept. One that was kept and is no good any more is told as
    broken, and keeps nobody else from starting. Raises BadRequest where `files` need each other in a circle.
    """
    store = Store(database)
    boot = boot_id if boot_id is not None else BOOT_ID.read_text().strip()
    is_new_boot = database.meta("boot_id") != boot
    first = int(database.meta("next_event") or 1)
    # Whoever counts on numbers growing is not disappointed by a service that could not say where it was.
    database.set_meta("next_event", str(first + _EVENTS_AHEAD))
    database.set_meta("boot_id", boot)
    host = Host(store, launcher, restart=starting.restart, limits=limits, first_event=first, **options)
    remembered, found = store.guests(), launcher.found()
    _define(host, store, files or {})
    for name, each in found.items():
        known = host.guests.get(name) or Guest(name)
        _meet(known, each, remembered.get(name, Remembered()))
        host.guests[name] = known
    settled = host.jobs.settle(lambda view: _judge(host, view))
    _go_on(host, found, remembered, is_new_boot=is_new_boot)
    host.events.publish("host", None, {"what": "started", "settled_jobs": len(settled)})
    database.back_up()
    return host


def _define(host: Host, store: Store, files: dict[str, Definition]) -> None:
    good, broken = _judged({name: table for name, table in store.definitions().items() if name not in files})
    good |= files
    graph = {name: each.host.depends_on for name, each in good.items()} | dict.fromkeys(broken, ())
    for name, why in ordering.impossible(graph).items():
        if name in files:
            raise BadRequest(f"guest {name!r}: {why}")
        broken[name] = Broken(why, good.pop(name).table)
    if files:
        store.put_definitions({name: each.table for name, each in files.items()})
    for name, each in good.items():
        host.guests[name] = Guest(name, each)
    for name, trouble in sorted(broken.items()):
        host.guests[name] = Guest(name, broken=trouble, state=GuestState.BROKEN, reason=trouble.why)
        host.events.publish("definition", name, {"name": name, "what": "broken", "reason": trouble.why})


def _judged(tables: dict[str, Any]) -> tuple[dict[str, Definition], dict[str, Broken]]:
    """What was kept, by the rules of today: an earlier Ostler's, or a hand in the database, may have had others."""
    good, broken = {}, {}
    for name, table in tables.items():
        try:
            good[name] = definition.parse(name, table)
        except (BadRequest, TypeError, ValueError) as error:
            broken[name] = Broken(" ".join(str(error).split()), table if isinstance(table, dict) else {})
    return good, broken


def _meet(guest: Guest, found: Found, known: Remembered) -> None:
    guest.facts, guest.spec = found.facts, found.spec
    guest.restarts, guest.is_wanted = known.restarts, known.is_wanted
    if found.is_running:
        is_ready = guest.definition is None or known.phase == "ready"
        guest.state = GuestState.RUNNING if is_ready else GuestState.STARTING
        guest.is_ready = is_ready
        guest.is_wanted = True
    else:
        guest.ending = found.end or known.ending
        if not guest.is_defined:
            guest.state = GuestState.ENDED if found.end else GuestState.FAILED


def _go_on(host: Host, found: dict[str, Found], remembered: dict[str, Remembered], *, is_new_boot: bool) -> None:
    wanted = []
    for guest in [*host.guests.values()]:
        if guest.name in found and found[guest.name].is_running:
            following.watch(host, guest)
            if guest.state is GuestState.STARTING:
                starting.complete(host, guest)
            continue
        known = remembered.get(guest.name)
        if guest.definition is None:
            continue
        if known is not None and known.is_wanted and known.phase == "ready" and not is_new_boot:
            # It ended while nobody looked.
            guest.is_wanted = True
            ending = guest.ending or {"status": 1, "reason": "died", "message": "its VM process was killed"}
            following.over(host, guest, ending)
        elif known is not None and known.is_wanted and not is_new_boot:
            # Its start was under way, or its restart waited for its time.
            wanted.append(guest.name)
        elif guest.host.autostart and (is_new_boot or known is None):
            wanted.append(guest.name)
        elif known is not None and known.ending:
            guest.ending = known.ending
            guest.state = GuestState.ENDED if known.ending.get("status") == 0 else GuestState.FAILED
    starting.begin_all(host, wanted, starting.HOST)


def _judge(host: Host, view: JobView) -> tuple[JobState, str]:
    """What has become of a job whose service ended."""
    guest = host.guests.get(view.guest or "")
    runs = guest is not None and guest.state in {GuestState.RUNNING, GuestState.STARTING}
    is_ready = runs and guest is not None and guest.is_ready
    created = float(guest.facts.get("created") or 0) if guest is not None else 0.0
    interrupted = JobState.INTERRUPTED, "the service ended before it did"
    if view.kind == "start" and is_ready:
        return JobState.DONE, "the guest runs"
    if view.kind == "start" and runs:
        return JobState.INTERRUPTED, "the service ended before it did; the guest runs, and its start is being completed"
    if view.kind == "stop" and not runs:
        return JobState.DONE, "the guest has ended"
    if view.kind == "restart" and is_ready and created >= (view.started or view.created):
        return JobState.DONE, "the guest runs again"
    if view.kind == "migrate" and guest is not None and (guest.ending or {}).get("reason") == "migrated":
        return JobState.DONE, "the guest has moved"
    return interrupted


class Looking:
    """Keeps an eye on guests that somebody else starts and removes; a context manager."""

    def __init__(self, host: Host, *, every_s: float = LOOK_EVERY_S) -> None:
        self._host, self._every_s = host, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="looking", daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            with contextlib.suppress(OstlerError, OSError):
                look(self._host)
            self._host.jobs.save_again()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()


def look(host: Host) -> None:
    """Once: strangers that came are shown and watched, those that went are forgotten."""
    found = host.launcher.found()
    with host.changed:
        for name, each in found.items():
            known = host.guests.get(name)
            if known is None or not (known.is_defined or known.is_active):
                _take_in(host, known or Guest(name), each)
        for guest in [*host.guests.values()]:
            if not guest.is_defined and guest.name not in found:
                host.drop(guest)


def _take_in(host: Host, guest: Guest, found: Found) -> None:
    if not found.is_running:
        if guest.name not in host.guests:
            _meet(guest, found, Remembered())
            host.set(guest)
        return
    guest.run += 1
    host.set(
        guest, facts=found.facts, spec=found.spec, state=GuestState.RUNNING, is_ready=True, ending=None, reason=None,
        ready_at=time.time(),
    )  # fmt: skip
    following.watch(host, guest)

"""Memory taken back from guests while the host is short of it, and given back when it is not: the policy's caller.

How much is taken from whom is `ostler.client.relief`'s to say. Here is when: less than `below` is available, so that
much is taken that `until` is; well above that again, balloons are let out as far as `until` stays. What was taken is
kept in the database, so that a service after this one gives it back. A host that could not be helped is left alone
for a while, for trying costs the guests time.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from ostler.client import relief
from ostler.control import runtime
from ostler.errors import OstlerError
from ostler.hostd.guest import ALIVE
from ostler.hostd.host import Host
from ostler.hostd.settings import Relief

LOOK_EVERY_S = 5.0
FIRST_REST_S, LONGEST_REST_S = 15.0, 600.0
META = "ballooned"
Relieve = Callable[[Sequence[str], int, Sequence[str]], dict[str, Any]]
"""Guests' names, bytes needed, steps: `relief.relieve`'s report."""


def wanted(available_bytes: int, *, below_bytes: int, until_bytes: int) -> int:
    """How much to take back from guests; less than nothing: how much can be given back to them. Pure."""
    if available_bytes < below_bytes:
        return until_bytes - available_bytes
    # As far above as `below` is beneath, so that giving back is not followed by taking.
    if available_bytes > 2 * until_bytes - below_bytes:
        return until_bytes - available_bytes
    return 0


def relieve(names: Sequence[str], need_bytes: int, steps: Sequence[str]) -> dict[str, Any]:
    """Of guests that are processes of this user's."""
    entries = [entry for entry in runtime.entries() if entry.name in names and entry.is_running()]
    return relief.relieve(entries, need_bytes=need_bytes, steps=steps)


class Pressure:
    """Looks every few seconds, by a thread of its own; a context manager."""

    def __init__(
        self, host: Host, settings: Relief, *, available: Callable[[], tuple[int, int]] = relief.host_available_bytes,
        relieve: Relieve = relieve, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`available` says how much memory is, and how much there is in all."""
        self._host, self._settings, self._available = host, settings, available
        self._relieve, self._clock = relieve, clock
        self._taken: dict[str, list[int]] = json.loads(host.store.database.meta(META) or "{}")
        """By guest: what it had, and what it was left."""
        self._rest_s, self._rests_until = 0.0, float("-inf")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def look(self) -> None:
        """Once: take back, give back, or neither."""
        available, size = self._available()
        below, until = self._settings.bounds(size)
        need = wanted(available, below_bytes=below, until_bytes=until)
        if need > 0:
            self._take(available, need)
        elif need < 0:
            self._rest_s, self._rests_until = 0.0, float("-inf")
            if self._taken:
                self._give(-need)

    def _take(self, available: int, need: int) -> None:
        names = self._running()
        if not names or self._clock() < self._rests_until:
            return
        self._host.events.publish(
            "host", None, {"what": "memory-short", "available_bytes": available, "need_bytes": need}
        )
        report = self._relieve(names, need, self._settings.steps)
        for name, each in report["steps"].get("balloon", {}).items():
            had = self._taken.get(name, [each["was_bytes"]])[0]
            self._taken[name] = [had, each["guest_bytes"]]
        self._remember()
        self._host.events.publish(
            "host", None,
            {"what": "memory-relieved", "freed_bytes": max(0, report["freed_bytes"]), "need_bytes": need,
             "steps": report["steps"], "refused": report["refused"]},
        )  # fmt: skip
        if report["freed_bytes"] >= need:
            self._rest_s = 0.0
        else:
            self._rest_s = min(LONGEST_REST_S, max(FIRST_REST_S, self._rest_s * 2))
            self._rests_until = self._clock() + self._rest_s

    def _give(self, spare: int) -> None:
        given: dict[str, int] = {}
        running = set(self._running())
        for name, (had, left) in sorted(self._taken.items()):
            grown = min(had, left + spare - sum(given.values()))
            if name not in running:
                del self._taken[name]
            elif grown > left:
                # One that ends just now has its memory back as it is.
                with contextlib.suppress(OstlerError):
                    self._host.launcher.ask(name, "balloon", guest_bytes=grown)
                    given[name] = grown - left
                    self._taken[name] = [had, grown]
                if grown == had:
                    self._taken.pop(name, None)
        self._remember()
        if given:
            self._host.events.publish("host", None, {"what": "memory-given-back", "guests": given})

    def _running(self) -> list[str]:
        with self._host.changed:
            return sorted(each.name for each in self._host.guests.values() if each.state in ALIVE)

    def _remember(self) -> None:
        # A full disk forgets it over a restart of the service, no more.
        with contextlib.suppress(OstlerError):
            self._host.store.database.set_meta(META, json.dumps(self._taken))

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            with contextlib.suppress(OstlerError, OSError):
                self.look()

    def __enter__(self) -> Self:
        if self._settings.below != 0:
            self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

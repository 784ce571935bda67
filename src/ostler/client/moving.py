"""Moving guests from a client's side: asked for, watched, called off; several at once under one limit of bandwidth."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostler.client import guests
from ostler.control.connection import Connection, ConnectionLost
from ostler.control.runtime import Entry
from ostler.errors import GuestNotFound, MigrationError, OstlerError
from ostler.migration.address import TlsFiles, check_privacy, parse_address

# Each copy wants a processor on both sides. More at a time send more pages twice and arrive no sooner.
AT_ONCE = 2

Told = Callable[[str, dict[str, Any]], None]
"""Told a guest's name and how far it is."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How guests are to be moved."""

    address: str
    tls: TlsFiles | None = None
    insecure: bool = False
    streams: int = 1
    compression: str = "none"
    bytes_per_s: float | None = None
    """For all guests together."""
    at_once: int = AT_ONCE
    """How many are on their way at a time; the others wait where they run."""
    downtime_ms: float = 40
    name: str | None = None
    post_copy: str = "never"
    """`never`, `auto` or `now`: whether the guest may go before its memory has."""

    def check(self) -> None:
        """Raises BadRequest."""
        check_privacy(parse_address(self.address), self.tls, insecure=self.insecure)

    def arguments(self, bytes_per_s: float | None) -> dict[str, Any]:
        """As the control operation takes them."""
        address = self.address
        if address.startswith("unix:"):
            # The VM process has a working folder of its own.
            address = f"unix:{Path(parse_address(address).path)}"
        found: dict[str, Any] = {
            "address": address, "streams": self.streams, "compression": self.compression,
            "downtime_ms": self.downtime_ms, "bytes_per_s": bytes_per_s or 0, "post_copy": self.post_copy,
        }  # fmt: skip
        if self.name:
            found["name"] = self.name
        if self.tls is not None:
            found |= {"tls_cert": str(self.tls.cert), "tls_key": str(self.tls.key), "tls_ca": str(self.tls.ca)}
        return found


def migrate(entry: Entry, wish: Wish, *, told: Told | None = None) -> dict[str, Any]:
    """Move one guest; what is known of its move. Calls it off when this thread is interrupted.

    Raises MigrationError and its kin: the guest runs on where it was, unless the message says otherwise.
    """
    facts: dict[str, Any] = migrate_all([entry], wish, told=told)[entry.name]
    return facts


def migrate_all(entries: Sequence[Entry], wish: Wish, *, told: Told | None = None) -> dict[str, Any]:
    """Move several, who share the bandwidth. An OstlerError stands for one that could not be moved.

    With a single guest its error is raised.
    """
    wish.check()
    budget = _SharedBudget(entries, wish.bytes_per_s, wish.at_once)
    found: dict[str, Any] = {}
    waiting = collections.deque(entries)

    def move(entry: Entry) -> None:
        try:
            found[entry.name] = _move(entry, wish.arguments(budget.share), told)
        except OstlerError as error:
            found[entry.name] = error
        except (OSError, ConnectionLost) as error:
            found[entry.name] = MigrationError(f"guest {entry.name!r}: {error}")
        finally:
            budget.is_free(entry)

    def work() -> None:
        with contextlib.suppress(IndexError):
            while True:
                move(waiting.popleft())

    threads = [
        threading.Thread(target=work, name=f"move-{number}") for number in range(min(wish.at_once, len(entries)))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        waiting.clear()
        for entry in entries:
            with contextlib.suppress(OstlerError):
                cancel(entry)
        for thread in threads:
            thread.join()
        raise
    if len(entries) == 1 and isinstance(error := found[entries[0].name], OstlerError):
        raise error
    return found


def cancel(entry: Entry) -> None:
    """Call a migration off. Raises BadRequest where there is none, MigrationError where it is too late."""
    guests.request(entry, "migrate-cancel")


def _move(entry: Entry, arguments: dict[str, Any], told: Told | None) -> dict[str, Any]:
    with Connection.to(entry) as connection:
        listening = None
        if told is not None:
            listening = threading.Thread(target=_listen, args=(entry, told), daemon=True)
            listening.start()
        try:
            return connection.request("migrate", timeout_s=None, **arguments)
        except ConnectionLost as error:
            raise GuestNotFound(f"guest {entry.name!r}: ended while it was being moved") from error
        finally:
            if listening is not None:
                listening.join(1.0)


def _listen(entry: Entry, told: Told) -> None:
    with contextlib.suppress(OstlerError, OSError), Connection.to(entry) as connection:
        for event in connection.events():
            if event["event"] == "migration":
                told(entry.name, event)
            elif event["event"] in ("migrated", "migration-failed"):
                return


class _SharedBudget:
    """One limit over several guests: what a guest needs no more goes to the others."""

    def __init__(self, entries: Sequence[Entry], bytes_per_s: float | None, at_once: int) -> None:
        self._left, self._limit, self._at_once = list(entries), bytes_per_s, at_once
        self._lock = threading.Lock()

    @property
    def share(self) -> float | None:
        return self._limit / max(1, min(self._at_once, len(self._left))) if self._limit else None

    def is_free(self, entry: Entry) -> None:
        with self._lock:
            self._left = [each for each in self._left if each is not entry]
            share, left = self.share, [*self._left]
        if share is not None:
            for each in left:
                with contextlib.suppress(OstlerError, OSError):
                    guests.request(each, "migrate-limit", bytes_per_s=share)

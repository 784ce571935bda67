"""Several guests moved by one wish: so many at a time, under one limit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from ostler.client import moving
from ostler.control.runtime import Entry
from ostler.errors import MigrationError, OstlerError

ENTRIES = [Entry(f"guest-{number}", Path("/nowhere")) for number in range(6)]


def test_guests_move_so_many_at_a_time_and_share_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)
    lock = threading.Lock()
    on_their_way: set[str] = set()
    most = 0
    rates: list[float] = []

    def move(entry: Entry, arguments: dict[str, Any], _told: object) -> dict[str, Any]:
        nonlocal most
        with lock:
            on_their_way.add(entry.name)
            most = max(most, len(on_their_way))
            rates.append(arguments["bytes_per_s"])
        # Nobody leaves before another is on its way too: two at a time are reached, three must not be.
        together.wait(30)
        with lock:
            on_their_way.remove(entry.name)
        return {"moved": entry.name}

    monkeypatch.setattr(moving, "_move", move)
    found = moving.migrate_all(ENTRIES, moving.Wish(address="unix:/x", bytes_per_s=100.0, at_once=2))
    assert found == {entry.name: {"moved": entry.name} for entry in ENTRIES}
    assert most == 2
    assert set(rates) == {50.0}


def test_guest_that_cannot_move_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def move(entry: Entry, _arguments: object, _told: object) -> dict[str, Any]:
        if entry is ENTRIES[2]:
            raise MigrationError("no room")
        return {}

    monkeypatch.setattr(moving, "_move", move)
    found = moving.migrate_all(ENTRIES, moving.Wish(address="unix:/x", at_once=1))
    assert [name for name, facts in found.items() if isinstance(facts, OstlerError)] == ["guest-2"]
    assert len(found) == len(ENTRIES)

"""What a client says of guests without asking a machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from ostler.client import guests
from ostler.control.runtime import Entry
from ostler.errors import AgentUnavailable, GuestPaused


@pytest.mark.parametrize("states", [["paused"], ["running", "paused"]])
def test_paused_guest_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, states: list[str]) -> None:
    monkeypatch.setattr(guests, "STILL_S", 0)
    monkeypatch.setattr(guests, "_state", lambda _entry: states.pop(0))

    with pytest.raises(GuestPaused, match="guest 'web': is paused; `ostler resume web`"):
        guests.reach_agent(Entry("web", tmp_path), timeout_s=3600)


def test_guest_that_stands_still_for_a_moment_only_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:  # fmt: skip
    states = ["paused", "paused", "running"]
    monkeypatch.setattr(guests, "STILL_SLICE_S", 0)
    monkeypatch.setattr(guests, "_state", lambda _entry: states.pop(0))

    guests.refuse_paused(Entry("web", tmp_path))

    assert states == []


def test_guest_that_does_not_run_any_more_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(AgentUnavailable, match="the guest ended"):
        guests.reach_agent(Entry("web", tmp_path), timeout_s=3600)

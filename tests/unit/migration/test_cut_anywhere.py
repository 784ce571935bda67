"""Real processes, sockets and witnesses, killed or cut off before every act that the other side could notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LIVES, GONE = 10, 11


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("cut_anywhere.py")], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(runs: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Runs in which the end came; the last of each series is one that went well."""
    found = [each for each in runs if each["what"] == what and each["statuses"][each["side"]] not in (20, 21)]
    assert len(found) > 8
    return found


def living(run: dict[str, Any]) -> list[str]:
    return [side for side, status in run["statuses"].items() if status % 10 == 0]


def test_whatever_ends_when_two_copies_never_run(runs: list[dict[str, Any]]) -> None:
    assert all(status in (-9, LIVES, GONE, 20, 21) for each in runs for status in each["statuses"].values())
    assert max(len(living(each)) for each in runs) == 1
    undisturbed = [each for each in runs if each["statuses"][each["side"]] in (20, 21)]
    assert [living(each) for each in undisturbed] == [["target"]] * 4


def test_link_cut_before_any_act_leaves_exactly_one_copy(runs: list[dict[str, Any]]) -> None:
    assert [each for each in of(runs, "link") if len(living(each)) != 1] == []


def test_target_killed_before_any_act_leaves_the_source_until_the_guest_runs_there(runs: list[dict[str, Any]]) -> None:
    for each in of(runs, "target"):
        assert living(each) == ([] if each["words"]["target"] == "running" else ["source"])


def test_source_killed_before_any_act_leaves_the_target_once_it_has_everything(runs: list[dict[str, Any]]) -> None:
    killed = of(runs, "source")
    lives = [living(each) == ["target"] for each in killed]
    # Once the target is able to go on, it does, whatever comes after.
    first = lives.index(True)
    assert all(lives[first:])
    # And that is before the source gives the guest away: in between either may be killed.
    assert killed[first]["words"]["source"] == "stopped"
    assert {each["words"]["source"] for each in killed[:first]} == {"", "moving", "stopped"}

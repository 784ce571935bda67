"""`ostler stats --engine`: a rate from two looks, one row a guest."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from ostler.cli import stats
from ostler.cli.app import app
from ostler.client import guests
from ostler.control import runtime
from ostler.control.runtime import Entry

COUNTERS = ("blocks", "translations", "code_bytes", "flushes", "tlb_misses", "invalidations", "exits")


def look(uptime_s: float, instructions: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {"uptime_ns": round(uptime_s * 1e9)}
    if instructions is not None:
        found["engine"] = {"instructions": instructions, **dict.fromkeys(COUNTERS, 12_000)}
    return found


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> dict[str, list[dict[str, Any]]]:
    """What guests answer, in turn, by name."""
    answers: dict[str, list[dict[str, Any]]] = {}
    monkeypatch.setattr(stats, "_RATE_OVER_S", 0)
    monkeypatch.setattr(runtime, "find", lambda name: Entry(name, tmp_path))
    monkeypatch.setattr(guests, "request", lambda entry, _op: answers[entry.name].pop(0))
    return answers


def test_engine_shows_instructions_a_second_between_two_looks(looks: dict[str, list[dict[str, Any]]]) -> None:
    looks["web"] = [look(10, 1_000_000), look(12, 401_000_000)]
    looks["kvm"] = [look(10, None), look(12, None)]

    lines = CliRunner().invoke(app, ["stats", "--engine", "web", "kvm"]).stdout.splitlines()

    assert lines[1].split()[:4] == ["web", "401.0M", "200.0M", "12.0k"]
    assert set(lines[2].split()) == {"kvm", "-"}


def test_engine_as_json_has_the_rate_beside_the_counters(looks: dict[str, list[dict[str, Any]]]) -> None:
    looks["web"] = [look(1, 0), look(2, 70)]

    found = CliRunner().invoke(app, ["stats", "--engine", "--json", "web"]).stdout

    assert '"instructions_per_s": 70' in found

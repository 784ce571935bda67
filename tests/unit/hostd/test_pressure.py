"""A host short of memory: taken, given back, remembered, left alone where it does not help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.hostd import stopping
from ostler.hostd.host import Host
from ostler.hostd.pressure import FIRST_REST_S, LONGEST_REST_S, Pressure, wanted
from ostler.hostd.settings import Relief
from tests.unit.hostd.fakes import GIB, FakeLauncher, bring_up, opened

BELOW, UNTIL, SIZE = 1 * GIB, 2 * GIB, 16 * GIB


class Balloons(FakeLauncher):
    """Notes what guests are asked to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int]] = []

    def ask(self, name: str, op: str, *, timeout_s: float | None = 30.0, **arguments: object) -> dict[str, Any]:
        if op == "balloon":
            self.asked.append((name, int(str(arguments["guest_bytes"]))))
        return super().ask(name, op, timeout_s=timeout_s, **arguments)


class Simulated:
    """A host with so much memory available, and guests that give what is asked, or less."""

    def __init__(self, host: Host, **settings: Any) -> None:
        self.available, self.now, self.gives = 8 * GIB, 0.0, SIZE
        self.calls: list[tuple[tuple[str, ...], int, tuple[str, ...]]] = []
        self.pressure = Pressure(
            host, Relief(below=BELOW, until=UNTIL, **settings), available=lambda: (self.available, SIZE),
            relieve=self._relieve, clock=lambda: self.now,
        )  # fmt: skip

    def look(self, available: int) -> None:
        self.available = available
        self.pressure.look()

    def _relieve(self, names: Sequence[str], need_bytes: int, steps: Sequence[str]) -> dict[str, Any]:
        self.calls.append((tuple(names), need_bytes, tuple(steps)))
        freed = min(need_bytes, self.gives)
        balloons = {names[0]: {"was_bytes": 4 * GIB, "guest_bytes": 4 * GIB - freed, "held_bytes": freed}}
        return {"steps": {"balloon": balloons}, "refused": {}, "freed_bytes": freed}


@pytest.fixture
def launcher() -> Balloons:
    return Balloons()


@pytest.fixture
def host(tmp_path: Path, launcher: Balloons) -> Iterator[Host]:
    with opened(tmp_path, launcher) as found:
        bring_up(found, "db")
        yield found


def said(host: Host) -> list[str]:
    events = host.events.since(0)
    return [str(each.data["what"]) for each in events if each.kind == "host" and "memory" in each.data["what"]]


@given(st.integers(0, SIZE), st.integers(1, SIZE), st.integers(0, SIZE))
def test_wanted_never_takes_what_it_gave_nor_gives_what_it_took(available: int, below: int, more: int) -> None:
    until = below + more
    change = wanted(available, below_bytes=below, until_bytes=until)

    assert change == 0 or available + change == until
    assert wanted(available + change, below_bytes=below, until_bytes=until) == 0


def test_look_short_host_takes_back_what_is_missing_and_says_so(host: Host) -> None:
    simulated = Simulated(host)

    simulated.look(8 * GIB)
    assert simulated.calls == []
    simulated.look(GIB // 2)

    assert simulated.calls == [(("db",), UNTIL - GIB // 2, ("reporting", "balloon"))]
    assert said(host) == ["memory-short", "memory-relieved"]
    (last,) = [each.data for each in host.events.since(0) if each.data.get("what") == "memory-relieved"]
    assert last["freed_bytes"] == last["need_bytes"] == UNTIL - GIB // 2


def test_look_steps_are_the_settings(host: Host) -> None:
    simulated = Simulated(host, steps=("merge",))

    simulated.look(0)

    assert simulated.calls[0][2] == ("merge",)


def test_look_host_with_memory_again_lets_balloons_out_as_far_as_it_can(host: Host, launcher: Balloons) -> None:
    simulated = Simulated(host)
    simulated.look(0)
    simulated.look(UNTIL)
    assert launcher.asked == []

    simulated.look(2 * UNTIL - BELOW + GIB // 4)
    assert launcher.asked == [("db", 2 * GIB + UNTIL - BELOW + GIB // 4)]
    simulated.look(8 * GIB)
    simulated.look(8 * GIB)

    assert launcher.asked[1:] == [("db", 4 * GIB)]
    assert said(host)[2:] == ["memory-given-back"] * 2


def test_look_taken_twice_gives_all_of_it_back(host: Host, launcher: Balloons) -> None:
    simulated = Simulated(host)
    simulated.look(0)
    simulated.look(GIB // 2)

    simulated.look(SIZE)

    assert launcher.asked == [("db", 4 * GIB)]


def test_look_guest_that_has_ended_is_not_asked(host: Host, launcher: Balloons) -> None:
    simulated = Simulated(host)
    simulated.look(0)
    host.jobs.wait(stopping.begin_stop(host, "db", "test").id, 20)

    simulated.look(SIZE)

    assert launcher.asked == []


def test_look_that_did_not_help_is_not_repeated_at_once(host: Host) -> None:
    simulated = Simulated(host)
    simulated.gives = 0
    moments: list[int] = []
    for second in range(3000):
        simulated.now = float(second)
        simulated.look(0)
        if len(simulated.calls) > len(moments):
            moments.append(second)

    assert moments[:4] == [0, FIRST_REST_S, 3 * FIRST_REST_S, 7 * FIRST_REST_S]
    assert moments[-1] - moments[-2] == LONGEST_REST_S


def test_look_after_a_restart_of_the_service_gives_back_what_its_forerunner_took(tmp_path: Path) -> None:
    launcher = Balloons()
    with opened(tmp_path, launcher, crash=True) as host:
        bring_up(host, "db")
        Simulated(host).look(0)
    with opened(tmp_path, launcher) as host:
        Simulated(host).look(SIZE)

    assert launcher.asked == [("db", 4 * GIB)]


def test_bounds_are_parts_of_the_host_where_nothing_is_said() -> None:
    assert Relief().bounds(20 * GIB) == (GIB, 2 * GIB)
    assert Relief(below=3 * GIB).bounds(20 * GIB) == (3 * GIB, 6 * GIB)
    assert Relief(below=3 * GIB, until=GIB).bounds(20 * GIB) == (3 * GIB, 3 * GIB)

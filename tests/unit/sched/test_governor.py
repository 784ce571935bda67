"""Governors of several guests on one simulated host: the real table, policy and ledgers, with time made up."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ostler.sched.governor import Governor, GovernorThread
from ostler.sched.table import Share, Table
from ostler.testing.simulated_host import SimulatedGuest, SimulatedHost, always

Hosts = Callable[..., SimulatedHost]
SETTLE_MS, RUN_MS = 1_000, 5_000


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Hosts]:
    made: list[SimulatedHost] = []

    def make(cpus: int, *, others: float = 0.0) -> SimulatedHost:
        made.append(SimulatedHost(tmp_path, cpus, others=others))
        return made[-1]

    yield make
    for each in made:
        each.close()


def shares_of(host: SimulatedHost) -> list[float]:
    host.run(SETTLE_MS)
    return host.run(RUN_MS)


@pytest.mark.parametrize("others", [0.0, 0.4])
@pytest.mark.parametrize("cpus", [1, 2])
def test_weights_are_respected_whatever_else_the_host_does(host: Hosts, cpus: int, others: float) -> None:
    simulated = host(cpus, others=others)
    for weight in (100, 200, 400):
        simulated.add(Share(weight), vcpus=cpus)
    had = shares_of(simulated)
    assert sum(had) == pytest.approx(cpus * (1 - others), rel=0.01)
    assert [each / sum(had) for each in had] == pytest.approx([1 / 7, 2 / 7, 4 / 7], rel=0.05)


def test_what_the_heaviest_cannot_use_goes_to_the_others(host: Hosts) -> None:
    simulated = host(2)
    for weight in (100, 200, 400):
        simulated.add(Share(weight))
    assert shares_of(simulated) == pytest.approx([1 / 3, 2 / 3, 1], rel=0.05)


def test_cap_holds_on_an_idle_host(host: Hosts) -> None:
    simulated = host(2)
    simulated.add(Share(cap=0.25))
    simulated.add(Share(cap=1.5), vcpus=2)
    assert shares_of(simulated) == pytest.approx([0.25, 1.5], abs=0.01)


def test_reservation_holds_against_ten_greedy_guests(host: Hosts) -> None:
    simulated = host(1)
    simulated.add(Share(reserve=0.3))
    for _ in range(10):
        simulated.add(Share())
    had = shares_of(simulated)
    assert had[0] == pytest.approx(0.3, abs=0.01)
    # Each has a turn of 10 ms in 140, and perhaps one more or less than another in five seconds.
    assert had[1:] == pytest.approx([0.07] * 10, abs=0.015)


def test_guest_that_rests_leaves_its_share_to_the_others_and_gets_it_back(host: Hosts) -> None:
    simulated = host(1)
    simulated.add(Share(300), wants=lambda ms: 0.0 if ms < 4_000 else 1.0)
    simulated.add(Share(100))
    assert simulated.run(4_000) == pytest.approx([0, 1], abs=0.03)
    # `wants` counts from the beginning of each run.
    simulated.guests[0].wants = lambda _ms: 1.0
    simulated.run(200)
    assert simulated.run(4_000) == pytest.approx([0.75, 0.25], abs=0.03)


def test_guest_that_wants_a_little_gets_it_whatever_its_weight(host: Hosts) -> None:
    simulated = host(1)
    simulated.add(Share(100), wants=lambda _ms: 0.05)
    simulated.add(Share(900))
    assert shares_of(simulated) == pytest.approx([0.05, 0.95], abs=0.01)


def test_pinned_guests_compete_only_where_they_are(host: Hosts) -> None:
    simulated = host(2)
    simulated.add(Share(100, cpus=frozenset({0})))
    simulated.add(Share(300, cpus=frozenset({0})))
    simulated.add(Share(100, cpus=frozenset({1})))
    assert shares_of(simulated) == pytest.approx([0.25, 0.75, 1], abs=0.02)


def test_nobody_is_held_back_while_nobody_asked_for_anything(host: Hosts) -> None:
    simulated = host(1)
    for _ in range(3):
        simulated.add(Share())
    assert simulated.run(100) == pytest.approx([1 / 3] * 3)
    assert [guest.governor.enforcement for guest in simulated.guests] == ["none"] * 3
    assert [guest.next_ns for guest in simulated.guests] == [None] * 3


def test_share_changed_while_running_is_followed_at_once(host: Hosts) -> None:
    simulated = host(1)
    first, second = simulated.add(Share()), simulated.add(Share())
    simulated.run(100)
    first.governor.set_share(Share(400))
    simulated.wake_all()
    simulated.run(200)
    assert simulated.run(5_000) == pytest.approx([0.8, 0.2], abs=0.02)
    assert second.governor.verdict.rate == pytest.approx(0.2, abs=0.02)
    first.governor.set_share(Share())
    simulated.wake_all()
    simulated.run(300)
    assert simulated.run(1_000) == pytest.approx([0.5, 0.5], abs=0.01)
    assert math.isinf(second.governor.verdict.rate)


def test_guest_is_let_in_when_its_governor_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    guest = SimulatedGuest(1, always, frozenset())
    table = Table(tmp_path / "shares.table")
    table.claim()
    governor = Governor(guest, table, share=Share(cap=0.5), vcpus=1)
    guest.bar()
    monkeypatch.setattr(governor, "step", lambda _now_ns: 1 // 0)
    thread = GovernorThread(governor, table)
    thread.start()
    thread.close()
    assert not guest.is_barred
    assert len(failed) == 1


def test_killed_guest_leaves_its_share_to_the_others(host: Hosts) -> None:
    simulated = host(1)
    heavy, light = simulated.add(Share(10_000)), simulated.add(Share())
    simulated.run(2_000)
    assert light.governor.enforcement == "loops"
    simulated.kill(heavy)
    simulated.run(4_000)
    assert simulated.run(1_000) == pytest.approx([1.0])
    assert light.governor.enforcement == "none"

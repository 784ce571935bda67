"""Plans against brute force on small estates, by rules of their own; the large estate within its bar."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from ostler.errors import BadRequest
from ostler.planning import solve as module
from ostler.planning.check import violations
from ostler.planning.draining import drained
from ostler.planning.estate import MIB, Estate, Placement, bytes_moved, dimensions, hosts_used, moves
from ostler.planning.solve import solve
from tests.unit.planning.estates import GIB, NO_HEADROOM, guest, host, large_estate, small_estates

pytest.importorskip("ortools", reason="plans want OR-tools")


def every_placement(estate: Estate) -> list[Placement]:
    names = [each.name for each in estate.guests]
    choices = itertools.product([each.name for each in estate.hosts], repeat=len(names))
    return [dict(zip(names, choice, strict=True)) for choice in choices]


def cost(estate: Estate, placement: Placement) -> tuple[int, int]:
    moved = moves(estate, placement)
    return len(hosts_used(placement)), sum(-(-each.moved_bytes // MIB) + 1 for each in moved)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(estate=small_estates())
def test_solve_small_estate_equals_brute_force(estate: Estate) -> None:
    allowed = [each for each in every_placement(estate) if not violations(estate, each)]

    if not allowed:
        with pytest.raises(BadRequest):
            solve(estate, workers=1, time_limit_s=60)
        return
    found = solve(estate, workers=1, time_limit_s=60)

    assert violations(estate, found.placement) == []
    assert cost(estate, found.placement) == min(cost(estate, each) for each in allowed)
    assert (found.first.value, found.second.value) == cost(estate, found.placement)
    assert found.first.is_optimal
    assert found.second.is_optimal


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(estate=small_estates())
def test_solve_for_power_small_estate_equals_brute_force(estate: Estate) -> None:
    idle_w = {each.name: each.idle_w for each in estate.hosts}
    powers = [
        sum(idle_w[name] for name in hosts_used(each))
        for each in every_placement(estate)
        if not violations(estate, each)
    ]
    if not powers:
        return

    found = solve(estate, workers=1, time_limit_s=60, goal="power")

    assert sum(idle_w[name] for name in hosts_used(found.placement)) == min(powers)


@settings(max_examples=200, deadline=None)
@given(estate=small_estates())
def test_drained_any_estate_keeps_every_rule(estate: Estate) -> None:
    placement = drained(estate, dimensions(estate))

    assert placement is None or violations(estate, placement) == []


def test_solve_80_guests_on_12_hosts_is_proven_optimal() -> None:
    estate = large_estate()

    found = solve(estate, time_limit_s=60)

    assert violations(estate, found.placement) == []
    assert found.first.is_optimal
    assert found.second.is_optimal
    assert len(hosts_used(found.placement)) == found.first.value == 4


def test_solve_without_time_answers_with_the_drained_placement_and_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    estate = large_estate()
    monkeypatch.setattr(module._Search, "_watched", lambda *_: None)

    found = solve(estate)

    assert violations(estate, found.placement) == []
    assert found.first.gap == 1.0
    assert not found.second.is_optimal


def test_solve_interrupted_keeps_the_best_placement() -> None:
    estate = large_estate()
    said: list[str] = []

    def interrupt(step: str, fraction: float | None = None) -> None:
        assert fraction is not None
        if not said:
            os.kill(os.getpid(), signal.SIGINT)
        said.append(step)

    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler
    assert threading.current_thread() is threading.main_thread()

    found = solve(estate, time_limit_s=60, progress=interrupt)

    assert found.interrupted
    assert said
    assert violations(estate, found.placement) == []


def test_solve_guests_larger_than_every_host_names_the_guest_and_the_resource() -> None:
    estate = Estate((host("a", memory_gib=4),), (guest("big", "a", memory_gib=5),), NO_HEADROOM)

    with pytest.raises(BadRequest, match=r"guest 'big': asks for 5120 MiB of memory"):
        solve(estate)


def test_solve_too_many_guests_says_that_no_placement_keeps_the_rules() -> None:
    guests = tuple(guest(f"g{number}", "a", memory_gib=3) for number in range(5))
    estate = Estate((host("a"), host("b")), guests, NO_HEADROOM)

    with pytest.raises(BadRequest, match="5 guests do not fit 2 hosts"):
        solve(estate)


def test_solve_pinned_guest_on_a_drained_host_is_refused() -> None:
    estate = Estate((host("a", drain=True), host("b")), (guest("g", "a", pinned=True),), NO_HEADROOM)

    with pytest.raises(BadRequest, match=r"guest 'g': its rules .* leave it no host"):
        solve(estate)


def test_solve_headroom_of_exactly_what_is_left_fits() -> None:
    # 0.1 + 0.2 of doubles would not fit into 0.3.
    estate = Estate((host("a", cpus=0.3),), (guest("x", "a", cpus=0.1), guest("y", "a", cpus=0.2)), NO_HEADROOM)

    assert solve(estate).first.value == 1


def test_solve_new_guests_only_moves_nothing() -> None:
    estate = Estate((host("a"), host("b")), (guest("x", None), guest("y", None)), NO_HEADROOM)

    found = solve(estate)

    assert (found.first.value, found.second.value) == (1, 0)


def test_bytes_moved_counts_movers_alone() -> None:
    stays, goes = guest("x", "a"), guest("y", "b", memory_gib=2)
    estate = Estate((host("a"), host("b")), (stays, goes), replace(NO_HEADROOM))

    assert bytes_moved(moves(estate, {"x": "a", "y": "a"})) == 2 * GIB

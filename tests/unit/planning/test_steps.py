"""The order of moves: replayed step by step, no host is ever too full."""

from __future__ import annotations

from hypothesis import given, settings

from ostler.planning.check import violations
from ostler.planning.draining import drained
from ostler.planning.estate import Estate, Guest, Placement, dimensions
from ostler.planning.steps import Step, ordered
from tests.unit.planning.estates import NO_HEADROOM, guest, host, small_estates


def replay(estate: Estate, steps: list[Step]) -> tuple[Placement, list[str]]:
    """Where guests end up, and what was broken on the way at hosts that a step had just filled."""
    where, broken = estate.today(), []
    for step in steps:
        assert where.get(step.guest.name) == step.source
        where[step.guest.name] = step.target
        there = [each for each in estate.guests if where.get(each.name) == step.target]
        if step.kind in ("move", "detour"):
            part = Estate(estate.hosts, tuple(there), estate.assumptions)
            found = violations(part, {each.name: step.target for each in there})
            broken += [line for line in found if line.startswith(f"host {step.target!r}")]
    return where, broken


@settings(max_examples=300, deadline=None)
@given(estate=small_estates())
def test_ordered_any_plan_ends_in_its_placement_and_overfills_no_target(estate: Estate) -> None:
    placement = drained(estate, dimensions(estate))
    if placement is None:
        return

    where, broken = replay(estate, ordered(estate, placement))

    assert where == placement
    assert broken == []


def two_that_swap() -> tuple[Guest, Guest]:
    return guest("x", "a", memory_gib=5), guest("y", "b", memory_gib=6)


def test_ordered_guests_that_change_places_make_a_stop_where_there_is_room() -> None:
    x, y = two_that_swap()
    estate = Estate((host("a"), host("b"), host("c")), (x, y), NO_HEADROOM)

    steps = ordered(estate, {"x": "b", "y": "a"})

    assert [(step.kind, step.guest.name, step.target) for step in steps] == [
        ("detour", "x", "c"), ("move", "y", "a"), ("move", "x", "b"),
    ]  # fmt: skip


def test_ordered_guests_that_change_places_without_room_are_said_to_be_blocked() -> None:
    x, y = two_that_swap()
    estate = Estate((host("a"), host("b")), (x, y), NO_HEADROOM)

    assert [step.kind for step in ordered(estate, {"x": "b", "y": "a"})] == ["blocked", "blocked"]


def test_ordered_move_waits_for_the_guest_that_makes_room() -> None:
    x, y = guest("x", "a", memory_gib=6), guest("y", "b", memory_gib=5)
    estate = Estate((host("a"), host("b"), host("c")), (x, y), NO_HEADROOM)

    steps = ordered(estate, {"x": "b", "y": "c"})

    assert [(step.kind, step.guest.name) for step in steps] == [("move", "y"), ("move", "x")]


def test_ordered_new_guests_start_last_and_send_nothing() -> None:
    estate = Estate((host("a"), host("b")), (guest("new", None), guest("x", "a")), NO_HEADROOM)

    steps = ordered(estate, {"new": "b", "x": "b"})

    assert [(step.kind, step.guest.name) for step in steps] == [("move", "x"), ("start", "new")]
    assert steps[1].sent_bytes == 0

"""How much of the host is left for guests."""

from __future__ import annotations

import math

import pytest

from ostler.sched.capacity import Capacity
from ostler.sched.table import Entry, Share

S = 10**9
BOTH = frozenset({0, 1})


def guest(used_s: float, *, slot: int = 0, pid: int = 7, at_s: float = 0) -> Entry:
    return Entry(slot, pid, Share(), 1, 1.0, int(used_s * S), int(at_s * S))


def look(
    capacity: Capacity, at_s: float, idle_s: dict[int, float], *guests: Entry, cpus: frozenset[int] = BOTH
) -> float:
    idle_ns = {cpu: int(seconds * S) for cpu, seconds in idle_s.items()}
    capacity.look(int(at_s * S), idle_ns=idle_ns, entries=guests, cpus=cpus)
    return capacity.part


def test_all_of_a_host_is_for_guests_until_it_was_looked_at() -> None:
    capacity = Capacity()
    assert capacity.is_due(0)
    assert look(capacity, 0, {0: 0, 1: 0}, guest(0)) == 1
    assert not capacity.is_due(S // 10)
    assert capacity.is_due(S)


def test_what_others_used_is_not_there() -> None:
    capacity = Capacity()
    look(capacity, 0, {0: 5, 1: 5}, guest(1))
    # In a second of two CPUs the guest had 0.9 and 0.5 were idle: somebody else had 0.6.
    assert look(capacity, 1, {0: 5.5, 1: 5}, guest(1.9, at_s=1)) == pytest.approx(0.7)


def test_only_the_cpus_where_guests_compete_count() -> None:
    capacity = Capacity()
    look(capacity, 0, {0: 0, 1: 0}, guest(0), cpus=frozenset({1}))
    assert look(capacity, 1, {0: 1, 1: 0.25}, guest(0.5, at_s=1), cpus=frozenset({1})) == pytest.approx(0.75)


def test_a_guest_that_came_or_went_or_another_in_its_slot_is_not_counted() -> None:
    capacity = Capacity()
    look(capacity, 0, {0: 0, 1: 0}, guest(50, slot=1), guest(9, slot=2))
    assert look(capacity, 1, {0: 1, 1: 1}, guest(70, slot=1, pid=8, at_s=1), guest(3, slot=3, at_s=1)) == 1


def test_there_is_always_a_little_and_never_more_than_all() -> None:
    capacity = Capacity()
    look(capacity, 0, {0: 0, 1: 0})
    assert look(capacity, 1, {0: 0, 1: 0}) == pytest.approx(0.1)
    for second in range(2, 20):
        look(capacity, second, {0: 9 * second, 1: 9 * second})
    assert capacity.part == pytest.approx(1, abs=1e-4)


def test_a_host_that_does_not_say_is_taken_for_empty() -> None:
    capacity = Capacity()
    look(capacity, 0, {})
    assert look(capacity, 1, {}, guest(math.pi, at_s=1)) == 1


def test_guest_that_has_not_written_since_spoils_the_look() -> None:
    capacity = Capacity()
    look(capacity, 0, {0: 0, 1: 0}, guest(0))
    assert look(capacity, 1, {0: 0, 1: 0}, guest(0)) == 1


def test_rate_of_a_guest_is_of_its_own_times() -> None:
    capacity = Capacity()
    look(capacity, 0, {0: 0, 1: 0}, guest(0, at_s=0))
    assert look(capacity, 1, {0: 0, 1: 0}, guest(0.9, at_s=0.9)) == pytest.approx(0.5)

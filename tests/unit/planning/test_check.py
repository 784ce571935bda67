"""The checker: each rule broken alone is found, and named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ostler.planning.check import violations
from ostler.planning.estate import Amounts, Estate, Guest, Host
from tests.unit.planning.estates import GIB, NO_HEADROOM, guest, host


@pytest.mark.parametrize(
    ("hosts", "guests", "expected"),
    [
        ([host("a", cpus=1)], [guest("x", "a", cpus=1.01)], "1.01 CPUs used of 1"),
        ([host("a", memory_gib=1)], [guest("x", "a", memory_gib=2)], "bytes of memory used"),
        ([host("a", drain=True)], [guest("x", "a")], "which is to be empty"),
        ([host("a"), host("b")], [guest("x", "b", pinned=True)], "pinned to 'b', placed on 'a'"),
        ([host("a")], [guest("x", "a", only_on=frozenset({"b"}))], "not allowed on 'a'"),
        ([host("a")], [guest("x", "a", capabilities=frozenset({"kvm"}))], "'a' lacks kvm"),
        ([host("a")], [guest(name, "a", apart=frozenset({"db"})) for name in "xy"], "x, y are to be apart (db)"),
        (
            [Host("a", Amounts(4, GIB, GIB, None))],
            [Guest("x", Amounts(1, 0, 2 * GIB, 0))],
            "bytes of disk used",
        ),
        ([Host("a", Amounts(4, GIB, None, 1000))], [Guest("x", Amounts(1, 0, 0, 1001))], "1001 bit/s used of 1000"),
    ],
)
def test_violations_one_broken_rule_is_named(hosts: list[Host], guests: list[Guest], expected: str) -> None:
    estate = Estate(tuple(hosts), tuple(guests), NO_HEADROOM)

    found = violations(estate, {each.name: "a" for each in guests})

    assert len(found) == 1
    assert expected in found[0]


def test_violations_headroom_and_overhead_count() -> None:
    given = replace(NO_HEADROOM, headroom_memory=0.5, guest_overhead_bytes=1)
    estate = Estate((host("a", memory_gib=4),), (guest("x", "a", memory_gib=2),), given)

    assert len(violations(estate, {"x": "a"})) == 1
    assert violations(replace(estate, assumptions=replace(given, guest_overhead_bytes=0)), {"x": "a"}) == []


def test_violations_unplaced_guest_and_unknown_host_are_named() -> None:
    estate = Estate((host("a"),), (guest("x", "a"), guest("y", "a")), NO_HEADROOM)

    assert len(violations(estate, {"y": "nowhere"})) == 2

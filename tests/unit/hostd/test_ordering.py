"""Orders of guests: by what they depend on."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.errors import BadRequest
from ostler.hostd import ordering

GRAPH = {"web": ["db", "cache"], "db": ["storage"], "cache": [], "storage": [], "other": []}


def test_in_order_puts_each_after_what_it_needs() -> None:
    found = ordering.in_order(GRAPH, ["web"])

    assert set(found) == {"web", "db", "cache", "storage"}
    assert found.index("storage") < found.index("db") < found.index("web")


def test_in_order_cycle_is_named_in_one_line() -> None:
    with pytest.raises(BadRequest, match=re.escape("a cycle")) as caught:
        ordering.in_order({"a": ["b"], "b": ["c"], "c": ["a"]})

    assert all(repr(name) in str(caught.value) for name in "abc")


def test_in_order_unknown_dependency_is_named_with_who_needs_it() -> None:
    with pytest.raises(BadRequest, match="guest 'a': depends on 'nobody', which is not defined"):
        ordering.in_order({"a": ["nobody"]})


def test_impossible_names_what_is_missing_and_circles_and_nobody_else() -> None:
    graph = {**GRAPH, "lost": ["nobody"], "after": ["lost"], "a": ["b"], "b": ["a"], "user": ["a"]}

    found = ordering.impossible(graph)

    assert found.keys() == {"lost", "a", "b"}
    assert found["lost"] == "depends on 'nobody', which is not defined"
    assert found["a"].startswith("depends on itself: ")
    ordering.in_order({name: () if name in found else needs for name, needs in graph.items()})


def test_needing_finds_users_of_users() -> None:
    assert ordering.needing(GRAPH, "storage") == {"db", "web"}
    assert ordering.needing(GRAPH, "web") == set()


@given(st.lists(st.sets(st.integers(0, 30)), max_size=30))
def test_in_order_any_graph_without_cycles_is_ordered(needs: list[set[int]]) -> None:
    # Whoever depends on smaller numbers only is in no cycle.
    graph = {str(number): [str(each) for each in some if each < number] for number, some in enumerate(needs)}

    place = {name: number for number, name in enumerate(ordering.in_order(graph))}

    assert len(place) == len(graph)
    assert all(place[need] < place[name] for name, some in graph.items() for need in some)

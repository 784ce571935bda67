"""Which guest before which: a graph from each guest to those it depends on. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter

from ostler.errors import BadRequest

Graph = Mapping[str, Collection[str]]


def in_order(graph: Graph, names: Iterable[str] | None = None) -> list[str]:
    """`names` (by default all) and everything they need, each after what it depends on; else in the given order.

    Raises BadRequest for a cycle, and for a dependency that is not in the graph.
    """
    wanted = needed_by(graph, graph if names is None else names)
    sorter = TopologicalSorter({name: sorted(graph[name]) for name in graph if name in wanted})
    try:
        return list(sorter.static_order())
    except CycleError as error:
        # graphlib tells it from what is needed to who needs it.
        circle = " on ".join(repr(name) for name in reversed(error.args[1]))
        raise BadRequest(f"depends_on: {circle}: a cycle, expected guests that can be started one after another") from (
            error
        )


def impossible(graph: Graph) -> dict[str, str]:
    """Who cannot be started for what it depends on, and why: something that is not there, or in the end itself.

    Without their dependencies, what is left can be put in order.
    """
    found = {
        name: f"depends on {missing[0]!r}, which is not defined"
        for name, needs in graph.items()
        if (missing := sorted(each for each in needs if each not in graph))
    }
    while True:
        rest = {name: () if name in found else needs for name, needs in graph.items()}
        try:
            TopologicalSorter({name: sorted(needs) for name, needs in rest.items()}).prepare()
        except CycleError as error:
            circle = error.args[1]
            text = " on ".join(repr(name) for name in reversed(circle))
            found |= dict.fromkeys(circle, f"depends on itself: {text}")
        else:
            return found


def needed_by(graph: Graph, names: Iterable[str]) -> set[str]:
    """`names` and all that they depend on, directly or not. Raises BadRequest for what is not in the graph."""
    found: set[str] = set()
    left = [(name, name) for name in names]
    while left:
        name, because = left.pop()
        if name in found:
            continue
        if name not in graph:
            raise BadRequest(f"guest {because!r}: depends on {name!r}, which is not defined")
        found.add(name)
        left += [(each, name) for each in graph[name]]
    return found


def needing(graph: Graph, name: str) -> set[str]:
    """All that depend on `name`, directly or not; without itself."""
    users: dict[str, set[str]] = {}
    for user, needs in graph.items():
        for each in needs:
            users.setdefault(each, set()).add(user)
    found: set[str] = set()
    left = [name]
    while left:
        new = users.get(left.pop(), set()) - found
        found |= new
        left += new
    return found - {name}

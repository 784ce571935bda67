"""Estates for tests: small ones for hypothesis, and the reproducible large one."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from ostler.planning.estate import MIB, Amounts, Assumptions, Estate, Guest, Host

GIB = 1024 * MIB
NO_HEADROOM = Assumptions(
    headroom_cpu=0, headroom_memory=0, headroom_disk=0, headroom_network=0, guest_overhead_bytes=0
)  # fmt: skip


def host(name: str, *, cpus: float = 4, memory_gib: int = 8, **rest: object) -> Host:
    return Host(name, Amounts(cpus, memory_gib * GIB), **rest)  # type: ignore[arg-type]


def guest(name: str, at: str | None, *, cpus: float = 1, memory_gib: int = 1, **rest: object) -> Guest:
    rest.setdefault("moved_bytes", memory_gib * GIB)
    rest.setdefault("mean_cpus", cpus)
    return Guest(name, Amounts(cpus, memory_gib * GIB, 0, 0), at, **rest)  # type: ignore[arg-type]


@st.composite
def small_estates(draw: st.DrawFn) -> Estate:
    """At most 3 hosts and 5 guests, 243 placements: brute force tries them all."""
    names = [f"h{number}" for number in range(draw(st.integers(1, 3)))]
    hosts = tuple(
        Host(
            name,
            Amounts(
                draw(st.sampled_from((1.0, 2.5, 4.0))),
                draw(st.integers(1, 6)) * GIB,
                draw(st.none() | st.integers(1, 6).map(lambda size: size * GIB)),
            ),
            capabilities=frozenset(draw(st.sets(st.sampled_from(("kvm", "gpu"))))),
            idle_w=draw(st.sampled_from((60.0, 100.0, 150.0))),
            drain=draw(st.integers(0, 9)) == 0,
        )
        for name in names
    )
    guests = []
    for number in range(draw(st.integers(1, 5))):
        at = draw(st.none() | st.sampled_from(names))
        guests.append(
            Guest(
                f"g{number}",
                Amounts(draw(st.sampled_from((0.1, 0.5, 1.3))), draw(st.integers(1, 3)) * GIB // 2, GIB, 0),
                at,
                capabilities=frozenset(draw(st.sets(st.sampled_from(("kvm", "gpu")), max_size=1))),
                apart=frozenset(draw(st.sets(st.sampled_from(("db", "web")), max_size=1))),
                pinned=at is not None and draw(st.integers(0, 4)) == 0,
                moved_bytes=draw(st.integers(0, 3)) * GIB + draw(st.integers(0, 5)),
            )
        )
    headroom = draw(st.sampled_from((0.0, 0.1, 0.25)))
    return Estate(hosts, tuple(guests), Assumptions(headroom_cpu=headroom, headroom_memory=headroom))


def large_estate(*, hosts: int = 12, guests: int = 80, seed: int = 7) -> Estate:
    """A server room that was filled as guests came: three kinds of hosts, skewed sizes, groups, a few pinned."""
    chance = random.Random(seed)
    kinds = ((16, 64, 90.0, 260.0), (32, 128, 120.0, 420.0), (64, 256, 180.0, 700.0))
    rows = []
    for number in range(hosts):
        cpus, memory, idle, full = kinds[number % 3]
        capabilities = frozenset({"kvm", "ssd"} if number % 4 else {"kvm"})
        rows.append(
            Host(f"host-{number:02}", Amounts(cpus, memory * GIB, None, 10_000_000_000), capabilities, idle, full)
        )
    free: dict[str, float] = {each.name: each.has.memory_bytes * 17 // 20 for each in rows}
    made: list[Guest] = []
    for number in range(guests):
        memory = chance.choice((1, 2, 2, 4, 4, 4, 8, 8, 16, 24)) * GIB
        needs_ssd = number % 9 == 0
        fitting = [each for each in rows if free[each.name] >= memory and (not needs_ssd or "ssd" in each.capabilities)]
        at = chance.choice(fitting).name
        free[at] -= memory
        busy = round(chance.lognormvariate(-0.7, 0.9), 2)
        made.append(
            Guest(
                f"guest-{number:02}", Amounts(busy, memory, 0, chance.randrange(1, 200) * 1_000_000), at,
                mean_cpus=busy / 2, capabilities=frozenset({"ssd"} if needs_ssd else ()),
                apart=frozenset({f"set-{number // 8}"} if number % 8 < 2 else ()), pinned=number % 27 == 5,
                moved_bytes=int(memory * chance.uniform(0.3, 1)),
            )
        )  # fmt: skip
    return Estate(tuple(rows), tuple(made))

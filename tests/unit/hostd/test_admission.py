"""Admission against a model that counts by hand: units with names on them, instead of sums."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostler.hostd import admission
from ostler.hostd.admission import Claim

RESOURCES = ("memory", "cpu", "disk")
HOLDERS = [f"guest-{number}" for number in range(6)]
EXCLUSIVES = ["port tcp/80", "port tcp/443", "address 10.0.0.2"]

claims = st.builds(
    Claim,
    st.sampled_from(HOLDERS),
    st.dictionaries(st.sampled_from(RESOURCES), st.integers(0, 12)),
    st.frozensets(st.sampled_from(EXCLUSIVES), max_size=2),
)
steps = st.lists(st.one_of(claims, st.sampled_from(HOLDERS)), min_size=200, max_size=260)


class Model:
    """Every unit of every resource is a slot that has an owner or none."""

    def __init__(self, capacity: dict[str, int]) -> None:
        self.slots: dict[str, list[str | None]] = {name: [None] * amount for name, amount in capacity.items()}
        self.single: dict[str, str] = {}

    def release(self, holder: str) -> None:
        for owners in self.slots.values():
            owners[:] = [None if owner == holder else owner for owner in owners]
        self.single = {name: owner for name, owner in self.single.items() if owner != holder}

    def take(self, claim: Claim) -> bool:
        before = {name: [*owners] for name, owners in self.slots.items()}, dict(self.single)
        self.release(claim.holder)
        for name, amount in claim.quantities.items():
            for _ in range(amount):
                if None not in self.slots[name]:
                    self.slots, self.single = before
                    return False
                self.slots[name][self.slots[name].index(None)] = claim.holder
        for name in claim.exclusives:
            if name in self.single:
                self.slots, self.single = before
                return False
            self.single[name] = claim.holder
        return True


@settings(max_examples=20, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(RESOURCES, st.integers(0, 20))), steps)
def test_check_two_hundred_requests_agree_with_the_model(capacity: dict[str, int], asked: list[Claim | str]) -> None:
    model = Model(capacity)
    promised: dict[str, Claim] = {}
    for step in asked:
        if isinstance(step, str):
            model.release(step)
            promised.pop(step, None)
            continue
        lack = admission.check(capacity, promised.values(), step)

        assert (lack is None) == model.take(step)
        if lack is None:
            promised[step.holder] = step
        for name, amount in capacity.items():
            assert admission.total(promised.values(), name) <= amount


def test_check_over_commit_is_by_ratio_only() -> None:
    limit = admission.limits({"memory": 100}, {"memory": Fraction("1.5")})
    held = [Claim("a", {"memory": 100})]

    assert admission.check({"memory": 100}, held, Claim("b", {"memory": 50})) is not None
    assert admission.check(limit, held, Claim("b", {"memory": 50})) is None
    assert admission.check(limit, held, Claim("b", {"memory": 51})) is not None


def test_check_holder_gives_back_what_it_had() -> None:
    held = [Claim("a", {"memory": 80}, frozenset({"port tcp/80"}))]

    assert admission.check({"memory": 100}, held, Claim("a", {"memory": 90}, frozenset({"port tcp/80"}))) is None


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (Claim("db", {"memory": 4 << 30}), "guest 'db': memory: asked 4096 MiB, 1024 MiB left of 2048 MiB"),
        (Claim("db", {"cpu": 2500}), "guest 'db': cpu: asked 2.5 processors, 2 processors left of 2 processors"),
        (Claim("db", {}, frozenset({"port tcp/80"})), "guest 'db': port tcp/80: is 'web''s already"),
        (
            Claim("db", {"network_bandwidth": 1 << 30}),
            (
                "guest 'db': network_bandwidth: asked 1024 MiB/s, and the host's is not known; "
                "[capacity] of host.toml names it"
            ),
        ),
    ],
)
def test_sentence_says_resource_asked_and_left(claim: Claim, said: str) -> None:
    held = [Claim("web", {"memory": 1 << 30}, frozenset({"port tcp/80"}))]
    lack = admission.check({"memory": 2 << 30, "cpu": 2000}, held, claim)

    assert lack is not None
    assert admission.sentence("db", lack) == said

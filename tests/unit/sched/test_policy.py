"""The policy alone: what any division must have in common, and what a few particular ones come to."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.sched.policy import CREDIT_NS, DEBT_NS, NS_PER_MS, Claim, Ledger, fair_rates, fill_level

CPUS = 4
TINY = 1e-6

claims_st = st.builds(
    Claim,
    demand=st.floats(0, 4),
    weight=st.integers(1, 10_000),
    cap=st.one_of(st.just(math.inf), st.floats(0.01, 4)),
    reserve=st.one_of(st.just(0.0), st.floats(0, 2)),
    cpus=st.frozensets(st.integers(0, CPUS - 1), max_size=CPUS),
)


def host(cpus: int = CPUS) -> dict[int, float]:
    return dict.fromkeys(range(cpus), 1.0)


def rates(claims: list[Claim], cpus: int = CPUS) -> list[float]:
    return [due.rate for due in fair_rates(claims, host(cpus))]


def on(claim: Claim) -> frozenset[int]:
    return claim.cpus or frozenset(range(CPUS))


def subsets() -> list[frozenset[int]]:
    return [frozenset(cpu for cpu in range(CPUS) if mask >> cpu & 1) for mask in range(1, 1 << CPUS)]


@given(st.lists(claims_st, max_size=8))
def test_rates_never_exceed_demand_cap_or_any_set_of_cpus(claims: list[Claim]) -> None:
    found = rates(claims)
    for claim, rate in zip(claims, found, strict=True):
        assert -TINY <= rate <= claim.limit + TINY
    for some in subsets():
        inside = math.fsum(rate for claim, rate in zip(claims, found, strict=True) if on(claim) <= some)
        assert inside <= len(some) + TINY


@given(st.lists(claims_st, max_size=8))
def test_division_is_work_conserving(claims: list[Claim]) -> None:
    """Who gets less than it could use sits on a full set of CPUs."""
    found = rates(claims)
    for claim, rate in zip(claims, found, strict=True):
        if rate < claim.limit - TINY:
            assert any(
                on(claim) <= some
                and math.fsum(r for c, r in zip(claims, found, strict=True) if on(c) <= some) >= len(some) - TINY
                for some in subsets()
            )


@given(st.lists(claims_st, min_size=2, max_size=8))
def test_nobody_gains_but_at_the_cost_of_one_who_has_less_per_weight(claims: list[Claim]) -> None:
    """On one set of CPUs: of two, who is held back has no less per weight than the other beyond its reservation."""
    claims = [Claim(c.demand, c.weight, c.cap, c.reserve) for c in claims]
    found = rates(claims)
    for mine, rate in zip(claims, found, strict=True):
        if rate >= mine.limit - TINY:
            continue
        for other, its in zip(claims, found, strict=True):
            if its > other.floor + TINY:
                assert its / other.weight <= rate / mine.weight + TINY


@given(st.lists(claims_st, max_size=8))
def test_no_guest_that_wants_something_starves(claims: list[Claim]) -> None:
    claims = [Claim(c.demand, c.weight, c.cap, 0.0, c.cpus) for c in claims]
    for claim, rate in zip(claims, rates(claims), strict=True):
        assert rate > 0 or claim.limit == 0


@given(st.lists(claims_st, max_size=8))
def test_reservations_hold_where_they_fit(claims: list[Claim]) -> None:
    claims = [Claim(c.demand, c.weight, c.cap, c.reserve) for c in claims]
    if math.fsum(claim.floor for claim in claims) <= CPUS:
        for claim, rate in zip(claims, rates(claims), strict=True):
            assert rate >= claim.floor - TINY


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_vcpus_are_divided_by_weight(seed: int) -> None:
    random = Random(seed)
    weights = [random.randint(1, 10_000) for _ in range(10_000)]
    dues = fair_rates([Claim(1.0, weight) for weight in weights], host(64))
    level = dues[0].level
    assert math.fsum(due.rate for due in dues) == pytest.approx(64)
    assert all(due.rate == pytest.approx(min(1, weight * level)) for due, weight in zip(dues, weights, strict=True))


@pytest.mark.parametrize(
    ("claims", "cpus", "expected"),
    [
        pytest.param([Claim(1, 100), Claim(1, 200), Claim(1, 400)], 1, [1 / 7, 2 / 7, 4 / 7], id="1:2:4 on one"),
        pytest.param([Claim(2, 100), Claim(2, 200), Claim(2, 400)], 2, [2 / 7, 4 / 7, 8 / 7], id="1:2:4 on two"),
        # The heaviest has one vCPU only: what it cannot use goes to the others by weight.
        pytest.param([Claim(1, 100), Claim(1, 200), Claim(1, 400)], 2, [1 / 3, 2 / 3, 1], id="one vCPU each on two"),
        pytest.param([Claim(1, cap=0.25), Claim(1)], 1, [0.25, 0.75], id="cap"),
        pytest.param([Claim(1, cap=0.25), Claim(0)], 1, [0.25, 0], id="cap with nobody else"),
        pytest.param([Claim(1, reserve=0.3), *[Claim(1)] * 10], 1, [0.3, *[0.07] * 10], id="reservation"),
        pytest.param([Claim(0.1, reserve=0.3), Claim(1)], 1, [0.1, 0.9], id="reservation not used"),
        pytest.param([Claim(1, reserve=0.9), Claim(1, reserve=0.6)], 1, [0.6, 0.4], id="reserved too much"),
        pytest.param(
            [Claim(1, cpus=frozenset({0})), Claim(1, cpus=frozenset({0})), Claim(1)], 2, [0.5, 0.5, 1], id="pinned"
        ),
        pytest.param(
            [Claim(1, cpus=frozenset({0})), Claim(2, cpus=frozenset({0, 1}))], 2, [1, 1], id="sets that overlap"
        ),
        pytest.param([Claim(1, cpus=frozenset({9})), Claim(2)], 2, [0, 2], id="pinned to a CPU there is not"),
        pytest.param([], 2, [], id="nobody"),
    ],
)
def test_division(claims: list[Claim], cpus: int, expected: list[float]) -> None:
    assert rates(claims, cpus) == pytest.approx(expected)


def test_level_is_infinite_where_everybody_has_enough() -> None:
    assert math.isinf(fill_level([Claim(0.5), Claim(0.2)], 1))


def test_guest_that_is_ahead_waits_for_a_quantum() -> None:
    ledger = Ledger(1)
    assert not ledger.settle(elapsed_ns=10 * NS_PER_MS, rate=0.5, used_ns=10 * NS_PER_MS)
    assert ledger.lag_ns == -5 * NS_PER_MS
    assert ledger.turns_in_ns(0.5, speed=1) == 30 * NS_PER_MS
    assert not ledger.settle(elapsed_ns=29 * NS_PER_MS, rate=0.5, used_ns=0)
    assert ledger.settle(elapsed_ns=1 * NS_PER_MS, rate=0.5, used_ns=0)
    assert ledger.turns_in_ns(0.5, speed=1) == 20 * NS_PER_MS


def test_sleeping_saves_up_no_more_than_the_credit_and_a_stopped_process_pays_no_more_than_the_debt() -> None:
    ledger = Ledger(2)
    ledger.settle(elapsed_ns=10**12, rate=1, used_ns=0)
    assert ledger.lag_ns == 2 * CREDIT_NS
    ledger.settle(elapsed_ns=0, rate=1, used_ns=10**12)
    assert ledger.lag_ns == -2 * DEBT_NS


@given(st.floats(0.05, 0.95), st.lists(st.integers(1, 5), min_size=200, max_size=200))
def test_ledger_gives_its_rate_whatever_the_steps(rate: float, steps_ms: list[int]) -> None:
    """A vCPU that always wants to run, looked at every now and then, gets its rate but for one credit."""
    ledger, used, elapsed = Ledger(1), 0, 0
    for step_ms in steps_ms:
        step = step_ms * NS_PER_MS
        ran = step if ledger.is_open else 0
        used, elapsed = used + ran, elapsed + step
        ledger.settle(elapsed_ns=step, rate=rate, used_ns=ran)
    assert abs(used - rate * elapsed) <= CREDIT_NS

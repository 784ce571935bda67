"""The policy in simulation: a thousand vCPUs on a hundred CPUs, with the host rightly and wrongly thought of."""

from __future__ import annotations

from random import Random

import pytest

from ostler.sched.policy import Claim, fair_rates
from ostler.testing.simulated_policy import simulate

VCPUS, CPUS, STEPS = 1_000, 100, 500


@pytest.mark.parametrize("believed", [1.0, 1.1, 0.9])
def test_weights_are_respected_nobody_starves_and_no_cpu_idles(believed: float) -> None:
    random = Random(7)
    claims = [Claim(1.0, random.choice((50, 100, 200, 400))) for _ in range(VCPUS)]
    due = [each.rate for each in fair_rates(claims, dict.fromkeys(range(CPUS), 1.0))]
    had = simulate(claims, CPUS, steps=STEPS, believed=believed)
    assert sum(had) == pytest.approx(CPUS, rel=1e-3)
    assert min(had) > 0
    # Five seconds of turns of ten milliseconds: the lightest have ten turns or so, and one more or less is a tenth.
    assert had == pytest.approx(due, rel=0.15)
    for weight in (50, 100, 200, 400):
        of_weight = [each for each, claim in zip(had, claims, strict=True) if claim.weight == weight]
        wanted = [each for each, claim in zip(due, claims, strict=True) if claim.weight == weight]
        assert sum(of_weight) == pytest.approx(sum(wanted), rel=0.05)


def test_caps_and_reservations_hold_in_a_crowd() -> None:
    claims = [Claim(1.0, 100) for _ in range(VCPUS)]
    claims[0] = Claim(1.0, 100, cap=0.02)
    claims[1] = Claim(1.0, 1, reserve=0.3)
    had = simulate(claims, CPUS, steps=STEPS)
    assert had[0] == pytest.approx(0.02, abs=0.01)
    assert had[1] == pytest.approx(0.3, abs=0.02)

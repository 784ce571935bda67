"""The policy alone on a large host: thousands of ledgers and one division, without tables and governors.

Time goes in steps of ten milliseconds, a turn's length. In each the kernel divides the host evenly among the virtual
processors whose ledgers are open, and every ten steps all are put right by their drift, as governors do.
"""

from __future__ import annotations

from collections.abc import Sequence

from ostler.sched.policy import NS_PER_MS, Claim, Ledger, drift, fair_rates

STEP_NS = 10 * NS_PER_MS
STEPS_TO_DRIFT = 10


def simulate(
    claims: Sequence[Claim], cpus: int, *, steps: int, believed: float = 1.0, warm_up: int = 100
) -> list[float]:  # fmt: skip
    """The CPUs each had on average after `warm_up` steps; one virtual processor a claim, which always wants to run.

    `believed` is what the policy takes each host CPU for: 1 is right.
    """
    dues = fair_rates(claims, dict.fromkeys(range(cpus), believed))
    by_weight = [abs(due.rate - claim.weight * due.level) < 1e-9 for claim, due in zip(claims, dues, strict=True)]
    ledgers = [Ledger(1) for _ in claims]
    had = [0] * len(claims)
    for step in range(warm_up + steps):
        _borrow(claims, ledgers, cpus)
        waiting = [number for number, ledger in enumerate(ledgers) if ledger.is_open]
        each_ns = int(STEP_NS * min(1.0, cpus / len(waiting))) if waiting else 0
        for number, (ledger, due) in enumerate(zip(ledgers, dues, strict=True)):
            used_ns = each_ns if ledger.is_open else 0
            had[number] += used_ns if step >= warm_up else 0
            ledger.settle(elapsed_ns=STEP_NS, rate=due.rate, used_ns=used_ns)
        if step % STEPS_TO_DRIFT == 0:
            members = [number for number, proportional in enumerate(by_weight) if proportional]
            lags = [(claims[number].weight, ledgers[number].lag_ns) for number in members]
            unit = drift(1, lags)
            for number in members:
                ledgers[number].shift(unit * claims[number].weight)
    return [each / (steps * STEP_NS) for each in had]


def _borrow(claims: Sequence[Claim], ledgers: Sequence[Ledger], cpus: int) -> None:
    """No host CPU lies idle while somebody waits."""
    idle = cpus - sum(ledger.is_open for ledger in ledgers)
    if idle > 0:
        barred = [number for number, ledger in enumerate(ledgers) if not ledger.is_open]
        barred.sort(key=lambda number: ledgers[number].lag_ns / claims[number].weight, reverse=True)
        for number in barred[:idle]:
            ledgers[number].borrow(is_owed=True)

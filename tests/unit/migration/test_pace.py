"""When to stop a guest, how fast to send, what to say of it."""

from __future__ import annotations

import pytest

from ostler.migration.pace import MAX_ROUNDS, Budget, Pace

MB = 1_000_000


def simulated(*, link: float, dirty: float, memory: float, downtime_s: float = 0.04) -> tuple[Pace, float]:
    """Rounds of a guest that writes `dirty` bytes a second over a link of `link`; what was left at the end."""
    pace, left = Pace(downtime_s), memory
    while True:
        seconds = left / link + 0.005
        pace.sent(int(left), left / link)
        left = min(memory, dirty * seconds)
        pace.round_ended(int(left), seconds)
        if pace.may_stop(int(left)) or pace.is_hopeless:
            return pace, left


@pytest.mark.parametrize("dirty", [0, 10 * MB, 100 * MB, 300 * MB])
def test_guest_slower_than_the_link_is_stopped_within_the_wanted_pause(dirty: float) -> None:
    pace, left = simulated(link=500 * MB, dirty=dirty, memory=1000 * MB)
    assert left / (500 * MB) <= pace.downtime_s
    assert pace.round < 20


def test_guest_faster_than_the_link_is_hopeless_soon() -> None:
    pace, _ = simulated(link=100 * MB, dirty=200 * MB, memory=500 * MB)
    assert pace.is_hopeless
    assert pace.round < 12


def test_rounds_are_bounded_whatever_is_measured() -> None:
    pace = Pace(0.0)
    while not pace.is_hopeless:
        pace.round_ended(10 * MB + (pace.round * 7919) % 1000, 0.1)
    assert pace.round <= MAX_ROUNDS


def test_budget_spreads_what_is_sent_over_time() -> None:
    budget, now = Budget(10 * MB), 100.0
    for _ in range(100):
        now += budget.wait_s(MB, now)
    assert now - 100.0 == pytest.approx(10.0, abs=0.2)


def test_no_budget_never_waits() -> None:
    assert Budget().wait_s(1 << 40, 0.0) == 0


def test_estimate_is_none_where_memory_changes_faster_than_it_is_sent() -> None:
    pace = Pace(0.04, bytes_per_s=100 * MB, dirty_per_s=100 * MB)
    assert pace.eta_s(MB, None) is None
    pace.dirty_per_s = 50 * MB
    assert pace.eta_s(100 * MB, None) == pytest.approx(2.0)
    assert pace.eta_s(100 * MB, 75 * MB) == pytest.approx(4.0)

"""Where a virtual processor's time has gone, and what it wanted."""

from __future__ import annotations

import pytest

from ostler.sched.usage import Usage

MS = 1_000_000


def test_wall_is_run_wait_halt_and_held() -> None:
    usage = Usage(wall_ns=100, run_ns=40, delay_ns=10, barred_ns=5, held_ns=20)
    assert (usage.wait_ns, usage.halt_ns) == (15, 25)
    assert usage.as_message() == {"run_ns": 40, "wait_ns": 15, "halt_ns": 25, "held_ns": 20, "wall_ns": 100}


def test_clocks_read_one_after_the_other_never_make_a_halt_of_less_than_nothing() -> None:
    assert Usage(wall_ns=100, run_ns=101, delay_ns=None).halt_ns == 0


@pytest.mark.parametrize(
    ("after", "wanted"),
    [
        pytest.param(Usage(100 * MS, 30 * MS, 20 * MS), 0.5, id="ran and waited"),
        pytest.param(Usage(100 * MS, 30 * MS, 20 * MS, barred_ns=50 * MS), 1.0, id="of the time it was free"),
        pytest.param(Usage(100 * MS, 0, 0, held_ns=99 * MS), None, id="not free"),
        pytest.param(Usage(100 * MS, 30 * MS, None), 1.0, id="no delays known: it may have waited"),
        pytest.param(Usage(100 * MS, 1 * MS, None), 0.01, id="no delays known: it did not run"),
        pytest.param(Usage(100 * MS, 90 * MS, 20 * MS), 1.0, id="no more than all"),
    ],
)
def test_demand_is_what_it_wanted_while_it_was_free(after: Usage, wanted: float | None) -> None:
    assert after.demand_since(Usage(0, 0, after.delay_ns and 0)) == wanted

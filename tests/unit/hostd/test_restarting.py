"""Restart policies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.hostd.definition import Restart
from ostler.hostd.restarting import decide


@pytest.mark.parametrize(
    ("policy", "has_failed", "restarts"),
    [("never", True, False), ("never", False, False), ("on-failure", True, True), ("on-failure", False, False),
     ("always", True, True), ("always", False, True)],
)  # fmt: skip
def test_decide_policy_says_whether(policy: str, has_failed: bool, restarts: bool) -> None:  # noqa: FBT001
    wish = Restart.model_validate({"policy": policy})

    assert (decide(wish, restarts=0, ran_s=1, has_failed=has_failed).delay_s is not None) == restarts


def test_decide_delays_double_up_to_the_most() -> None:
    wish = Restart(policy="always", delay_s=1, max_delay_s=5)

    assert [decide(wish, restarts=each, ran_s=0, has_failed=True).delay_s for each in range(5)] == [1, 2, 4, 5, 5]


def test_decide_limit_gives_up_and_says_so() -> None:
    wish = Restart(policy="always", limit=2)

    assert decide(wish, restarts=1, ran_s=0, has_failed=True).restarts == 2
    given_up = decide(wish, restarts=2, ran_s=0, has_failed=True)
    assert given_up.delay_s is None
    assert given_up.reason == "given up after 2 restarts in a row"


def test_decide_long_run_begins_anew() -> None:
    wish = Restart(policy="always", delay_s=3, reset_after_s=100, limit=2)

    assert decide(wish, restarts=2, ran_s=100, has_failed=True).delay_s == 3


@given(st.integers(0, 10**9))
def test_decide_any_count_is_bounded(restarts: int) -> None:
    decision = decide(Restart(policy="always"), restarts=restarts, ran_s=0, has_failed=True)

    assert decision.delay_s is not None
    assert 0 <= decision.delay_s <= 60

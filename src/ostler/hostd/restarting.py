"""Restart policies with back-off. Pure: what follows from a guest's end."""

from __future__ import annotations

from dataclasses import dataclass

from ostler.hostd.definition import Restart


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do after an end."""

    delay_s: float | None
    """None: leave it ended."""
    restarts: int
    """In a row, this one included."""
    reason: str


def decide(policy: Restart, *, restarts: int, ran_s: float, has_failed: bool) -> Decision:
    """`restarts` were made in a row before this end, the last of which ran for `ran_s`."""
    if policy.policy == "never" or (policy.policy == "on-failure" and not has_failed):
        return Decision(None, 0, "")
    in_a_row = 0 if ran_s >= policy.reset_after_s else restarts
    if policy.limit and in_a_row >= policy.limit:
        return Decision(None, in_a_row, f"given up after {in_a_row} restarts in a row")
    # 2**63 would do, too, but a float has an end.
    delay = min(policy.max_delay_s, policy.delay_s * 2 ** min(in_a_row, 64))
    return Decision(delay, in_a_row + 1, "")

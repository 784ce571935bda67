"""How fast a migration may go, how fast it goes, and when to stop the guest. Plain arithmetic; the clock is given."""

from __future__ import annotations

from dataclasses import dataclass, field

# What stopping, saving, restoring and starting cost besides what is still to be sent; measured on two busy cores.
FIXED_S = 0.012
MIN_SEND_S = 0.004
# Rounds without progress after which memory is taken to change faster than it can be sent.
PATIENCE, LATE_PATIENCE = 8, 3
# A round that leaves less than this part of what the one before left was worth it.
SHRINKS = 0.75
MAX_ROUNDS = 64


@dataclass(slots=True)
class Budget:
    """Bytes a second that may be sent, with at most a tenth of a second in one go; None is no limit."""

    bytes_per_s: float | None = None
    _allowed_at: float = 0.0

    def wait_s(self, size_bytes: int, now: float) -> float:
        """Count so many bytes as sent; how long to wait before sending more."""
        if not self.bytes_per_s:
            return 0.0
        self._allowed_at = max(self._allowed_at, now - 0.1) + size_bytes / self.bytes_per_s
        return max(0.0, self._allowed_at - now)


@dataclass(slots=True)
class Pace:
    """What was measured so far."""

    downtime_s: float
    patience: int = PATIENCE
    """Rounds; fewer where post-copy can end it, else the only end is a long pause."""
    round: int = 0
    bytes_per_s: float = 0.0
    """What the link takes while something is being sent."""
    dirty_per_s: float = 0.0
    """What the guest writes, in bytes of whole pages."""
    history: list[int] = field(default_factory=list)
    """Bytes that were left at each round's end."""

    def sent(self, size_bytes: int, seconds: float) -> None:
        """So much went over the link in so long, without what a budget made it wait."""
        if size_bytes >= 1 << 20 and seconds > 0:
            measured = size_bytes / seconds
            # The newest counts most: the link is shared, and the first round's zeroes tell little.
            self.bytes_per_s = measured if not self.bytes_per_s else 0.3 * self.bytes_per_s + 0.7 * measured

    def round_ended(self, left_bytes: int, seconds: float) -> None:
        """A round is over and so much was written meanwhile."""
        self.round += 1
        self.history.append(left_bytes)
        if seconds > 0:
            self.dirty_per_s = left_bytes / seconds

    def may_stop(self, left_bytes: int) -> bool:
        """Whether what is left can be sent within the pause that is wanted, and another round would make it no less."""
        rate = self.bytes_per_s or 1e6
        if left_bytes > max(self.downtime_s - FIXED_S, MIN_SEND_S) * rate:
            return False
        shrinks = len(self.history) < 2 or left_bytes < SHRINKS * self.history[-2]
        return left_bytes <= MIN_SEND_S * rate or not shrinks

    @property
    def is_hopeless(self) -> bool:
        """Whether going on like this brings the end no nearer."""
        recent, before = self.history[-self.patience :], self.history[: -self.patience]
        stuck = bool(before) and min(recent) >= 0.8 * min(before)
        return stuck or self.round >= MAX_ROUNDS

    def eta_s(self, left_bytes: int, limit: float | None) -> float | None:
        """When it may be over; None where nobody can say."""
        rate = min(self.bytes_per_s or 0.0, limit or self.bytes_per_s)
        if rate <= self.dirty_per_s or not rate:
            return None
        return left_bytes / (rate - self.dirty_per_s)

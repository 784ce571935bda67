"""How long work tells what it is doing, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives steps as they happen; must be cheap and must not raise."""

    def __call__(self, step: str, fraction: float | None = None) -> None:
        """Say that `step` is under way; `fraction` is 0..1, or None where the end cannot be known."""


def silent(step: str, fraction: float | None = None) -> None:
    """Listen to nothing."""

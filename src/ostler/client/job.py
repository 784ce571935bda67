"""A command for a guest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """The command to run in the guest, with the image's defaults filled in."""

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str | None
    user: str | None

"""Guests: what is said of them and asked of them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from ostler.hostd.definition import Size
from ostler.hostd.models.base import MAX_WORDS, Flag, View, Wish, Word


class GuestState(StrEnum):
    """Where a guest is in its life."""

    DEFINED = "defined"
    """Known, not running, nothing planned."""
    WAITING = "waiting"
    """To be started: for a dependency, its delay, or its turn."""
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    UNREACHABLE = "unreachable"
    """Its process lives and does not answer."""
    STOPPING = "stopping"
    ENDED = "ended"
    """In order; `status` says with what."""
    FAILED = "failed"
    """It could not be started, crashed, or its process was killed; `reason` says which."""
    BACKING_OFF = "backing-off"
    """Ended, and will be restarted at `next_start`."""
    BROKEN = "broken"
    """Its definition, kept by an earlier service, is no good; `reason` says why. It waits to be defined anew."""


class GuestView(View):
    """A guest, defined here or not. Those that were started without the service are shown, and can be acted on."""

    name: str
    state: GuestState
    ready: bool
    defined: bool
    autostart: bool
    depends_on: list[str]
    image: str | None
    command: list[str]
    memory_bytes: int
    cpus: int
    ports: list[str]
    accelerator: str | None
    pid: int | None
    created: float | None
    """When its process was started."""
    ready_at: float | None
    next_start: float | None
    restarts: int
    """Since the last time it proved itself."""
    status: int | None
    """Exit status of one that has ended."""
    reason: str | None
    """Why it ended, failed or waits, in one line."""
    job: str | None
    """What is being done with it: a job's id."""


class GuestList(View):
    guests: list[GuestView]
    version: int
    """Grows with every change of any guest; the same number is the same list."""


class GuestDetail(View):
    """All that is known of a guest."""

    guest: GuestView
    definition: dict[str, Any] | None
    """As it was given, also where it is broken: a table of `ostler schema`, and `host`."""
    facts: dict[str, Any]
    """What its process says of itself (`ostler inspect`); empty while it does not run."""


class StopWish(Wish):
    grace_s: Annotated[float, Field(strict=True, ge=0, le=3600, allow_inf_nan=False)] | None = None
    """How long it may take to shut down before it is killed; by default what its definition says, else 30."""


class ExecWish(Wish):
    """A command in a guest, without a terminal. What it says is kept up to 1 MiB a stream."""

    argv: Annotated[list[Word], Field(min_length=1, max_length=MAX_WORDS)]
    env: dict[str, Word] = Field({}, max_length=MAX_WORDS)
    cwd: Word | None = None
    user: Word | None = None
    stdin: Annotated[str, Field(max_length=1 << 20)] = ""
    timeout_s: Annotated[float, Field(strict=True, gt=0, le=86_400, allow_inf_nan=False)] | None = None


class ScheduleWish(Wish):
    """Shares of the host's processors (docs/scheduling.md). What is not named stays; null takes away."""

    weight: Annotated[int, Field(strict=True, ge=1, le=10_000)] | None = None
    cap: Annotated[float, Field(strict=True, ge=1, le=102_400, allow_inf_nan=False)] | None = None
    """Percent of one processor, at most."""
    reserve: Annotated[float, Field(strict=True, ge=0, le=102_400, allow_inf_nan=False)] | None = None
    """Percent of one processor, at least."""
    pin: (
        Annotated[list[Annotated[int, Field(strict=True, ge=0, le=1023)]], Field(min_length=1, max_length=64)] | None
    ) = None


class ScheduleView(View):
    shares: dict[str, Any]
    """As the control protocol's `schedule` has it."""


class BalloonWish(Wish):
    guest_bytes: Size


class DefineWish(Wish):
    """A definition: a table of `ostler schema` with a table `host`."""

    definition: Annotated[dict[str, Any], Field(max_length=MAX_WORDS)]
    start: Flag = False
    """Start it at once, too."""


class Logs(View):
    """What a guest has said, as text; bytes that are none are replaced."""

    text: str
    source: Literal["console", "command"]

"""One guest as the service follows it, and how a guest's end is judged."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ostler.hostd import claims
from ostler.hostd.admission import Claim
from ostler.hostd.definition import Definition, HostSection
from ostler.hostd.models import GuestState, GuestView

# Ends that nobody need look into.
ORDERLY = frozenset({"power-off", "reset", "command ended", "killed", "migrated"})
# Its process lives, or is about to: what it claims is in use.
ACTIVE = frozenset({
    GuestState.WAITING, GuestState.STARTING, GuestState.RUNNING, GuestState.PAUSED, GuestState.UNREACHABLE,
    GuestState.STOPPING, GuestState.BACKING_OFF,
})  # fmt: skip
ALIVE = frozenset({GuestState.RUNNING, GuestState.PAUSED, GuestState.UNREACHABLE, GuestState.STOPPING})


@dataclass(frozen=True, slots=True)
class Broken:
    """A definition that was kept and cannot be understood, or not be started in any order."""

    why: str
    table: dict[str, Any]


@dataclass(slots=True)
class Guest:
    """Changed under the host's lock only."""

    name: str
    definition: Definition | None = None
    broken: Broken | None = None
    """Instead of a definition."""
    state: GuestState = GuestState.DEFINED
    is_ready: bool = False
    is_wanted: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    accelerator: str | None = None
    pid: int | None = None
    ready_at: float | None = None
    next_start: float | None = None
    restarts: int = 0
    ending: dict[str, Any] | None = None
    reason: str | None = None
    job: str | None = None
    run: int = 0
    """Which of its lives this is: a watcher of an earlier one has nothing to say."""

    @property
    def host(self) -> HostSection:
        """How it is to be treated; a stranger as if nothing had been said."""
        return self.definition.host if self.definition is not None else HostSection()

    @property
    def is_defined(self) -> bool:
        """Whether it is the service's, however well; else a stranger."""
        return self.definition is not None or self.broken is not None

    @property
    def table(self) -> dict[str, Any] | None:
        """Its definition as it was given."""
        if self.broken is not None:
            return self.broken.table
        return self.definition.table if self.definition is not None else None

    @property
    def claim(self) -> Claim:
        """What it holds while it is active."""
        if self.definition is not None:
            claim = claims.of_definition(self.definition)
            return claims.with_share(claim, self.spec) if self.state in ALIVE else claim
        return claims.of_stranger(self.name, self.spec)

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    def view(self) -> GuestView:
        """As callers see it."""
        request = self.definition.request if self.definition is not None else None
        facts = self.facts if self.state in ALIVE or request is None else {}
        ending = self.ending or {}
        return GuestView(
            name=self.name, state=self.state, ready=self.is_ready, defined=self.is_defined,
            autostart=self.host.autostart, depends_on=list(self.host.depends_on),
            image=_text(facts.get("image")) or (request and (request.image or str(request.kernel))) or None,
            command=[str(word) for word in facts.get("command") or (request.command if request else ())],
            memory_bytes=request.memory if request else _number(self.spec.get("memory")),
            cpus=request.cpus if request else _number(self.spec.get("cpus")),
            ports=[str(port) for port in facts.get("ports") or (request.ports if request else ())],
            accelerator=self.accelerator, pid=self.pid, created=facts.get("created"), ready_at=self.ready_at,
            next_start=self.next_start, restarts=self.restarts, status=ending.get("status"),
            reason=self.reason or _reason(ending), job=self.job,
        )  # fmt: skip


def has_failed(ending: dict[str, Any]) -> bool:
    """Whether an end is one that `on-failure` is there for."""
    return ending.get("status", 1) != 0 or ending.get("reason") not in ORDERLY


def state_of(ending: dict[str, Any]) -> GuestState:
    """What a guest is that ended so and is left so."""
    return GuestState.ENDED if ending.get("reason") in ORDERLY else GuestState.FAILED


def ran_s(guest: Guest, ending: dict[str, Any]) -> float:
    """How long it ran."""
    until = ending.get("ended", time.time())
    since = guest.facts.get("created", until)
    return max(0.0, float(until) - float(since))


def _reason(ending: dict[str, Any]) -> str | None:
    if not ending:
        return None
    message = str(ending.get("message") or "")
    return f"{ending.get('reason')}{': ' if message else ''}{message}"


def _text(value: object) -> str | None:
    return str(value) if value else None


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0

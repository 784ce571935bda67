"""The source's half of the protocol: which message may be sent and taken when, and who owns the guest. No I/O.

    NEW → OFFERED → MOVING → STOPPED → HANDED → READY → COMMITTED → DONE
                      any before COMMITTED → KEPT

Two laws. The guest may run here in NEW, OFFERED, MOVING and KEPT, and nowhere else. COMMITTED is a decision: it is
recorded (`witness`) before COMMIT is sent, and nothing but the proof that the target never ran the guest undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from ostler.errors import MigrationError, MigrationRefused
from ostler.migration import wire
from ostler.migration.wire import Frame, Kind


class State(Enum):
    """Where the source is."""

    NEW = auto()
    OFFERED = auto()
    MOVING = auto()
    STOPPED = auto()
    HANDED = auto()
    READY = auto()
    COMMITTED = auto()
    DONE = auto()
    KEPT = auto()


class TargetFate(Enum):
    """What is known of the target's copy once its link is lost."""

    UNKNOWN = auto()
    NEVER_RAN = auto()
    RUNS = auto()
    RAN = auto()


MAY_RUN = {State.NEW, State.OFFERED, State.MOVING, State.KEPT}
BEFORE_COMMIT = {State.NEW, State.OFFERED, State.MOVING, State.STOPPED, State.HANDED, State.READY}


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the target agreed to."""

    version: int
    secret: str
    streams: int
    compression: str
    post_copy: bool
    boot: str
    witness: str


class Source:
    """One migration, seen from where the guest is. Methods return the bytes to send on stream 0."""

    def __init__(self) -> None:
        self.state = State.NEW
        self.welcome: Welcome | None = None

    @property
    def may_run(self) -> bool:
        """Whether the guest's processors may run here."""
        return self.state in MAY_RUN

    def offer(self, offer: dict[str, Any]) -> bytes:
        """Begin: HELLO with what the guest is."""
        self._go({State.NEW}, State.OFFERED)
        versions = {"oldest": wire.OLDEST_VERSION, "newest": wire.VERSION}
        return wire.pack_json(Kind.HELLO, {**offer, "versions": versions})

    def received(self, frame: Frame) -> None:
        """Take a message of the target's. Raises MigrationRefused, MigrationError; the guest is kept then."""
        try:
            self._received(frame)
        except MigrationError:
            self._keep()
            raise

    def _received(self, frame: Frame) -> None:
        if frame.kind is Kind.WELCOME and self.state is State.OFFERED:
            self.welcome = parse_welcome(frame)
            self.state = State.MOVING
        elif frame.kind is Kind.REFUSE and self.state is State.OFFERED:
            raise MigrationRefused(f"target: {said(frame)}")
        elif frame.kind is Kind.FAILED and self.state in BEFORE_COMMIT - {State.NEW, State.OFFERED}:
            raise MigrationError(f"target: {said(frame)}")
        elif frame.kind is Kind.ROUND and self.state is State.MOVING:
            pass  # The target is as far as that.
        elif frame.kind is Kind.READY and self.state is State.HANDED:
            self.state = State.READY
        elif frame.kind is Kind.RUNNING and self.state is State.COMMITTED:
            self.state = State.DONE
        else:
            raise MigrationError(f"target: unexpected {frame.kind.name} while {self.state.name}")

    def stopped(self) -> None:
        """The guest's processors stand still."""
        self._go({State.MOVING}, State.STOPPED)

    def moved_on(self) -> None:
        """They run again: it was too early to stop."""
        self._go({State.STOPPED}, State.MOVING)

    def final(self, totals: dict[str, Any]) -> bytes:
        """Everything has been sent."""
        self._go({State.STOPPED}, State.HANDED)
        return wire.pack_json(Kind.FINAL, totals)

    def commit(self) -> bytes:
        """Give the guest away. The caller has recorded that, durably as far as this host goes, before it sends."""
        self._go({State.READY}, State.COMMITTED)
        return wire.pack(Kind.COMMIT)

    def cancel(self, reason: str) -> bytes:
        """Call it off: the guest stays. Raises MigrationError once it has been given away."""
        if self.state not in BEFORE_COMMIT:
            raise MigrationError(f"migration: cannot be called off, the guest has been handed over ({self.state.name})")
        self.state = State.KEPT
        return wire.pack_json(Kind.CANCEL, {"message": reason})

    def lost(self) -> None:
        """The link is gone. Before COMMIT that means the guest stays; after it, `resolve` is wanted."""
        self._keep()

    def resolve(self, fate: TargetFate) -> None:
        """What has become of the target's copy, learnt otherwise than by the link."""
        if self.state is not State.COMMITTED:
            return
        if fate is TargetFate.NEVER_RAN:
            self.state = State.KEPT
        elif fate in (TargetFate.RUNS, TargetFate.RAN):
            self.state = State.DONE

    def _keep(self) -> None:
        if self.state in BEFORE_COMMIT:
            self.state = State.KEPT

    def _go(self, wanted: set[State], then: State) -> None:
        if self.state not in wanted:
            raise MigrationError(f"migration: {then.name} is no step from {self.state.name}")
        self.state = then


def parse_welcome(frame: Frame) -> Welcome:
    """Raises MigrationError for what no target says."""
    value = wire.parse_json(frame)
    try:
        found = Welcome(
            version=int(value["version"]), secret=str(value["secret"]), streams=int(value["streams"]),
            compression=str(value["compression"]), post_copy=bool(value["post_copy"]), boot=str(value["boot"]),
            witness=str(value["witness"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise MigrationError(f"target: WELCOME that makes no sense ({error!r})") from None
    if not wire.OLDEST_VERSION <= found.version <= wire.VERSION:
        raise MigrationError(f"target: chose version {found.version}, expected at most {wire.VERSION}")
    if not 1 <= found.streams <= wire.MAX_STREAMS or len(found.secret) != 2 * wire.SECRET_BYTES:
        raise MigrationError(f"target: WELCOME with {found.streams} streams")
    return found


def said(frame: Frame) -> str:
    """The message in a frame, as one bounded line of printable characters."""
    text = str(wire.parse_json(frame).get("message", "no reason given"))
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text[:500]).split())

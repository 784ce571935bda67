"""The target's half of the protocol: which message may come when, and who owns the guest. No I/O.

    NEW → RECEIVING → PREPARED → RUNNING
           any before RUNNING → ENDED

The law: the guest runs here only in RUNNING, which only COMMIT leads to, or the proof that the source has given the
guest away or died with it stopped. What a peer sends is judged here and where it is decoded; anything out of turn ends
the migration.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from ostler.errors import MigrationCancelled, MigrationError, MigrationRefused
from ostler.migration import wire
from ostler.migration.pages import COMPRESSIONS
from ostler.migration.source import said
from ostler.migration.wire import Frame, Kind

MAX_NAME, MAX_TEXT = 40, 4096


class State(Enum):
    """Where the target is."""

    NEW = auto()
    RECEIVING = auto()
    PREPARED = auto()
    RUNNING = auto()
    ENDED = auto()


class SourceFate(Enum):
    """What is known of the source once its link is lost."""

    UNKNOWN = auto()
    KEPT = auto()
    GAVE_AWAY = auto()
    DIED_STOPPED = auto()


@dataclass(frozen=True, slots=True)
class Offer:
    """A HELLO as far as this layer judges it; the specification is the configuration's to judge."""

    name: str
    spec: dict[str, Any]
    facts: dict[str, Any]
    boot: str
    witness: str
    streams: int
    compression: str
    post_copy: bool
    disks: tuple[dict[str, Any], ...]


class Target:
    """One migration, seen from where the guest goes. Methods return bytes to send on stream 0."""

    def __init__(self) -> None:
        self.state = State.NEW
        self.offer: Offer | None = None
        self.secret = secrets.token_hex(wire.SECRET_BYTES)
        self.state_data = bytearray()
        self.post_copy = False
        """Whether it was agreed on; `is_post_copy` once it is done."""
        self.is_post_copy = False
        self.stays_paused = False
        """Whether somebody had paused the guest before it was moved."""
        self._finals: set[int] = set()
        self.streams = 1

    @property
    def may_run(self) -> bool:
        """Whether the guest's processors may run here."""
        return self.state is State.RUNNING

    def hello(self, frame: Frame) -> Offer:
        """The first message. Raises MigrationError, MigrationRefused."""
        if self.state is not State.NEW or frame.kind is not Kind.HELLO:
            raise self._odd(frame)
        try:
            self.offer = parse_offer(frame)
        except MigrationError:
            self.state = State.ENDED
            raise
        return self.offer

    def welcome(self, *, streams: int, post_copy: bool, boot: str, witness: str) -> bytes:
        """Take the guest that was offered."""
        if self.offer is None or self.state is not State.NEW:
            raise MigrationError(f"migration: WELCOME is no answer while {self.state.name}")
        self.state = State.RECEIVING
        self.streams = streams
        self.post_copy = post_copy
        return wire.pack_json(Kind.WELCOME, {
            "version": wire.VERSION, "secret": self.secret, "streams": streams, "post_copy": post_copy,
            "compression": self.offer.compression, "boot": boot, "witness": witness,
        })  # fmt: skip

    def refuse(self, reason: str) -> bytes:
        """Do not take it."""
        self.state = State.ENDED
        return wire.pack_json(Kind.REFUSE, {"message": reason[:1000]})

    def failed(self, reason: str) -> bytes:
        """Cannot go on. Raises MigrationError where the source may have given the guest away by now."""
        if self.state not in (State.NEW, State.RECEIVING):
            raise MigrationError(f"migration: FAILED is no step from {self.state.name}")
        self.state = State.ENDED
        return wire.pack_json(Kind.FAILED, {"message": reason[:1000]})

    def joins(self, frame: Frame, stream: int) -> None:
        """A further stream's first frame. Raises MigrationError."""
        given = str(wire.parse_json(frame).get("secret")) if frame.kind is Kind.STREAM else ""
        if not secrets.compare_digest(given.encode(), self.secret.encode()):
            raise MigrationError("migration: a stream without the secret of its migration")
        if self.state is not State.RECEIVING or not 0 < stream < self.streams:
            raise MigrationError(f"migration: stream {stream} of {self.streams} while {self.state.name}")

    def received(self, frame: Frame, stream: int = 0) -> None:
        """Take a message other than HELLO and STREAM; pages and disks' parts are the caller's to apply afterwards.

        Raises MigrationCancelled, MigrationError; the copy here is of no use then, unless PREPARED.
        """
        try:
            self._received(frame, stream)
        except MigrationError:
            if self.state in (State.NEW, State.RECEIVING):
                self.state = State.ENDED
            raise

    def _received(self, frame: Frame, stream: int) -> None:
        kind = frame.kind
        if kind in (Kind.CANCEL, Kind.ABORT) and stream == 0 and self.state in (State.RECEIVING, State.PREPARED):
            self.state = State.ENDED
            raise MigrationCancelled(f"source: {said(frame)}")
        if kind is Kind.COMMIT and stream == 0 and self.state is State.PREPARED:
            self.state = State.RUNNING
            return
        if self.state is not State.RECEIVING or stream in self._finals:
            raise self._odd(frame)
        if kind is Kind.STATE and stream == 0:
            self.state_data += frame.payload
            if len(self.state_data) > wire.MAX_STATE_BYTES:
                raise MigrationError(f"source: state of more than {wire.MAX_STATE_BYTES} bytes")
        elif kind is Kind.FINAL:
            if stream == 0:
                self.stays_paused = wire.parse_json(frame).get("paused") is True
            self._finals.add(stream)
        elif kind is Kind.MISSING and stream == 0 and self.post_copy:
            self.is_post_copy = True
        elif kind not in (Kind.PAGES, Kind.DISK, Kind.ROUND):
            raise self._odd(frame)

    @property
    def is_complete(self) -> bool:
        """Whether every stream has said that it has nothing more."""
        return len(self._finals) == self.streams

    def prepared(self) -> bytes:
        """The machine has taken everything: READY."""
        if self.state is not State.RECEIVING or not self.is_complete:
            raise MigrationError(f"migration: READY is no step from {self.state.name}")
        self.state = State.PREPARED
        return wire.pack(Kind.READY)

    def running(self) -> bytes:
        """The guest runs."""
        if self.state is not State.RUNNING:
            raise MigrationError(f"migration: RUNNING is no step from {self.state.name}")
        return wire.pack(Kind.RUNNING)

    def lost(self) -> None:
        """The link is gone. Once PREPARED, `resolve` is wanted."""
        if self.state in (State.NEW, State.RECEIVING):
            self.state = State.ENDED

    def resolve(self, fate: SourceFate) -> None:
        """What has become of the source, learnt otherwise than by the link."""
        if self.state is not State.PREPARED:
            return
        if fate is SourceFate.KEPT:
            self.state = State.ENDED
        elif fate in (SourceFate.GAVE_AWAY, SourceFate.DIED_STOPPED):
            self.state = State.RUNNING

    def _odd(self, frame: Frame) -> MigrationError:
        return MigrationError(f"source: unexpected {frame.kind.name} while {self.state.name}")


def parse_offer(frame: Frame) -> Offer:
    """Judge a HELLO. Raises MigrationError, MigrationRefused for a version that is not spoken here."""
    value = wire.parse_json(frame)
    try:
        versions = value["versions"]
        oldest, newest = int(versions["oldest"]), int(versions["newest"])
        spec, facts, disks = value["spec"], value["facts"], value["disks"]
        found = Offer(
            name=str(value["name"])[:MAX_NAME], spec=spec, facts=facts, boot=str(value["boot"])[:MAX_TEXT],
            witness=str(value["witness"])[:MAX_TEXT], streams=int(value["streams"]),
            compression=str(value["compression"]), post_copy=bool(value["post_copy"]), disks=tuple(disks),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise MigrationError(f"source: HELLO that makes no sense ({error!r})") from None
    if not oldest <= wire.VERSION <= newest:
        raise MigrationRefused(f"migration protocol versions {oldest} to {newest}: expected {wire.VERSION} among them")
    shapes = isinstance(spec, dict) and isinstance(facts, dict) and all(isinstance(each, dict) for each in found.disks)
    if not shapes or len(found.disks) > wire.MAX_DISKS or not 1 <= found.streams <= wire.MAX_STREAMS:
        raise MigrationError("source: HELLO that makes no sense")
    if found.compression not in COMPRESSIONS:
        raise MigrationRefused(f"compression {found.compression[:40]!r}: expected one of {', '.join(COMPRESSIONS)}")
    return found

"""The protocol's two halves, cut off or killed at every message boundary: exactly one copy of the guest lives on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

import pytest

from ostler.errors import MigrationCancelled, MigrationError, MigrationRefused
from ostler.migration import wire
from ostler.migration.source import Source, TargetFate
from ostler.migration.source import State as SourceState
from ostler.migration.target import SourceFate, Target
from ostler.migration.target import State as TargetState
from ostler.migration.wire import Decoder, Frame, Kind

OFFER = {
    "name": "g", "spec": {"kernel": "/k"}, "facts": {}, "boot": "b", "witness": "/w", "streams": 1,
    "compression": "none", "post_copy": False, "disks": [],
}  # fmt: skip


class Event(Enum):
    """What goes wrong."""

    SOURCE_DIES = "source dies"
    TARGET_DIES = "target dies"
    LINK_BREAKS = "link breaks"


@dataclass
class World:
    """Two sides, their witnesses, and a link whose bytes may be lost; each step is one act of one side."""

    source: Source = field(default_factory=Source)
    target: Target = field(default_factory=Target)
    source_word: str = "moving"
    target_word: str = "receiving"
    source_lives: bool = True
    target_lives: bool = True
    link: bool = True
    to_target: list[bytes] = field(default_factory=list)
    to_source: list[bytes] = field(default_factory=list)
    _commit: bytes = b""

    def deliver(self, to: list[bytes]) -> Frame:
        decoder = Decoder()
        decoder.feed(to.pop(0))
        frame = decoder.next()
        assert frame is not None
        return frame

    def steps(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Every act of a migration that goes well, in order; each is a point at which something may go wrong."""
        source, target = self.source, self.target

        def stop() -> None:
            self.source_word = "stopped"
            source.stopped()

        def state() -> None:
            self.to_target.append(wire.pack(Kind.STATE, b"state"))

        def ready() -> None:
            self.target_word = "prepared"
            self.to_source.append(target.prepared())

        def commit_recorded() -> None:
            # Decided and recorded, not yet said.
            self._commit = source.commit()
            self.source_word = "committed"

        def commit_said() -> None:
            self.to_target.append(self._commit)

        def taken() -> None:
            target.received(self.deliver(self.to_target))
            self.target_word = "running"

        yield "S", lambda: self.to_target.append(source.offer(OFFER))
        yield "T", lambda: target.hello(self.deliver(self.to_target))
        yield "T", lambda: self.to_source.append(target.welcome(streams=1, post_copy=False, boot="b", witness="/t"))
        yield "S", lambda: source.received(self.deliver(self.to_source))
        yield "S", stop
        yield "S", state
        yield "T", lambda: target.received(self.deliver(self.to_target))
        yield "S", lambda: self.to_target.append(source.final({}))
        yield "T", lambda: target.received(self.deliver(self.to_target))
        yield "T", ready
        yield "S", lambda: source.received(self.deliver(self.to_source))
        yield "S", commit_recorded
        yield "S", commit_said
        yield "T", taken
        yield "T", lambda: self.to_source.append(target.running())
        yield "S", lambda: source.received(self.deliver(self.to_source))

    def break_link(self) -> None:
        """What has not been received is lost; both sides notice."""
        self.link = False
        self.to_source.clear()
        self.to_target.clear()
        if self.source_lives:
            self.source.lost()
            if self.source.state is SourceState.KEPT:
                self.source_word = "aborted"
        if self.target_lives:
            self.target.lost()

    def settle(self) -> None:
        """Both look at each other's witness until nothing changes any more."""
        for _ in range(3):
            if self.target_lives:
                self.target.resolve(self._source_fate())
                if self.target.state is TargetState.RUNNING:
                    self.target_word = "running"
            if self.source_lives:
                self.source.resolve(self._target_fate())

    def _source_fate(self) -> SourceFate:
        if self.source_word == "committed":
            return SourceFate.GAVE_AWAY
        if self.source_word == "aborted":
            return SourceFate.KEPT
        if self.source_lives:
            return SourceFate.UNKNOWN
        return SourceFate.DIED_STOPPED if self.source_word == "stopped" else SourceFate.KEPT

    def _target_fate(self) -> TargetFate:
        if self.target_word == "running":
            return TargetFate.RUNS if self.target_lives else TargetFate.RAN
        return TargetFate.UNKNOWN if self.target_lives else TargetFate.NEVER_RAN

    @property
    def copies(self) -> list[str]:
        """Who runs the guest."""
        running = []
        if self.source_lives and self.source.may_run:
            running.append("source")
        if self.target_lives and self.target.may_run:
            running.append("target")
        return running


STEPS = len(list(World().steps()))


def played(until: int, events: tuple[Event, ...]) -> World:
    world = World()
    for _, act in itertools.islice(world.steps(), until):
        act()
        assert len(world.copies) <= 1
    for event in events:
        if event is Event.SOURCE_DIES:
            world.source_lives = False
        elif event is Event.TARGET_DIES:
            world.target_lives = False
    world.break_link()
    assert len(world.copies) <= 1
    world.settle()
    return world


def test_migration_undisturbed_ends_at_the_target() -> None:
    world = World()
    for _, act in world.steps():
        act()
        assert len(world.copies) <= 1
    assert world.copies == ["target"]
    assert world.source.state is SourceState.DONE


@pytest.mark.parametrize("until", range(STEPS + 1))
def test_link_broken_at_any_step_leaves_exactly_one_copy(until: int) -> None:
    assert len(played(until, (Event.LINK_BREAKS,)).copies) == 1


@pytest.mark.parametrize("until", range(STEPS + 1))
def test_target_killed_at_any_step_leaves_the_source_unless_the_guest_ran_there(until: int) -> None:
    world = played(until, (Event.TARGET_DIES,))
    # Killing the process in which a guest runs is killing that guest; before that it must survive here.
    assert world.copies == ([] if world.target_word == "running" else ["source"])


@pytest.mark.parametrize("until", range(STEPS + 1))
def test_source_killed_at_any_step_leaves_the_target_once_it_has_everything(until: int) -> None:
    world = played(until, (Event.SOURCE_DIES,))
    has_everything = world.target_word in ("prepared", "running")
    assert world.copies == (["target"] if has_everything else [])


def test_cancel_after_commit_is_refused() -> None:
    world = World()
    for _, act in itertools.islice(world.steps(), 12):
        act()
    with pytest.raises(MigrationError, match="handed over"):
        world.source.cancel("too late")


def test_cancel_before_commit_ends_the_target() -> None:
    world = World()
    for _, act in itertools.islice(world.steps(), 11):
        act()
    world.to_target.append(world.source.cancel("called off"))
    with pytest.raises(MigrationCancelled, match="called off"):
        world.target.received(world.deliver(world.to_target))
    assert world.copies == ["source"]


def test_refusal_keeps_the_guest_and_says_why() -> None:
    source, target = Source(), Target()
    decoder = Decoder()
    decoder.feed(source.offer(OFFER))
    frame = decoder.next()
    assert frame is not None
    target.hello(frame)
    decoder.feed(target.refuse("no room"))
    answer = decoder.next()
    assert answer is not None
    with pytest.raises(MigrationRefused, match="no room"):
        source.received(answer)
    assert source.may_run


@pytest.mark.parametrize("kind", sorted(set(Kind) - {Kind.HELLO}))
def test_target_refuses_anything_before_hello(kind: Kind) -> None:
    target = Target()
    with pytest.raises(MigrationError, match="unexpected"):
        target.hello(Frame(kind, b"{}"))
    assert not target.may_run


@pytest.mark.parametrize("kind", sorted(Kind))
def test_commit_before_ready_never_runs_the_guest(kind: Kind) -> None:
    world = World()
    for _, act in itertools.islice(world.steps(), 4):
        act()
    try:
        world.target.received(Frame(kind, b"{}"))
    except MigrationError:
        assert world.target.state is TargetState.ENDED
    assert not world.target.may_run


@pytest.mark.parametrize(
    "changes",
    [{"versions": {"oldest": 2, "newest": 9}}, {"streams": 0}, {"streams": 10**30}, {"spec": []}, {"disks": [1]},
     {"compression": "lzma"}, {"facts": None}, {"name": None, "disks": 5}],
)  # fmt: skip
def test_offers_that_make_no_sense_are_refused_in_one_line(changes: dict[str, object]) -> None:
    value = {**OFFER, "versions": {"oldest": 1, "newest": 1}, **changes}
    decoder = Decoder()
    decoder.feed(wire.pack_json(Kind.HELLO, value))
    frame = decoder.next()
    assert frame is not None
    with pytest.raises(MigrationError) as caught:
        Target().hello(frame)
    assert "\n" not in str(caught.value)

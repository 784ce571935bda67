"""Moving a guest away: memory in rounds while it runs, the rest and its state while it stands still, the hand-over.

Runs in a thread of its own beside the guest; `Guest` is what it needs of the VM process. The guest is stopped when what
is left can be sent within the pause that is wanted. What fails before COMMIT leaves the guest running here.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ostler.errors import BadRequest, MigrationCancelled, MigrationError
from ostler.migration import disks, wire, witness
from ostler.migration.dirty import DirtyTracker, merged, page_count, split, without
from ostler.migration.disks import Mirror
from ostler.migration.link import Link, LinkLost, expect, open_link
from ostler.migration.pace import LATE_PATIENCE, Budget, Pace
from ostler.migration.pages import COMPRESSIONS, Run, batches
from ostler.migration.postcopy import LeftBehind, missing_frames
from ostler.migration.sender import Sender
from ostler.migration.source import Source, State
from ostler.migration.terms import Guest, Options, Progress
from ostler.migration.touched import touched
from ostler.migration.turn import Turn
from ostler.migration.wire import POST_COPY_STREAM, Kind
from ostler.migration.witness import Witness

T = TypeVar("T")
HAND_OVER_TIMEOUT_S = 10.0
DOUBT_SLICE_S = 0.02
STRAYS_TIMEOUT_S = 1.0
HOT_SHARE = 0.25
READ_BYTES = 1 << 20


class Outgoing:
    """One migration of one guest."""

    def __init__(self, guest: Guest, options: Options, report: Callable[[Progress], None]) -> None:
        self._guest, self._options, self._report = guest, options, report
        self._source = Source()
        self.progress = Progress()
        self._pace = Pace(options.downtime_s)
        self.budget = Budget(options.bytes_per_s)
        self._cancelled: str | None = None
        self._link: Link | None = None
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._reported = 0.0
        # Whether the guest is to go before its memory has, and whether not even this round is to be finished.
        self._switch = self._break = False
        self._left_behind: LeftBehind | None = None
        self._turn: Turn | None = None

    @property
    def is_in_doubt(self) -> bool:
        """Whether the guest was handed over and nobody could say that it runs there."""
        return self._source.state is State.COMMITTED

    def switch(self) -> None:
        """Go over to post-copy at once, from any thread. Raises BadRequest where that was not asked for in time."""
        if self._source.welcome is None or not self._source.welcome.post_copy:
            raise BadRequest("migration: expected one that was begun with post-copy, on hosts that let users have it")
        self._switch = self._break = True

    def cancel(self, reason: str) -> None:
        """Call it off, from any thread. Raises MigrationError when it is too late."""
        with self._lock:
            if self._source.state in (State.COMMITTED, State.DONE):
                raise MigrationError("migration: cannot be called off, the guest has been handed over")
            self._cancelled = reason

    def run(self) -> None:
        """Move the guest. When this returns it lives there; when it raises MigrationError, here."""
        session = secrets.token_bytes(wire.SESSION_BYTES)
        path = self._options.witness_folder / f"{session.hex()}.source"
        try:
            witnessed = Witness(path, witness.MOVING)
        except OSError as error:
            raise MigrationError(f"migration: {path}: {error.strerror or error}") from error
        with contextlib.ExitStack() as stack:
            # While nobody knows where the guest is, what was written stays to be read.
            stack.callback(lambda: witnessed.leave() if self._source.state is State.COMMITTED else witnessed.close())
            try:
                self._run(session, witnessed, stack)
            except BaseException as error:
                self._keep(witnessed, error)
                raise
        self._tell("done", force=True)

    def _run(self, session: bytes, witnessed: Witness, stack: contextlib.ExitStack) -> None:
        options = self._options
        with contextlib.suppress(OSError):
            self._turn = stack.enter_context(Turn(options.witness_folder))
        link = self._link = stack.enter_context(
            open_link(options.address, options.tls, session, 0, timeout_s=options.timeout_s)
        )
        offer = {
            **self._guest.offer(), "streams": options.streams, "compression": options.compression,
            "post_copy": options.post_copy != "never", "boot": witness.boot_id(), "witness": str(witnessed.path),
        }  # fmt: skip
        link.send(self._source.offer(offer))
        self._source.received(link.receive())
        welcome = self._source.welcome
        if welcome is None:
            raise MigrationError("target: no WELCOME")
        others = []
        for number in range(1, welcome.streams):
            other = stack.enter_context(
                open_link(options.address, options.tls, session, number, timeout_s=options.timeout_s)
            )
            other.send(wire.pack_json(Kind.STREAM, {"secret": welcome.secret}))
            others.append(other)
        behind = None
        if welcome.post_copy and options.post_copy != "never":
            behind = stack.enter_context(
                open_link(options.address, options.tls, session, POST_COPY_STREAM, timeout_s=options.timeout_s)
            )
            behind.narrow()
            behind.send(wire.pack_json(Kind.STREAM, {"secret": welcome.secret}))
            expect(behind, Kind.READY)
            self._switch = options.post_copy == "now"
            self._pace.patience = LATE_PATIENCE
        elif options.post_copy == "now":
            raise MigrationError(
                "target: cannot do post-copy (userfaultfd); expected a host that lets this user have it"
            )
        encoding = COMPRESSIONS[welcome.compression]
        sender = Sender(link, others, self._guest.memory, encoding, self.budget, self._check)
        stack.callback(sender.close)
        tracker = self._guest.tracker
        self._guest.on_loop(self._guest.begin)
        left = self._rounds(sender, tracker, can_switch=behind is not None)
        if behind is not None and self._switch:
            # Giving pages up takes the target a while, and the guest need not stand still for that.
            for piece in missing_frames(left):
                link.send(piece)
            link.send(wire.pack(Kind.ROUND, wire.ROUND_NUMBER.pack(self._pace.round)))
            self._source.received(expect(link, Kind.ROUND, Kind.FAILED))
            self._guest.on_loop(lambda: self._hand_over(link, sender, tracker, witnessed, left, behind=behind))
            self._serve_left_behind()
            return
        left = self._await_turn(sender, tracker, left)
        # All of it in one go on the loop's thread: no device does anything while the guest stands still.
        self._guest.on_loop(lambda: self._hand_over(link, sender, tracker, witnessed, left))

    # -- while the guest runs -------------------------------------------------------------------

    def _await_turn(self, sender: Sender, tracker: DirtyTracker, left: list[Run]) -> list[Run]:
        """Other guests of this host may be standing still; what is left when none does."""
        if self._turn is None or not self._turn.take(self._check):
            return left
        sender.pages(merged(left, tracker.take()))
        sender.flush()
        return tracker.take()

    def _serve_left_behind(self) -> None:
        """The guest runs there; what it left behind follows."""
        left = self._left_behind
        if left is None:
            raise MigrationError("migration: nothing was left behind")
        while not left.wait(0.1):
            self._tell("post-copy", left_bytes=left.left_bytes)
        if left.error is not None:
            raise MigrationError(
                f"{left.error}; the guest ran there already and cannot go on without the pages it lacks"
            )
        self.progress.left_bytes, self.progress.asked = 0, left.asked

    def _rounds(self, sender: Sender, tracker: DirtyTracker, *, can_switch: bool) -> list[Run]:
        """Send memory until little enough is left; what that is."""
        memory = self._guest.memory
        self.progress.total_bytes = memory.size_bytes
        runs = touched(memory)
        self.progress.zero_bytes = memory.size_bytes - page_count(runs) * wire.PAGE_BYTES
        self._tell("memory", left_bytes=page_count(runs) * wire.PAGE_BYTES, force=True)
        for number, mirror in self._guest.mirrors:
            self._send_disk(sender, number, mirror, disks.parts(mirror.disk.changed()))  # type: ignore[attr-defined]
        is_first = True
        while True:
            started, waited, before = time.monotonic(), sender.waited_s, sender.sent_bytes
            unsent = self._send_round(sender, runs, new=is_first)
            is_first = False
            seconds = time.monotonic() - started
            self._pace.sent(sender.sent_bytes - before, seconds - (sender.waited_s - waited))
            runs = tracker.take()
            left = page_count(runs) * wire.PAGE_BYTES + sum(mirror.left_bytes for _, mirror in self._guest.mirrors)
            self._pace.round_ended(left, seconds)
            self._tell("memory", left_bytes=left, force=True)
            if can_switch and self._pace.is_hopeless and not self._pace.may_stop(left):
                self._switch = True
            if unsent or self._switch or self._pace.may_stop(left) or self._pace.is_hopeless:
                return merged(runs, unsent)

    def _send_round(self, sender: Sender, runs: list[Run], *, new: bool) -> list[Run]:
        """Send these pages; those that were not, where post-copy is to begin at once."""
        left = page_count(runs)
        unsent = collections.deque(batches(runs))
        while unsent and not self._break:
            batch = unsent.popleft()
            sender.pages(batch, new=new)
            left -= page_count(batch)
            self._tell("memory", left_bytes=left * wire.PAGE_BYTES)
        for number, mirror in self._guest.mirrors:
            self._send_disk(sender, number, mirror, disks.parts(iter(mirror.take())))
        sender.flush()
        return [run for batch in unsent for run in batch]

    def _send_disk(self, sender: Sender, number: int, mirror: Mirror, ranges: Any, *, hurry: bool = False) -> None:
        for offset, size in ranges:
            try:
                content = disks.read(mirror.disk, offset, size)
            except OSError as error:
                raise MigrationError(f"disk {number}: {error.strerror or error}") from error
            sender.disk(number, offset, content, hurry=hurry)

    def _check(self) -> None:
        """Between messages: called off, or did the target say something? And is it another guest's turn?"""
        if self._cancelled is not None:
            raise MigrationCancelled(f"migration: {self._cancelled}")
        if self._link is not None and self._link.pending():
            self._source.received(self._link.receive())
        if self._turn is not None and self._source.state is State.MOVING:
            self._turn.give_way()

    # -- while it stands still -------------------------------------------------------------------

    def _hand_over(
        self, link: Link, sender: Sender, tracker: DirtyTracker, witnessed: Witness, left: list[Run], *,
        behind: Link | None = None,
    ) -> None:  # fmt: skip
        guest, source = self._guest, self._source
        marks = [("", time.monotonic())]

        def done(what: str) -> None:
            marks.append((what, time.monotonic()))

        self._check()
        witnessed.write(witness.STOPPED)
        was_paused = guest.stop()
        source.stopped()
        done("stop")
        state = guest.save()
        done("save")
        tracked = tracker.take()
        runs = merged(left, tracked)
        for number, mirror in guest.mirrors:
            self._send_disk(sender, number, mirror, disks.parts(iter(mirror.take())), hurry=True)
        if behind is None:
            sender.pages(runs, hurry=True)
        else:
            # Most of it was said while the guest still ran. What it wrote since then it will want first.
            hot, others = split(tracked, self._hot_pages())
            for piece in missing_frames(others):
                link.send(piece)
            sender.pages(hot, hurry=True)
            self._left_behind = LeftBehind(behind, guest.memory, without(runs, hot), self.budget)
            # Already restoring the state may touch what is not there.
            self._left_behind.start()
        done("pages")
        for at in range(0, len(state), wire.STATE_CHUNK_BYTES):
            link.send(wire.pack(Kind.STATE, state[at : at + wire.STATE_CHUNK_BYTES]))
        last = source.final({"pages": page_count(runs), "paused": was_paused})
        sender.everywhere(last)
        link.send(last)
        sender.flush()
        link.set_timeout(HAND_OVER_TIMEOUT_S)
        source.received(expect(link, Kind.READY, Kind.FAILED))
        done("ready")
        with self._lock:
            if self._cancelled is not None:
                raise MigrationCancelled(f"migration: {self._cancelled}")
            commit = source.commit()
        # Written before it is said: see `witness`.
        witnessed.write(witness.COMMITTED)
        guest.give_away()
        try:
            link.send(commit)
            source.received(expect(link, Kind.RUNNING))
            done("running")
            if self._left_behind is not None:
                self._left_behind.push()
            self._send_strays(link)
        except LinkLost as error:
            self._resolve(error)
            if self._left_behind is not None:
                self._left_behind.push()
            done("running")
        if self._turn is not None:
            self._turn.release()
        self.progress.pause_s = marks[-1][1] - marks[0][1]
        self.progress.pause_parts = {
            what: at - before for (_, before), (what, at) in itertools.pairwise(marks)
        }  # fmt: skip

    def _hot_pages(self) -> int:
        """How many may go with a guest that leaves the others behind: a part of the pause that is wanted."""
        bytes_per_s = min(self._pace.bytes_per_s, self.budget.bytes_per_s or self._pace.bytes_per_s)
        return int(HOT_SHARE * self._options.downtime_s * bytes_per_s) // wire.PAGE_BYTES

    def _send_strays(self, link: Link) -> None:
        """What is lost here would cost somebody a retransmission, which is longer than the whole pause."""
        with contextlib.suppress(LinkLost):
            link.set_timeout(STRAYS_TIMEOUT_S)
            for card, frame in self._guest.strays():
                link.send(wire.pack(Kind.FRAME, wire.CARD.pack(card) + frame[: wire.MAX_FRAME_BYTES]))
            link.send(wire.pack(Kind.DONE))

    def _resolve(self, lost: LinkLost) -> None:
        """The link was lost after COMMIT: the guest stands still until it is known what the target did with it."""
        welcome = self._source.welcome
        can_see = welcome is not None and welcome.boot == witness.boot_id() and bool(welcome.witness)
        if welcome is None or not can_see:
            raise MigrationError(
                f"{lost}; the guest has been handed over, and whether it runs there cannot be seen from here: "
                "it stands still here. `ostler resume` it only where you know that it does not run there"
            ) from lost
        while self._source.state is State.COMMITTED:
            self._source.resolve(witness.target_fate(Path(welcome.witness)))
            if self._source.state is State.COMMITTED:
                time.sleep(DOUBT_SLICE_S)
        if self._source.state is State.KEPT:
            self._guest.take_back()
            raise MigrationError(f"{lost}; the target died before it ran the guest, which goes on here") from lost

    def _keep(self, witnessed: Witness, error: BaseException) -> None:
        """The guest stays, if it is still ours."""
        if self._source.state in (State.COMMITTED, State.DONE):
            return
        if self._left_behind is not None:
            self._left_behind.close()
        if self._link is not None and self._source.state is not State.KEPT:
            with contextlib.suppress(MigrationError):
                self._link.set_timeout(1.0)
                self._link.send(self._source.cancel(str(error)))
        self._source.lost()
        witnessed.write(witness.ABORTED)
        self._guest.on_loop(self._guest.go_on)
        self._tell("kept", force=True)

    # -- progress ----------------------------------------------------------------------------------

    def _tell(self, phase: str, *, left_bytes: int | None = None, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._reported < 0.2:
            return
        self._reported = now
        progress, pace = self.progress, self._pace
        progress.phase, progress.round = phase, pace.round
        if self._link is not None:
            progress.sent_bytes = self._link.sent_bytes
        if left_bytes is not None:
            progress.left_bytes = left_bytes
        progress.bytes_per_s, progress.dirty_bytes_per_s = pace.bytes_per_s, pace.dirty_per_s
        progress.eta_s = pace.eta_s(progress.left_bytes, self.budget.bytes_per_s)
        progress.elapsed_s = now - self._started
        self._report(progress)

"""Taking a guest in: its memory as it comes, then its state, then the moment when it is ours.

`receive` runs in a thread while the VM process's loop serves; `take_over` on the loop's thread, which it holds from the
restoring of the state until the guest is ours or is not: no device may act for a guest that may still run elsewhere.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from ostler.errors import MigrationCancelled, MigrationError, OstlerError
from ostler.memory import GuestMemory
from ostler.migration import wire, witness
from ostler.migration.link import Link, LinkLost, expect
from ostler.migration.pages import Batch, DiskPart, parse_batch, parse_disk_part
from ostler.migration.target import State, Target
from ostler.migration.wire import CARD, LIMITS, PAGE_BYTES, RUN, Frame, Kind
from ostler.migration.witness import Witness

DOUBT_SLICE_S = 0.02
COMMIT_TIMEOUT_S = 30.0


class WritableDisk(Protocol):
    """A disk that comes along."""

    @property
    def size_bytes(self) -> int: ...
    def writev(self, offset: int, views: Sequence[memoryview]) -> None: ...
    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None: ...


class Incoming:
    """One guest on its way here; the machine is made, and stands still."""

    def __init__(
        self, target: Target, link: Link, memory: GuestMemory, disks: dict[int, WritableDisk], witnessed: Witness
    ) -> None:
        self.target, self._link, self._memory, self._disks = target, link, memory, disks
        self._witness = witnessed
        self._lock = threading.Lock()
        self._complete = threading.Event()
        self._error: MigrationError | None = None
        self._others: list[Link] = []

    # -- memory ------------------------------------------------------------------------------------

    def receive(self) -> None:
        """Take what stream 0 brings until every stream has said FINAL. Raises MigrationError."""
        self._drain(self._link, 0)
        while not self._complete.wait(0.2):
            with self._lock:
                if self._error is not None:
                    raise self._error
            if self._link.pending():
                self._take(self._link.receive(), 0)
        with self._lock:
            if self._error is not None:
                raise self._error

    def join(self, link: Link, stream: int) -> None:
        """A further stream, to its end; in a thread of its own."""
        try:
            frame = expect(link, Kind.STREAM)
            with self._lock:
                self.target.joins(frame, stream)
                self._others.append(link)
            self._drain(link, stream)
        except MigrationError as error:
            with self._lock:
                # A stranger's connection ends nothing but itself.
                if link in self._others and self._error is None:
                    self._error = error
        finally:
            link.close()

    def _drain(self, link: Link, stream: int) -> None:
        buffer = bytearray(max(LIMITS[Kind.PAGES], LIMITS[Kind.DISK]))
        while True:
            frame = link.receive(buffer)
            self._take(frame, stream)
            if frame.kind is Kind.FINAL:
                return

    def _take(self, frame: Frame, stream: int) -> None:
        # The state machine is one for all streams; content is applied outside of its lock.
        with self._lock:
            self.target.received(frame, stream)
            if self.target.is_complete:
                self._complete.set()
        if frame.kind is Kind.PAGES:
            self._apply(parse_batch(memoryview(frame.payload), allowed=self._memory.contains))
        elif frame.kind is Kind.MISSING:
            self._give_up_pages(bytes(frame.payload))
        elif frame.kind is Kind.ROUND and stream == 0:
            self._link.send(wire.pack(Kind.ROUND, bytes(frame.payload)))
        elif frame.kind is Kind.DISK:
            self._apply_disk(parse_disk_part(memoryview(frame.payload)))

    def _apply(self, batch: Batch) -> None:
        memory = self._memory
        if not batch.content:
            for gpa, count in batch.runs:
                memory.discard(gpa, count * PAGE_BYTES)
            return
        for gpa, content in batch.parts():
            memory.view(gpa, len(content))[:] = content

    def _give_up_pages(self, payload: bytes) -> None:
        """What is here of these pages is old; what they hold comes when the guest runs here."""
        if len(payload) % RUN.size:
            raise MigrationError(f"source: MISSING of {len(payload)} bytes")
        for gpa, count in RUN.iter_unpack(payload):
            if gpa % PAGE_BYTES or not self._memory.contains(gpa, count * PAGE_BYTES):
                raise MigrationError(f"source: MISSING names {count} pages at {gpa:#x}, which the guest has not got")
            self._memory.discard(gpa, count * PAGE_BYTES)

    def _apply_disk(self, part: DiskPart) -> None:
        disk = self._disks.get(part.disk)
        if disk is None or part.offset + part.size_bytes > disk.size_bytes:
            raise MigrationError(f"source: {part.size_bytes} bytes at {part.offset} of disk {part.disk}: no such place")
        try:
            if part.content:
                disk.writev(part.offset, [part.content])
            else:
                disk.write_zeroes(part.offset, part.size_bytes, unmap=True)
        except OSError as error:
            raise MigrationError(f"disk {part.disk}: {error.strerror or error}") from error

    # -- the hand-over -------------------------------------------------------------------------------

    def take_over(self, restore: Callable[[bytes], None], acquire: Callable[[], None]) -> None:
        """Restore the state, say so, and wait for the word. When this returns, the guest is ours and may run.

        `acquire` takes what only one may hold, once the source has let go of it. Raises MigrationError where the guest
        stays elsewhere.
        """
        target = self.target
        try:
            restore(bytes(target.state_data))
        except OstlerError as error:
            self.fail(str(error))
            raise MigrationError(f"the guest's state was not taken: {error}") from error
        # Before READY: from then on the source may commit, and look here for what came of it.
        self._witness.write(witness.PREPARED)
        self._link.set_timeout(COMMIT_TIMEOUT_S)
        try:
            self._link.send(target.prepared())
            target.received(expect(self._link, Kind.COMMIT, Kind.CANCEL))
        except LinkLost as error:
            self._resolve(error)
        acquire()
        # The very last thing before the first instruction: who dies earlier leaves the guest to the source.
        self._witness.write(witness.RUNNING)

    def say_running(self) -> None:
        """The guest runs; a source that is gone needs not know."""
        with contextlib.suppress(LinkLost):
            self._link.send(self.target.running())

    def strays(self, deliver: Callable[[int, bytes], None]) -> None:
        """Network frames that still came to where the guest was: card and frame, until there are no more."""
        with contextlib.suppress(MigrationError):
            while (frame := expect(self._link, Kind.FRAME, Kind.DONE)).kind is Kind.FRAME:
                data = bytes(frame.payload)
                if len(data) > CARD.size:
                    deliver(CARD.unpack_from(data)[0], data[CARD.size :])

    def fail(self, reason: str) -> None:
        """Tell the source why the guest is not taken, if there is still time for that."""
        if self.target.state in (State.NEW, State.RECEIVING):
            data = self.target.failed(reason)
            try:
                self._link.set_timeout(1.0)
                self._link.send(data)
            except LinkLost:
                pass

    def _resolve(self, lost: LinkLost) -> None:
        """The link was lost between READY and COMMIT: what the source did is in its witness, where that can be seen."""
        offer = self.target.offer
        can_see = offer is not None and offer.boot == witness.boot_id() and bool(offer.witness)
        if offer is None or not can_see:
            raise MigrationError(
                f"{lost}; whether the source has given the guest away cannot be seen from here, so it does not run here"
            ) from lost
        while self.target.state is State.PREPARED:
            self.target.resolve(witness.source_fate(Path(offer.witness)))
            if self.target.state is State.PREPARED:
                time.sleep(DOUBT_SLICE_S)
        if self.target.state is not State.RUNNING:
            raise MigrationCancelled(f"{lost}; the guest has stayed where it was") from lost

    def close(self) -> None:
        """End every stream, whoever waits on it."""
        with self._lock:
            for each in [*self._others, self._link]:
                each.shutdown()

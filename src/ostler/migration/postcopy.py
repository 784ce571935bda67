"""The source's part after the guest has gone: pages that it left behind, those first that it waits for.

What is missing is known here alone; the target asks for whatever it touches and has not got.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from ostler.errors import MigrationError
from ostler.memory import GuestMemory
from ostler.migration import wire
from ostler.migration.dirty import merged, page_count
from ostler.migration.link import Link, expect
from ostler.migration.pace import Budget
from ostler.migration.pages import Run, pack_batch, split_zero
from ostler.migration.wire import PAGE_BYTES, RUN, WANTED, Encoding, Kind

# A page that is waited for brings its neighbours along; in between go batches small enough that nobody waits long.
AROUND_PAGES, BACKGROUND_PAGES = 32, 32


class LeftBehind:
    """Serves one target's post-copy stream in a thread of its own."""

    def __init__(self, link: Link, memory: GuestMemory, runs: Sequence[Run], budget: Budget) -> None:
        """What nobody waits for is sent within the budget."""
        self._link, self._memory, self._budget = link, memory, budget
        self._order = merged(runs, [])
        last = max((gpa // PAGE_BYTES + count for gpa, count in self._order), default=0)
        # A byte a page: made while the guest stands still.
        self._missing, self._was = bytearray(last), bytearray(last)
        for gpa, count in self._order:
            self._was[gpa // PAGE_BYTES : gpa // PAGE_BYTES + count] = b"\1" * count
        self._missing[:] = self._was
        self.error: MigrationError | None = None
        self.asked = 0
        self._runs_there = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="post-copy", daemon=True)

    @property
    def left_bytes(self) -> int:
        return self._missing.count(1) * PAGE_BYTES

    def start(self) -> None:
        """Answer what is asked for."""
        self._thread.start()

    def push(self) -> None:
        """The guest runs there: send the rest too."""
        self._runs_there.set()

    def close(self) -> None:
        """Nobody will ask any more."""
        self._link.shutdown()
        self._runs_there.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether every page is there, or it has failed."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        try:
            while not self._runs_there.is_set():
                if self._link.pending(0.002):
                    self._answer()
            for start, count in self._order:
                for first in range(0, count, BACKGROUND_PAGES):
                    self._answer()
                    pages = min(BACKGROUND_PAGES, count - first)
                    sent = self._send(
                        range(start + first * PAGE_BYTES, start + (first + pages) * PAGE_BYTES, PAGE_BYTES)
                    )
                    self._keep_to_budget(sent * PAGE_BYTES)
            self._answer()
            self._link.send(wire.pack(Kind.DONE))
            while (frame := expect(self._link, Kind.DONE, Kind.WANT)).kind is not Kind.DONE:
                self._give(bytes(frame.payload))
        except MigrationError as error:
            self.error = error

    def _keep_to_budget(self, size_bytes: int) -> None:
        until = time.monotonic() + self._budget.wait_s(size_bytes, time.monotonic())
        while (wait_s := until - time.monotonic()) > 0:
            if self._link.pending(wait_s):
                self._answer()

    def _answer(self) -> None:
        while self._link.pending():
            self._give(bytes(expect(self._link, Kind.WANT).payload))

    def _give(self, wanted: bytes) -> None:
        for (gpa,) in WANTED.iter_unpack(wanted[: len(wanted) // WANTED.size * WANTED.size]):
            self.asked += 1
            if gpa % PAGE_BYTES or not self._memory.contains(gpa, PAGE_BYTES):
                raise MigrationError(f"target: wants the page at {gpa:#x}, which the guest has not got")
            page = gpa // PAGE_BYTES
            if page < len(self._missing) and self._missing[page]:
                self._send(range(gpa, gpa + AROUND_PAGES * PAGE_BYTES, PAGE_BYTES))
            elif page >= len(self._was) or not self._was[page]:
                # Nothing was ever there.
                self._link.send_parts(pack_batch(self._memory, [(gpa, 1)], Encoding.ZERO))

    def _send(self, pages: range) -> int:
        """Those of the pages that are still missing there; how many."""
        runs: list[Run] = []
        for gpa in pages:
            page = gpa // PAGE_BYTES
            if page < len(self._missing) and self._missing[page]:
                self._missing[page] = 0
                if runs and runs[-1][0] + runs[-1][1] * PAGE_BYTES == gpa:
                    runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                else:
                    runs.append((gpa, 1))
        full, zero = split_zero(self._memory, runs)
        for part, encoding in ((full, Encoding.RAW), (zero, Encoding.ZERO)):
            if part:
                self._link.send_parts(pack_batch(self._memory, part, encoding))
        return page_count(runs)


def missing_frames(runs: Sequence[Run]) -> list[bytes]:
    """MISSING, in as many frames as it takes."""
    most = wire.LIMITS[Kind.MISSING] // RUN.size
    return [
        wire.pack(Kind.MISSING, b"".join(RUN.pack(gpa, count) for gpa, count in runs[at : at + most]))
        for at in range(0, max(len(runs), 1), most)
    ]

"""The source's part after the guest has gone: pages that it left behind, those first that it waits for.

What is missing is known here alone; the target asks for whatever it touches and has not got.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from ostler.errors import MigrationError
from ostler.memory import GuestMemory
from ostler.migration import wire
from ostler.migration.dirty import merged
from ostler.migration.link import Link, expect
from ostler.migration.pages import Run, pack_batch, split_zero
from ostler.migration.wire import PAGE_BYTES, WANTED, Encoding, Kind

# A page that is waited for brings its neighbours along; in between go batches small enough that nobody waits long.
AROUND_PAGES, BACKGROUND_PAGES = 8, 32


class LeftBehind:
    """Serves one target's post-copy stream in a thread of its own."""

    def __init__(self, link: Link, memory: GuestMemory, runs: Sequence[Run]) -> None:
        self._link, self._memory = link, memory
        self._missing = {gpa + page * PAGE_BYTES for gpa, count in runs for page in range(count)}
        self._order = [(gpa, count) for gpa, count in merged(runs, [])]
        self.error: MigrationError | None = None
        self.asked = 0
        self._thread = threading.Thread(target=self._serve, name="post-copy", daemon=True)

    @property
    def left_bytes(self) -> int:
        return len(self._missing) * PAGE_BYTES

    def start(self) -> None:
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether every page is there, or it has failed."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        try:
            for start, count in self._order:
                for first in range(0, count, BACKGROUND_PAGES):
                    self._answer()
                    pages = min(BACKGROUND_PAGES, count - first)
                    self._send(range(start + first * PAGE_BYTES, start + (first + pages) * PAGE_BYTES, PAGE_BYTES))
            self._answer()
            self._link.send(wire.pack(Kind.DONE))
            while (frame := expect(self._link, Kind.DONE, Kind.WANT)).kind is not Kind.DONE:
                self._give(bytes(frame.payload))
        except MigrationError as error:
            self.error = error

    def _answer(self) -> None:
        while self._link.pending():
            self._give(bytes(expect(self._link, Kind.WANT).payload))

    def _give(self, wanted: bytes) -> None:
        for (gpa,) in WANTED.iter_unpack(wanted[: len(wanted) // WANTED.size * WANTED.size]):
            self.asked += 1
            if gpa % PAGE_BYTES or not self._memory.contains(gpa, PAGE_BYTES):
                raise MigrationError(f"target: wants the page at {gpa:#x}, which the guest has not got")
            if gpa in self._missing:
                self._send(range(gpa, gpa + AROUND_PAGES * PAGE_BYTES, PAGE_BYTES))
            elif not self._was_missing(gpa):
                # Nothing was ever there.
                self._link.send_parts(pack_batch(self._memory, [(gpa, 1)], Encoding.ZERO))

    def _was_missing(self, gpa: int) -> bool:
        return any(start <= gpa < start + count * PAGE_BYTES for start, count in self._order)

    def _send(self, pages: range) -> None:
        """Those of the pages that are still missing there."""
        runs: list[Run] = []
        for gpa in pages:
            if gpa in self._missing:
                self._missing.discard(gpa)
                if runs and runs[-1][0] + runs[-1][1] * PAGE_BYTES == gpa:
                    runs[-1] = (runs[-1][0], runs[-1][1] + 1)
                else:
                    runs.append((gpa, 1))
        full, zero = split_zero(self._memory, runs)
        for part, encoding in ((full, Encoding.RAW), (zero, Encoding.ZERO)):
            if part:
                self._link.send_parts(pack_batch(self._memory, part, encoding))

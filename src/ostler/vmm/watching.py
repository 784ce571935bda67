"""Watching a guest's memory for a while: what is written (the dirty log), and what is touched at all.

Writes are exact: the accelerator's log of its processors' writes, and the devices' own (`migration.dirty`). Accesses
are the host processor's accessed bits (`host.footprint` says what they see); watched ranges get lines of their own in
smaps by a piece of advice that means nothing else for guest memory.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any

from ostler.errors import HostError
from ostler.host import footprint
from ostler.machine.machine import Machine
from ostler.memory.layout import PAGE_SIZE
from ostler.migration.dirty import DirtyTracker, Run, page_count

MAX_RUNS_TOLD = 4096


class Watch:
    """One look at a guest's memory over an interval: `start` on the loop's thread, `finish` on another."""

    def __init__(self, machine: Machine, ranges: Sequence[tuple[int, int]]) -> None:
        """`ranges` are guest-physical addresses and sizes, whole pages, each to be told of by itself."""
        self._memory = machine.memory
        self._ranges = ranges
        self._tracker = DirtyTracker(machine.memory, machine.vm)
        self._started_s = 0.0

    def start(self) -> None:
        """Begin. Raises HostError where writes are logged for somebody else, AccelError."""
        self._tracker.start()
        try:
            self._set_apart(footprint.MADV_DONTDUMP)
            self._tracker.take()
            footprint.forget_references()
        except OSError as error:
            self._tracker.stop()
            raise HostError(f"memory: cannot be watched here: {error.strerror or error}") from error
        self._started_s = time.monotonic()

    def finish(self, stopping: threading.Event, interval_s: float) -> dict[str, Any]:
        """Wait and report."""
        try:
            stopping.wait(interval_s)
            took_s = time.monotonic() - self._started_s
            runs = self._tracker.take()
            smaps = footprint.SMAPS.read_bytes()
        finally:
            self._tracker.stop()
            with contextlib.suppress(OSError):
                self._set_apart(footprint.MADV_DODUMP)
        mapping = self._memory.mapping
        whole = footprint.footprint(mapping.address, mapping.size_bytes, smaps=smaps)
        dirty = page_count(runs) * PAGE_SIZE
        return {
            "interval_s": took_s,
            "dirty_bytes": dirty,
            "dirty_bytes_per_s": dirty / took_s,
            "accessed_bytes": whole.referenced_bytes,
            "working_set_bytes": max(whole.referenced_bytes, dirty),
            "dirty_runs": [list(run) for run in runs[:MAX_RUNS_TOLD]],
            "ranges": [self._describe(each, runs, smaps) for each in self._ranges],
        }

    def _describe(self, watched: tuple[int, int], runs: Sequence[Run], smaps: bytes) -> dict[str, Any]:
        gpa, size = watched
        within = [(max(start, gpa), min(start + count * PAGE_SIZE, gpa + size)) for start, count in runs]
        host = self._memory.host_address(gpa, size)
        return {
            "address": gpa, "size_bytes": size,
            "dirty_bytes": sum(max(end - start, 0) for start, end in within),
            "accessed_bytes": footprint.footprint(host, size, smaps=smaps).referenced_bytes,
        }  # fmt: skip

    def _set_apart(self, advice: int) -> None:
        for gpa, size in self._ranges:
            footprint.advise(self._memory.host_address(gpa, size), size, advice)

"""How long each phase of a run took: setup, fetch, load, boot, the guest's own time, power-off.

The borders inside the guest are seen on its console: Ostler's init says when it was reached, the kernel when it powers
down. So a tap stands between the guest's console and standard output, only where somebody asked for the figures.
"""

from __future__ import annotations

import os
import threading
import time
from types import TracebackType
from typing import Self

SETUP_VARIABLE = "OSTLER_SETUP_SECONDS"  # `make run` says how long its own part took
MARKS = {"init": b"[ostler] init reached", "power-off": b"reboot: Power down"}
_CHUNK_BYTES = 64 << 10


class Phases:
    """Collects durations in order; the clock runs from its making."""

    def __init__(self) -> None:
        self.durations_s: dict[str, float] = {}
        if setup := os.environ.get(SETUP_VARIABLE):
            self.durations_s["setup"] = float(setup)
        self._last = time.monotonic()

    def end(self, phase: str, at: float | None = None) -> None:
        """End `phase` at `at` (default: now), which began when the one before ended."""
        now = time.monotonic() if at is None else at
        self.durations_s[phase] = max(0.0, now - self._last)
        self._last = now

    def guest(self, *, ended: float, run_s: float, marks: dict[str, float]) -> None:
        """Add the phases of a run that took `run_s` until `ended`, with what the tap saw."""
        self.end("load", ended - run_s)
        if "init" in marks:
            self.end("boot", marks["init"])
        if "power-off" in marks:
            self.end("in the guest" if "init" in marks else "boot", marks["power-off"])
        self.end("power-off" if marks else "run", ended)

    def table(self) -> str:
        """One line per phase, and their sum."""
        rows = {**self.durations_s, "in all": sum(self.durations_s.values())}
        return "\n".join(f"ostler: {phase:<12} {seconds:8.2f} s" for phase, seconds in rows.items())


class Tap:
    """A pipe into `out` that notes when each mark came by. A context manager; leaving it drains the pipe."""

    def __init__(self, out: int) -> None:
        self.marks: dict[str, float] = {}
        self._out = out
        self._read, self.fd = os.pipe()
        self._thread = threading.Thread(target=self._copy, name="console tap")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)
        self._thread.join()

    def _copy(self) -> None:
        tail = b""
        longest = max(map(len, MARKS.values()))
        try:
            while chunk := os.read(self._read, _CHUNK_BYTES):
                tail = tail[-longest:] + chunk
                for name, text in MARKS.items():
                    if name not in self.marks and text in tail:
                        self.marks[name] = time.monotonic()
                while chunk:
                    chunk = chunk[os.write(self._out, chunk) :]
        except BrokenPipeError:
            pass  # whoever writes into the pipe meets the same once it is closed here
        finally:
            os.close(self._read)

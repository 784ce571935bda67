"""What devices are given in tests: hand-moved clocks, recorded lines and power events, streams of bytes in memory."""

from __future__ import annotations

from collections.abc import Sequence

from ostler.devices.wiring import IrqLine, PowerEvent


class FakeClock:
    """Both clocks, moved by hand."""

    def __init__(self, wall_ns: int = 0) -> None:
        self.now_ns = 0
        self.wall_start_ns = wall_ns

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_ns(self) -> int:
        return self.wall_start_ns + self.now_ns


class FakeTimer:
    """Remembers the deadline."""

    def __init__(self) -> None:
        self.deadline_ns: int | None = None

    def arm(self, deadline_ns: int) -> None:
        self.deadline_ns = deadline_ns

    def disarm(self) -> None:
        self.deadline_ns = None


class RecordedLine:
    """An IrqLine and the levels it was driven to."""

    def __init__(self) -> None:
        self.levels: list[int] = []
        self.line = IrqLine(self.levels.append)


class RecordedPower:
    """Collects announcements."""

    def __init__(self) -> None:
        self.events: list[tuple[PowerEvent, int]] = []

    def __call__(self, event: PowerEvent, code: int = 0) -> None:
        self.events.append((event, code))


def scatter(waiting: bytearray, views: Sequence[memoryview]) -> int:
    """Move what is `waiting` into the views, as readv(2) would; return how many bytes that was."""
    count = 0
    for view in views:
        piece = waiting[: len(view)]
        view[: len(piece)] = piece
        del waiting[: len(piece)]
        count += len(piece)
    return count

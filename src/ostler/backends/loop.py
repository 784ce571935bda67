"""What a back end needs of the process around it: an event loop, and the lock that guards the devices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


class Loop(Protocol):
    """The part of an event loop that back ends use. Callbacks run in its thread, without any lock."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back while `fd` is readable or at its end. Loop thread only."""

    def remove_reader(self, fd: int) -> None:
        """Undo `add_reader`; unknown descriptors are fine. Loop thread only."""

    def add_writer(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back while `fd` takes bytes or is broken. Loop thread only."""

    def remove_writer(self, fd: int) -> None:
        """Undo `add_writer`; unknown descriptors are fine. Loop thread only."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run in the loop's thread; from any thread."""


@dataclass(frozen=True, slots=True)
class Host:
    """Where back ends live. They call devices only in the loop's thread and holding `lock`."""

    loop: Loop
    lock: AbstractContextManager[object]

    def locked(self, callback: Callable[[], None]) -> Callable[[], None]:
        """The callback, run under the lock."""

        def run() -> None:
            with self.lock:
                callback()

        return run

"""A running event loop for back ends, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Queue
from typing import TypeVar

import pytest

from ostler.backends.loop import Host
from ostler.vmm.loop import EventLoop

Result = TypeVar("Result")
TIMEOUT_S = 20


@dataclass(frozen=True, slots=True)
class RunningLoop:
    """The loop, and a way to do things in its thread."""

    host: Host

    def call(self, function: Callable[[], Result]) -> Result:
        """Run in the loop's thread under the lock; the result, or whatever it raised."""
        results: Queue[tuple[Result | None, BaseException | None]] = Queue()

        def run() -> None:
            try:
                with self.host.lock:
                    results.put((function(), None))
            except BaseException as error:
                results.put((None, error))

        self.host.loop.call_soon(run)
        result, error = results.get(timeout=TIMEOUT_S)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


@pytest.fixture
def running() -> Iterator[RunningLoop]:
    with EventLoop() as loop:
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            yield RunningLoop(Host(loop, threading.Lock()))
        finally:
            loop.stop()
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()

"""One thread that does what may take long: a flush waits for the disk, and nothing else of the guest should.

Jobs are done in their order; each `done` runs on the event loop, under the board's lock.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Self

from ostler.backends.loop import Host

Job = Callable[[], None]
Done = Callable[[OSError | None], None]


class Worker:
    """Owns the thread, which starts with the first job; a context manager."""

    def __init__(self, name: str, host: Host) -> None:
        self._name, self._host = name, host
        self._jobs: queue.Queue[tuple[Job, Done] | None] = queue.Queue()
        self._finished: deque[tuple[Done, OSError | None]] = deque()
        self._thread: threading.Thread | None = None

    def submit(self, job: Job, done: Done) -> None:
        """Have `job` done; it may raise OSError, which is what `done` then gets. Under the board's lock."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put((job, done))

    def wait(self) -> None:
        """Return when every job is done and every `done` has run. Under the board's lock."""
        self._jobs.join()
        self._deliver()

    def close(self) -> None:
        """Finish what was submitted and end the thread; nobody is told any more."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        self._finished.clear()

    def _work(self) -> None:
        while (each := self._jobs.get()) is not None:
            job, done = each
            try:
                job()
                error = None
            except OSError as raised:
                error = raised.with_traceback(None)
            self._finished.append((done, error))
            # The job may hold views of guest memory: not longer than this.
            del each, job, done
            self._jobs.task_done()
            self._host.loop.call_soon(self._host.locked(self._deliver))

    def _deliver(self) -> None:
        while self._finished:
            done, error = self._finished.popleft()
            done(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

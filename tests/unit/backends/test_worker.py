"""The worker thread: order, errors, waiting, and nothing left behind."""

from __future__ import annotations

import threading

from ostler.backends.loop import Host
from ostler.backends.worker import Worker
from tests.unit.backends.test_vhost_user import TurnedLoop


def test_jobs_are_done_in_order_and_announced_on_the_loop_under_the_lock() -> None:
    loop, lock, seen = TurnedLoop(), threading.Lock(), []
    with Worker("test", Host(loop, lock)) as worker:
        for number in range(5):
            worker.submit(lambda: None, lambda error, number=number: seen.append((number, error, lock.locked())))  # type: ignore[misc]
        assert seen == []
        loop.until(lambda: len(seen) == 5)
    assert seen == [(number, None, True) for number in range(5)]


def test_error_reaches_whoever_asked() -> None:
    def fail() -> None:
        raise OSError(28, "full")

    seen: list[OSError | None] = []
    with Worker("test", Host(TurnedLoop(), threading.Lock())) as worker:
        worker.submit(fail, seen.append)
        worker.wait()
    assert [str(error) for error in seen] == ["[Errno 28] full"]


def test_close_finishes_what_was_begun_and_ends_the_thread() -> None:
    done: list[int] = []
    worker = Worker("ostler-test-worker", Host(TurnedLoop(), threading.Lock()))
    worker.submit(lambda: done.append(1), lambda _error: None)
    worker.close()
    worker.close()
    assert done == [1]
    assert not [thread for thread in threading.enumerate() if thread.name == "ostler-test-worker"]

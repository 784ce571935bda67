"""Pages and disks' parts onto the streams of a migration, each page always on the same one: order needs no care then.

Further streams have a thread each with a short queue; stream 0 is the caller's own. What goes wrong in a thread is
raised at the caller's next `flush`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

from ostler.errors import MigrationError
from ostler.memory import GuestMemory
from ostler.migration.link import Link
from ostler.migration.pace import Budget
from ostler.migration.pages import Run, batches, pack_batch, pack_disk_part, split_zero
from ostler.migration.wire import PAGE_BYTES, Encoding

SHARD_BYTES = 2 << 20
QUEUE_BATCHES = 4


class _Stream:
    """A further stream and its thread."""

    def __init__(self, link: Link, memory: GuestMemory, encoding: Encoding) -> None:
        self.link, self._memory, self._encoding = link, memory, encoding
        self.error: MigrationError | None = None
        self._jobs: queue.Queue[list[Run] | bytes | None] = queue.Queue(QUEUE_BATCHES)
        self._thread = threading.Thread(target=self._work, name="migrate-stream", daemon=True)
        self._thread.start()

    def put(self, job: list[Run] | bytes) -> None:
        self._jobs.put(job)

    def wait(self) -> None:
        self._jobs.join()

    def close(self) -> None:
        self.link.shutdown()
        self._jobs.put(None)
        self._thread.join()
        self.link.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if self.error is None:
                    if isinstance(job, bytes):
                        self.link.send(job)
                    else:
                        self.link.send_parts(pack_batch(self._memory, job, self._encoding))
            except MigrationError as error:
                self.error = error
            finally:
                self._jobs.task_done()


class Sender:
    """All streams of one migration. One thread at a time."""

    def __init__(
        self, main: Link, others: Sequence[Link], memory: GuestMemory, encoding: Encoding, budget: Budget,
        check: Callable[[], None],
    ) -> None:  # fmt: skip
        """`check` is called between batches and may raise: cancelled, or the target said something."""
        self._main, self._memory, self._encoding = main, memory, encoding
        self._streams = [_Stream(link, memory, encoding) for link in others]
        self.budget, self._check = budget, check
        self.zero_bytes = 0
        self.waited_s = 0.0
        """For the budget's sake."""

    @property
    def sent_bytes(self) -> int:
        return self._main.sent_bytes + sum(each.link.sent_bytes for each in self._streams)

    def pages(self, runs: Sequence[Run], *, new: bool = False, hurry: bool = False) -> None:
        """Send what these pages hold now. `new`: zeroes need no sending. `hurry`: whatever the budget."""
        for batch in batches(runs):
            full, zero = split_zero(self._memory, batch)
            if zero:
                self.zero_bytes += sum(count for _, count in zero) * PAGE_BYTES
                if not new:
                    self._main_or_shards(zero, Encoding.ZERO)
            if full:
                self._main_or_shards(full, self._encoding)
            self._pace(full, hurry=hurry)

    def disk(self, number: int, offset: int, content: bytes, *, hurry: bool = False) -> None:
        """Send a part of a disk."""
        self._main.send(pack_disk_part(number, offset, content, self._encoding))
        self._wait(len(content), hurry=hurry)

    def flush(self) -> None:
        """Return when everything has been given to the kernel. Raises what a stream met."""
        for each in self._streams:
            each.wait()
        for each in self._streams:
            if each.error is not None:
                raise each.error

    def everywhere(self, frame: bytes) -> None:
        """The same frame at the end of every stream but the main one."""
        for each in self._streams:
            each.put(frame)

    def close(self) -> None:
        for each in self._streams:
            each.close()

    def _main_or_shards(self, runs: list[Run], encoding: Encoding) -> None:
        if not self._streams:
            self._main.send_parts(pack_batch(self._memory, runs, encoding))
            return
        shares: list[list[Run]] = [[] for _ in range(len(self._streams) + 1)]
        for gpa, count in runs:
            while count:
                taken = min(count, (SHARD_BYTES - gpa % SHARD_BYTES) // PAGE_BYTES)
                shares[gpa // SHARD_BYTES % len(shares)].append((gpa, taken))
                gpa, count = gpa + taken * PAGE_BYTES, count - taken
        for stream, share in zip(self._streams, shares[1:], strict=True):
            if share:
                stream.put(b"".join(pack_batch(self._memory, share, encoding)) if encoding is Encoding.ZERO else share)
        if shares[0]:
            self._main.send_parts(pack_batch(self._memory, shares[0], encoding))

    def _pace(self, full: list[Run], *, hurry: bool) -> None:
        self._wait(sum(count for _, count in full) * PAGE_BYTES, hurry=hurry)

    def _wait(self, size_bytes: int, *, hurry: bool) -> None:
        self._check()
        if hurry:
            return
        wait_s = self.budget.wait_s(size_bytes, time.monotonic())
        while wait_s > 0:
            slept = min(wait_s, 0.05)
            time.sleep(slept)
            self.waited_s += slept
            wait_s -= slept
            self._check()

"""Children of a running guest: caught once, begun as often as wanted, each made another than its parent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ostler.client.job import Job
from ostler.client.snapshots import RestoredGuest, described, start
from ostler.control.connection import Connection, ConnectionLost
from ostler.control.runtime import Entry
from ostler.errors import GuestNotFound
from ostler.snapshot import manifest
from ostler.snapshot.store import Snapshot

# The parent's pause is over by then; this is for the writing of memory that it shared before.
CATCH_TIMEOUT_S = 120.0
# Starting a machine is the host's processors' work: more at a time only take turns.
AT_A_TIME = 4


def fork(
    entry: Entry, names: Sequence[str | None], *, leash: bool, remove: bool, job: Job | None = None,
    begun: Callable[[RestoredGuest], None] | None = None,
) -> tuple[list[RestoredGuest], float]:  # fmt: skip
    """See `ostler.client.snapshots.fork`. `begun` is told of each child as soon as it is configured, in any thread."""
    with contextlib.ExitStack() as undo:
        # The parent keeps what it caught for as long as this connection.
        connection = undo.enter_context(Connection.to(entry))
        try:
            seed = connection.request("fork", timeout_s=CATCH_TIMEOUT_S, manifest=described(entry, job))
        except ConnectionLost as error:
            raise GuestNotFound(f"guest {entry.name!r}: has ended") from error
        folder = Path(seed["folder"])
        snapshot = Snapshot(folder, manifest.load(folder))
        children: list[RestoredGuest] = []

        def begin(name: str | None) -> RestoredGuest:
            child = start(snapshot, name, leash=leash, remove=remove, ports=False)
            children.append(child)
            child.configure()
            if begun is not None:
                begun(child)
            return child

        with ThreadPoolExecutor(min(AT_A_TIME, len(names)) or 1) as workers:
            under_way = [workers.submit(begin, name) for name in names]
        try:
            # In the order of their names, whoever was first.
            found = [each.result() for each in under_way]
        except BaseException:
            for child in children:
                child.end()
            raise
    return found, float(seed["pause_ms"])

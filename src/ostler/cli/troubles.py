"""Trouble with a running guest's devices, said on standard error as it happens.

A helper program that died, a network that is down: the guest goes on as well as it can, and its user knows.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ostler.control.connection import Connection
from ostler.errors import OstlerError

if TYPE_CHECKING:
    from ostler.control.runtime import Entry


@contextmanager
def shown(entry: Entry) -> Iterator[None]:
    """Say what happens to the guest's devices for the length of a block."""
    connection = Connection.to(entry)
    # A thread of its own, which ends with the connection: the guest's end or this block's.
    thread = threading.Thread(target=_tell, args=(connection.events(),), name="troubles", daemon=True)
    thread.start()
    try:
        yield
    finally:
        connection.interrupt()
        thread.join()
        connection.close()


def tell(lines: Iterable[str]) -> None:
    """Say what the guest has to do without."""
    for line in lines:
        sys.stderr.write(f"ostler: {line}\n")


def _tell(events: Iterator[dict[str, object]]) -> None:
    with contextlib.suppress(OSError, OstlerError, ValueError):
        for event in events:
            if event["event"] == "device":
                sys.stderr.write(f"ostler: {event['device']}: {event['message']}\n")
                sys.stderr.flush()

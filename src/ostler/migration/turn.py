"""One hand-over at a time on a host: while one guest stands still, others that are on their way let it have the host.

A lock on a file, so that it holds between processes and ends with them. It is a courtesy: who waits too long goes on.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

NAME = "turn"
SLICE_S = 0.003
GIVE_WAY_S, WAIT_S = 1.0, 10.0


class Turn:
    """Owns its descriptor; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError."""
        self._fd = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # A lock asked for again on the same descriptor would replace the one that is held.
        self._is_mine = False

    def give_way(self) -> None:
        """Wait while another guest stands still; not where it is one's own turn, or about to be."""
        if self._is_mine:
            return
        if self._tried(fcntl.LOCK_SH):
            self.release()
            return
        until = time.monotonic() + GIVE_WAY_S
        while time.monotonic() < until:
            time.sleep(SLICE_S)
            if self._tried(fcntl.LOCK_SH):
                self.release()
                return

    def take(self, check: Callable[[], None]) -> bool:
        """Wait for one's turn, calling `check` meanwhile; whether there was anything to wait for."""
        self._is_mine = True
        if self._tried(fcntl.LOCK_EX):
            return False
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            check()
            time.sleep(SLICE_S)
            if self._tried(fcntl.LOCK_EX):
                break
        return True

    def release(self) -> None:
        """Let the next one."""
        self._is_mine = False
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _tried(self, kind: int) -> bool:
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

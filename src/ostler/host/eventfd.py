"""eventfd(2) as a wake-up flag: set from any thread, waited for in one event loop."""

from __future__ import annotations

import contextlib
import os
from typing import Self


class EventFd:
    """Owns one non-blocking eventfd. `signal` is safe in signal handlers and threads."""

    __slots__ = ("fd",)

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """For select and for handing to an accelerator as an irqfd."""
        return self.fd

    def signal(self) -> None:
        """Add one. A counter at its limit already wakes its reader, so EAGAIN is success."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.fd, 1)

    def drain(self) -> int:
        """The number of signals since the last drain; 0 when there was none."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close once; further calls do nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

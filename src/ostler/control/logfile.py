"""Logs that a guest can fill as long as it likes: bounded, with the older half kept under another name."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

LOG_BYTES = 4 << 20
OLDER = ".1"


class RotatedLog:
    """A file that is put aside under the name `.1` when it is full, in place of the one before it."""

    def __init__(self, path: Path, limit_bytes: int = LOG_BYTES) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._fd = -1
        self._size = 0

    def write(self, data: bytes) -> None:
        """Append. A full disk loses output, not the guest."""
        with contextlib.suppress(OSError):
            if self._size >= self._limit_bytes:
                self._path.rename(self._path.with_name(self._path.name + OLDER))
                self.close()
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                self._size = os.fstat(self._fd).st_size
            self._size += os.write(self._fd, data)

    def tail(self, size_bytes: int) -> bytes:
        """The last bytes that are kept."""
        return read(self._path)[-size_bytes:] if size_bytes else b""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read(path: Path) -> bytes:
    """All that is kept of a log, oldest first; nothing where there is none."""
    kept = b""
    for part in (path.with_name(path.name + OLDER), path):
        with contextlib.suppress(FileNotFoundError):
            kept += part.read_bytes()
    return kept

"""Logs that a guest can fill as long as it likes: bounded, with the older half kept under another name."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

LOG_BYTES = 4 << 20
OLDER = ".1"
FOLLOW_SLICE_S = 0.1


class RotatedLog:
    """A file that is put aside under the name `.1` when it is full, in place of the one before it."""

    def __init__(self, path: Path, limit_bytes: int = LOG_BYTES) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._fd = -1
        self._size = 0

    def move(self, path: Path) -> None:
        """Be written there; before anything is."""
        self._path = path

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


def follow(path: Path, *, is_over: Callable[[], bool]) -> Iterator[bytes]:
    """All that is kept of a log in one piece, then what is added, through rotations, until `is_over`."""
    with contextlib.ExitStack() as held:
        file: BinaryIO | None = None
        first = True
        while True:
            # Asked before the reading: what was written until the end is read after it.
            ending = is_over()
            said = b""
            if file is None or _is_rotated(path, file):
                said = file.read() if file else b""
                with contextlib.suppress(FileNotFoundError):
                    file = held.enter_context(path.open("rb"))
                if first:
                    said = read(path.with_name(path.name + OLDER))
            said += file.read() if file else b""
            if said or first:
                yield said
            first = False
            if ending:
                return
            time.sleep(FOLLOW_SLICE_S)


def _is_rotated(path: Path, file: BinaryIO) -> bool:
    try:
        return path.stat().st_ino != os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False

"""A witness: one small file that says how far a side of a migration got, and by its lock whether that side lives.

When the link is lost between READY and RUNNING, neither side can know what the other did. Where both can see the
other's witness (one host, or a shared folder) they look: what is written by one who has died stays true. A side writes
before it acts: the source `aborted` before the guest runs on there and `committed` before it sends COMMIT; the target
`running` before the guest's first instruction there. So at most one of them ever runs it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import Self

from ostler.migration.source import TargetFate
from ostler.migration.target import SourceFate

WORD_BYTES = 16
KEPT_S = 24 * 3600.0
# The source's words and the target's.
MOVING, STOPPED, ABORTED, COMMITTED = "moving", "stopped", "aborted", "committed"
RECEIVING, PREPARED, RUNNING = "receiving", "prepared", "running"


class Witness:
    """One side's own file, locked as long as this process lives; a context manager that removes it."""

    def __init__(self, path: Path, word: str) -> None:
        """Raises OSError."""
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.write(word)

    def write(self, word: str) -> None:
        """One write: whoever looks sees the old word or the new one."""
        os.pwrite(self._fd, word.encode().ljust(WORD_BYTES), 0)

    def close(self) -> None:
        """Nobody needs it any more."""
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def leave(self) -> None:
        """Let go of it, but leave it lying: the other side may still look."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def look(path: Path) -> tuple[str, bool] | None:
    """The word, and whether its writer lives; None where there is no such file or it cannot be read."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            lives = False
        except BlockingIOError:
            lives = True
        # Read after the lock: of one who has died this is the last word.
        word = os.pread(fd, WORD_BYTES, 0).decode(errors="replace").strip()
    finally:
        os.close(fd)
    return word, lives


def tidy(folder: Path) -> None:
    """Remove what sides that were killed have left lying, once nobody can be waiting to read it any more."""
    for path in (*folder.glob("*.source"), *folder.glob("*.target")):
        with contextlib.suppress(OSError):
            seen = look(path)
            if seen is not None and not seen[1] and time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink()


def source_fate(path: Path) -> SourceFate:
    """What the source did, as far as its witness knows."""
    seen = look(path)
    if seen is None:
        # It removes its witness only when the guest is its own again, or known to run elsewhere.
        return SourceFate.UNKNOWN if path.exists() else SourceFate.KEPT
    word, lives = seen
    if word == COMMITTED:
        return SourceFate.GAVE_AWAY
    if word == ABORTED:
        return SourceFate.KEPT
    if lives:
        return SourceFate.UNKNOWN
    return SourceFate.DIED_STOPPED if word == STOPPED else SourceFate.KEPT


def target_fate(path: Path) -> TargetFate:
    """What the target did, as far as its witness knows."""
    seen = look(path)
    if seen is None:
        # Once PREPARED it removes its witness only after the guest has run there to its end.
        return TargetFate.UNKNOWN if path.exists() else TargetFate.RAN
    word, lives = seen
    if word == RUNNING:
        return TargetFate.RUNS if lives else TargetFate.RAN
    return TargetFate.UNKNOWN if lives else TargetFate.NEVER_RAN


def boot_id() -> str:
    """This host's, since it was started: a path means something only where this is the same."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""

"""Files and trees of the host's on their way into a guest: the frames of a copy."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from ostler.agent import wire
from ostler.errors import BadRequest


def frames(source: Path) -> Iterator[bytes]:
    """Yield the frames of a copy into the guest, each at most a little above 64 KiB.

    The source itself is followed where it is a link; links below it are copied as links. Sockets, pipes and devices
    are left out.

    Raises:
        BadRequest: there is no such source, or it cannot be read.
    """
    try:
        yield from _walk(source, "", source.stat())
    except OSError as error:
        raise BadRequest(f"{error.filename or source}: {error.strerror}") from error
    yield wire.end()


def _walk(path: Path, relative: str, found: os.stat_result) -> Iterator[bytes]:
    head = {"path": relative, "mode": stat.S_IMODE(found.st_mode), "mtime_ns": found.st_mtime_ns}
    if stat.S_ISDIR(found.st_mode):
        yield wire.entry({**head, "type": "folder"})
        for below in sorted(path.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                yield from _walk(below, f"{relative}/{below.name}".lstrip("/"), below.lstat())
    elif stat.S_ISLNK(found.st_mode):
        yield wire.entry({**head, "type": "link", "target": str(path.readlink())})
    elif stat.S_ISREG(found.st_mode):
        with path.open("rb", buffering=0) as file:
            yield wire.entry({**head, "type": "file"})
            while chunk := file.read(wire.MAX_PAYLOAD):
                yield wire.content(chunk)
        yield wire.content(b"")


def file_frames(content: bytes, mode: int) -> Iterator[bytes]:
    """Yield the frames that write one file."""
    yield wire.entry({"path": "", "type": "file", "mode": mode, "mtime_ns": time.time_ns()})
    for at in range(0, len(content), wire.MAX_PAYLOAD):
        yield wire.content(content[at : at + wire.MAX_PAYLOAD])
    yield wire.content(b"")
    yield wire.end()

"""Snapshots on disk: folders below the user's data folder, whole or not there.

    <data>/snapshots/<name>/    see `ostler.snapshot.manifest`
    <data>/snapshots/.new-…     being written; the writer holds a lock on it, and what nobody holds is removed

A snapshot's files change no more once it has its name. An incremental one needs its parent, which cannot be removed
before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from ostler.control.runtime import check_name
from ostler.errors import BadRequest, HostError, StateError
from ostler.snapshot import manifest as manifests
from ostler.snapshot.image import checksums, chunks_with_data
from ostler.snapshot.manifest import CHUNK_BYTES, FileFacts, Manifest

# Smaller files are looked at whole each time.
SMALL_BYTES = 4 << 20
_ZEROES = bytes(CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One that is there."""

    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """What it is called."""
        return self.folder.name

    @property
    def disk_bytes(self) -> int:
        """What it takes on the host."""
        return sum(each.stat().st_blocks * 512 for each in self.folder.iterdir() if each.is_file())


def root() -> Path:
    """Return the folder of all: in `OSTLER_DATA`, else in the user's data directory."""
    chosen = os.environ.get("OSTLER_DATA")
    return (Path(chosen) if chosen else platformdirs.user_data_path("ostler")) / "snapshots"


def names() -> list[str]:
    """What snapshots there are, in the order of the alphabet."""
    with contextlib.suppress(OSError):
        return sorted(each.name for each in root().iterdir() if not each.name.startswith(".") and each.is_dir())
    return []


def find(name: str) -> Snapshot:
    """The snapshot of that name. Raises BadRequest where there is none, StateError for one that is damaged."""
    folder = root() / check_name(name)
    if not folder.is_dir():
        having = ", ".join(names()[:8])
        raise BadRequest(f"snapshot {name!r}: not known; there {f'are {having}' if having else 'are none'}")
    return Snapshot(folder, manifests.load(folder))


def parent_of(snapshot: Snapshot) -> Snapshot | None:
    """What an incremental one goes on from. Raises BadRequest, StateError where that is gone."""
    if snapshot.manifest.parent is None:
        return None
    name, _, wanted = snapshot.manifest.parent.partition(":")
    parent = find(name)
    if parent.manifest.id != wanted or parent.manifest.parent is not None:
        raise StateError(f"snapshot {snapshot.name!r}: its parent {name!r} is another one now")
    return parent


def children_of(name: str) -> list[str]:
    """Incremental snapshots that need this one."""
    found = []
    for each in names():
        with contextlib.suppress(StateError, BadRequest):
            parent = find(each).manifest.parent
            if parent is not None and parent.partition(":")[0] == name:
                found.append(each)
    return found


@contextlib.contextmanager
def workspace(name: str, *, replace: bool = False, within: Path | None = None) -> Iterator[Path]:
    """A folder to write a snapshot into, which gets its name when the block ends well, and else goes.

    `within` is where it is to be, by default with the user's snapshots.

    Raises BadRequest for a name that is taken, HostError.
    """
    place = within or root()
    target = place / check_name(name)
    if target.exists() and not replace:
        raise BadRequest(f"snapshot {name!r}: there is one of that name; expected another, or --replace")
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _heal(place)
        part = Path(tempfile.mkdtemp(prefix=".new-", dir=place))
        lock = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"snapshot {target}: {error.strerror or error}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield part
        if target.exists():
            _discard(target)
        part.rename(target)
        _sync(place)
    except OSError as error:
        raise HostError(f"snapshot {target}: {error.strerror or error}") from error
    finally:
        os.close(lock)
        shutil.rmtree(part, ignore_errors=True)


def remove(name: str) -> None:
    """Remove a snapshot; guests that began with it go on. Raises BadRequest for one that others need."""
    folder = root() / check_name(name)
    if not folder.is_dir():
        find(name)
    if needing := children_of(name):
        raise BadRequest(f"snapshot {name!r}: {', '.join(needing[:4])} go on from it; remove them first")
    _discard(folder)


def describe(folder: Path, name: str, *, sync: bool = True) -> FileFacts:
    """A file just written, and on stable storage if `sync`. Raises OSError."""
    with (folder / name).open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return FileFacts(
            size_bytes=os.fstat(file.fileno()).st_size, chunks=checksums(file.fileno()), known_as=_known_as(file)
        )


def verify(snapshot: Snapshot, *, everything: bool = False, report: Callable[[str], None] | None = None) -> None:
    """Look at the files' checksums, of large ones only where the file system does not know them for unchanged.

    Raises StateError.
    """
    for name, facts in snapshot.manifest.files.items():
        path = manifests.place(snapshot.folder, name)
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size != facts.size_bytes:
                    raise StateError(f"snapshot {snapshot.name!r}: {name}: {size} bytes, expected {facts.size_bytes}")
                if everything or size <= SMALL_BYTES or _known_as(file) != facts.known_as:
                    if report and size > SMALL_BYTES:
                        report(f"looking at {name}")
                    _check(snapshot.name, name, file.fileno(), facts)
        except OSError as error:
            raise StateError(f"snapshot {snapshot.name!r}: {name}: {error.strerror or error}") from error


def _check(snapshot: str, name: str, fd: int, facts: FileFacts) -> None:
    for number in sorted({int(each) for each in facts.chunks} | {*chunks_with_data(fd)}):
        data = os.pread(fd, CHUNK_BYTES, number * CHUNK_BYTES)
        wanted = facts.chunks.get(str(number))
        empty = wanted is None and data == _ZEROES[: len(data)]
        if not empty and hashlib.sha256(data).hexdigest() != wanted:
            raise StateError(f"snapshot {snapshot!r}: {name} is damaged at {number * CHUNK_BYTES:#x}")


def _known_as(file: object) -> tuple[int, int, int, int]:
    found = os.fstat(file.fileno())  # type: ignore[attr-defined]
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _heal(place: Path) -> None:
    """Remove what writers that were killed have left."""
    for each in place.iterdir():
        if each.name.startswith((".new-", ".dead-")):
            with contextlib.suppress(OSError):
                lock = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(each, ignore_errors=True)
                finally:
                    os.close(lock)


def _discard(folder: Path) -> None:
    """Out of sight first, by one rename, then away."""
    dead = Path(tempfile.mkdtemp(prefix=".dead-", dir=folder.parent))
    with contextlib.suppress(FileNotFoundError):
        folder.rename(dead / folder.name)
    shutil.rmtree(dead, ignore_errors=True)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

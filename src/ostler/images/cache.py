"""The cache of guest material: folders that are either whole or not there.

An entry is built in a temporary folder beside its place and renamed into it, under a lock of the entry's own. So a
process that dies leaves no half-written entry, and two that want the same entry build it once. Every entry carries
a manifest with the SHA-256 of its files; an entry that no longer matches it is discarded and built again.

Hashing a module tree or a root disk takes longer than some guests live. So an entry that was found whole leaves a stamp
of its files' sizes, times and inode numbers beside it (never inside: entries do not change), and is hashed again only
when one of these differs: a file written to in any ordinary way is found, and so is a disk restored from elsewhere.

Left out on purpose: eviction. Entries are few and named; `rm -r` of the folder is always safe.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostler.errors import ImageError
from ostler.host.folders import cache_root
from ostler.images.progress import Progress, silent

MANIFEST = "manifest.json"
STAMPS = "stamps"


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole, verified folder of the cache; `facts` is what its builder recorded about it."""

    path: Path
    facts: dict[str, Any]


def root() -> Path:
    """Return the cache's folder: `OSTLER_CACHE`, else the user's cache directory."""
    return cache_root()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(name: str, progress: Progress = silent) -> Iterator[None]:
    """Hold the lock `name` against other processes; say so when that means waiting.

    Raises:
        ImageError: the cache's folder cannot be written.
    """
    path = root() / "locks" / name.replace("/", "-")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise ImageError(f"cache {root()}: cannot be written ({error.strerror}); OSTLER_CACHE names another") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another ostler that prepares {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find(name: str) -> Entry | None:
    """Return the entry `name` if it is there and every file matches its manifest."""
    path = root() / name
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files: dict[str, str] = manifest["files"]
        whole = check(path, files) is None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Entry(path, manifest.get("facts", {})) if whole else None


def check(path: Path, files: Mapping[str, str], digest: Callable[[Path], str] = sha256) -> str | None:
    """Return the name of the first file below `path` that is missing or not what `files` says, or None.

    Hashes nothing if all files are as they were when they last matched.
    """
    stamp = _stamp(path)
    looks = _looks(path, files)
    try:
        if stamp.read_text() == looks:
            return None
    except (OSError, ValueError):
        pass
    for file, expected in files.items():
        try:
            if digest(path / file) != expected:
                return file
        except OSError:
            return file
    if looks == _looks(path, files):  # nobody wrote while this process read
        with contextlib.suppress(OSError):  # a cache that can only be read works, more slowly
            write_atomically(stamp, looks)
    return None


def drop_stamp(path: Path) -> None:
    """Forget that the entry at `path` was ever found whole."""
    _stamp(path).unlink(missing_ok=True)


def _stamp(path: Path) -> Path:
    return root() / STAMPS / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]


def _looks(path: Path, files: Mapping[str, str]) -> str:
    """Return what the files look like from outside, with what they are expected to hold."""
    seen = hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode())
    for file in sorted(files):
        try:
            status = (path / file).stat()
        except OSError:
            return f"no {file}"
        seen.update(f"{file}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}\0".encode())
    return seen.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that readers see the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            file.close()
            Path(file.name).rename(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def obtain(
    name: str,
    build: Callable[[Path], dict[str, Any]],
    progress: Progress = silent,
    *,
    accept: Callable[[Entry], bool] = lambda _entry: True,
) -> Entry:
    """Return the entry `name`, building it first where it is missing, damaged or not accepted.

    `build` fills the empty folder it is given and returns facts worth recording (JSON data). `accept` turns down
    entries that an older Ostler made.

    Raises:
        ImageError: the cache cannot be written; also whatever `build` raises.
    """
    if (entry := find(name)) and accept(entry):
        return entry
    with locked(name, progress):
        if (entry := find(name)) and accept(entry):  # another process built it while this one waited
            return entry
        try:
            return _build(name, build)
        except OSError as error:
            raise ImageError(f"cache {root() / name}: {error.strerror or error}") from error


def _build(name: str, build: Callable[[Path], dict[str, Any]]) -> Entry:
    place = root() / name
    place.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{place.name}.part-"
    for stale in place.parent.glob(f"{prefix}*"):  # of a process that was killed: the lock says nobody uses it
        shutil.rmtree(stale, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=prefix, dir=place.parent))
    try:
        part.chmod(0o755)
        facts = build(part)
        files = {str(f.relative_to(part)): sha256(f) for f in sorted(part.rglob("*")) if f.is_file()}
        (part / MANIFEST).write_text(json.dumps({"facts": facts, "files": files}, indent=2) + "\n")
        if place.exists():
            shutil.rmtree(place)
        part.rename(place)
        with contextlib.suppress(OSError):
            write_atomically(_stamp(place), _looks(place, files))
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Entry(place, facts)

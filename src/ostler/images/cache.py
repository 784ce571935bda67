"""The cache of guest material: folders that are either whole or not there.

An entry is built in a temporary folder beside its place and renamed into it, under a lock of the entry's own. So a
process that dies leaves no half-written entry, and two that want the same entry build it once. Every entry carries
a manifest with the SHA-256 of its files; an entry that no longer matches it is discarded and built again.

Left out on purpose: eviction. Entries are few and named; `rm -r` of the folder is always safe.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from ostler.errors import ImageError
from ostler.images.progress import Progress, silent

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole, verified folder of the cache; `facts` is what its builder recorded about it."""

    path: Path
    facts: dict[str, Any]


def root() -> Path:
    """Return the cache's folder: `OSTLER_CACHE`, else the user's cache directory."""
    chosen = os.environ.get("OSTLER_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("ostler")


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
        whole = all(sha256(path / file) == digest for file, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Entry(path, manifest.get("facts", {})) if whole else None


def obtain(name: str, build: Callable[[Path], dict[str, Any]], progress: Progress = silent) -> Entry:
    """Return the entry `name`, building it first where it is missing or damaged.

    `build` fills the empty folder it is given and returns facts worth recording (JSON data).

    Raises:
        ImageError: the cache cannot be written; also whatever `build` raises.
    """
    if entry := find(name):
        return entry
    with locked(name, progress):
        if entry := find(name):  # another process built it while this one waited
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
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Entry(place, facts)

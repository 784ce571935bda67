"""Digests of files that are mostly holes, and of trees.

A disk of 8 GiB with 300 MiB in it is hashed in the time of 300 MiB: chunks of nothing but zeroes are left out, whether
the file system stores them or not, and every other chunk goes in with its number. So the digest does not depend on how
sparse a copy came out.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ostler.host import files
from ostler.images.cache import sha256

CHUNK_BYTES = 64 << 10
SPARSE = "sparse-sha256:"
TREE = "tree-sha256:"
_ZERO_CHUNK = bytes(CHUNK_BYTES)


def digest(path: Path) -> str:
    """Return the digest of a file, of a disk (its name ends in .raw) or of a folder; the last two say their kind."""
    if path.is_dir():
        return TREE + _tree(path)
    return SPARSE + _sparse(path) if path.suffix == ".raw" else sha256(path)


def _sparse(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        at = 0  # chunks before this are done: two extents can share one
        for start, length in files.data_extents(file.fileno()):
            at = max(at, start // CHUNK_BYTES * CHUNK_BYTES)
            while at < start + length:
                chunk = os.pread(file.fileno(), CHUNK_BYTES, at)
                if chunk != _ZERO_CHUNK[: len(chunk)]:
                    found.update((at // CHUNK_BYTES).to_bytes(8, "little") + chunk)
                at += CHUNK_BYTES
    found.update(b"size" + size_bytes.to_bytes(8, "little"))
    return found.hexdigest()


def _tree(path: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        found.update(f"{file.relative_to(path)}\0{sha256(file)}\n".encode())
    return found.hexdigest()

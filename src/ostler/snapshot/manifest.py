"""What a snapshot is made of, `manifest.json` of its folder: validated as hostile input, nothing in it unbounded.

    manifest.json   this
    state           the machine's state: `ostler.snapshot.schema`
    memory          the guest's memory as it lies in the guest's process; pages of zeroes are holes. Can be mapped.
    memory.ranges   of an incremental snapshot: offset and size of each range that `memory` has and the parent has not
    diskN.blocks, diskN.map   of each disk that the guest may write to: `ostler.backends.disk_layers`

Checksums are SHA-256, for each chunk of 2 MiB of a file that is not all a hole. Reading half a gigabyte takes longer
than restoring it may; so the manifest also says by what the host's file system knows the files it was written with
(inode, size, times, which nobody sets back). Where that is still so they are what they were, else every chunk is looked
at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ostler.config.complaints import bad_request
from ostler.errors import BadRequest, StateError

FORMAT = 1
CHUNK_BYTES = 2 << 20
MANIFEST, STATE, MEMORY, RANGES, HOLES = "manifest.json", "state", "memory", "memory.ranges", "memory.holes"
MAX_MANIFEST_BYTES = 16 << 20

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")]
Size = Annotated[int, Field(ge=0, lt=1 << 50)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileFacts(_Part):
    """A file of the snapshot."""

    size_bytes: Size
    chunks: dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Digest] = {}
    """Of each chunk with data in it, by its number."""
    known_as: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Inode, size, times of modification and of change, in nanoseconds."""


class DiskFacts(_Part):
    """A disk. Without `layers` it is its base alone, a file of the host's or the snapshot's own copy of it."""

    base: str
    read_only: bool = False
    base_bytes: Size
    base_mtime_ns: int
    size_bytes: Size
    layers: Annotated[tuple[str, ...], Field(max_length=255)] = ()
    """Files of the snapshot; a fork's are the parent's, by their absolute path."""
    block_map: str = ""


class Manifest(_Part):
    """All of it. Read by `load`."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)] = FORMAT
    name: Name
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    ostler: Annotated[str, Field(max_length=80)]
    created: Annotated[float, Field(ge=0, lt=1e12)]
    """Seconds since 1970; the guest's time of day stood at that."""
    guest: Name
    model: Annotated[str, Field(max_length=1000)]
    spec: dict[str, Any]
    facts: dict[str, Any] = {}
    """What the runtime folder recorded of the guest: image, command, …"""
    job: dict[str, Any] = {}
    memory_bytes: Size
    image_bytes: Size
    """The length of `memory`."""
    parent: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}:[0-9a-f]{16}$")] | None = None
    """Name and id of the snapshot that an incremental one goes on from."""
    frozen: bool = False
    """Whether the guest's file systems were frozen."""
    memory: str = MEMORY
    """A file of the snapshot; a fork's is the parent's, by its absolute path."""
    memory_base: Annotated[str, Field(pattern=r"^/proc/\d+/fd/\d+$")] | None = None
    """The image that a fork's `memory` has changes of, which is the parent's as well."""
    disks: Annotated[dict[str, DiskFacts], Field(max_length=32)] = {}
    files: Annotated[dict[str, FileFacts], Field(max_length=128)] = {}


def load(folder: Path) -> Manifest:
    """Read a folder's. Raises StateError."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise StateError(f"snapshot {folder.name}: a manifest of more than {MAX_MANIFEST_BYTES} bytes")
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        complaint: BadRequest = bad_request(error)
        raise StateError(f"snapshot {folder.name}: manifest: {complaint}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"snapshot {folder.name}: manifest: {getattr(error, 'strerror', None) or error}") from error


def save(manifest: Manifest, folder: Path) -> None:
    """Write a folder's, whole or not at all. Raises OSError."""
    part = folder / f".{MANIFEST}"
    part.write_text(manifest.model_dump_json(exclude_defaults=True))
    part.rename(folder / MANIFEST)


def place(folder: Path, name: str) -> Path:
    """Where a file of the snapshot is. Raises StateError for one outside of its folder, but for a fork's."""
    path = Path(name)
    if path.is_absolute() and name.startswith("/proc/"):
        return path
    if path.name != name or name.startswith("."):
        raise StateError(f"snapshot {folder.name}: file {name[:80]!r}: expected one of its own")
    return folder / name

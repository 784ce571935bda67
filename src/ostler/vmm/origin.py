"""Where a guest that is not booted begins: the snapshot, or the parent, that `origin.json` of its folder names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ostler.backends.disk_layers import DiskImage
from ostler.control.runtime import ORIGIN, Entry
from ostler.errors import StateError
from ostler.snapshot import image, manifest, schema, store
from ostler.snapshot.store import Snapshot

if TYPE_CHECKING:
    from ostler.machine.saved import SavedMachine
    from ostler.memory import GuestMemory


class Origin:
    """Implements `vmm.run.Beginning` for a folder in the form of a snapshot."""

    def __init__(self, snapshot: Snapshot, parent: Snapshot | None, saved: SavedMachine) -> None:
        self.snapshot = snapshot
        self._parent = parent
        self.saved = saved
        self.disks = {
            name: self._disk_image(facts) for name, facts in snapshot.manifest.disks.items() if not facts.read_only
        }

    @classmethod
    def of(cls, entry: Entry, *, report: Callable[[str], None] | None = None) -> Self | None:
        """What the launcher left for this guest; None where it is to be booted. Raises StateError, BadRequest."""
        try:
            found = json.loads((entry.path / ORIGIN).read_bytes())
        except FileNotFoundError:
            return None
        folder = Path(found["snapshot"])
        return cls.read(Snapshot(folder, manifest.load(folder)), report=report)

    @classmethod
    def read(cls, snapshot: Snapshot, *, report: Callable[[str], None] | None = None) -> Self:
        """Judge a snapshot: its files' checksums, its state. Raises StateError, BadRequest."""
        parent = store.parent_of(snapshot)
        for each in (parent, snapshot):
            if each is not None:
                store.verify(each, report=report)
        try:
            data = (snapshot.folder / manifest.STATE).read_bytes()
        except OSError as error:
            raise StateError(f"snapshot {snapshot.name!r}: state: {error.strerror}") from error
        saved, _ = schema.decode(data)
        return cls(snapshot, parent, saved)

    @property
    def base(self) -> str | None:
        """Name and id of the snapshot whose memory this guest's is a copy of, for incremental ones to come."""
        first = self._parent or self.snapshot
        return None if self.is_fork else f"{first.name}:{first.manifest.id}"

    @property
    def is_fork(self) -> bool:
        """Whether it is a running guest, and not a snapshot on disk, that this one goes on from."""
        return Path(self.snapshot.manifest.memory).is_absolute()

    def open_memory(self) -> int:
        whole = self._parent or self.snapshot
        path = manifest.place(whole.folder, whole.manifest.memory_base or whole.manifest.memory)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StateError(f"snapshot {whole.name!r}: memory: {error.strerror}") from error
        if (size := os.fstat(fd).st_size) != whole.manifest.image_bytes:
            os.close(fd)
            raise StateError(f"snapshot {whole.name!r}: memory: {size} bytes, expected {whole.manifest.image_bytes}")
        return fd

    def complete(self, memory: GuestMemory) -> None:
        """Bring memory that began with the parent's image to what it was at the snapshot. Raises StateError."""
        folder, facts = self.snapshot.folder, self.snapshot.manifest
        if self._parent is None and facts.memory_base is None:
            return
        ranges = image.read_ranges(folder / manifest.RANGES, len(memory.whole))
        changes = manifest.place(folder, facts.memory)
        if facts.memory_base is None:
            image.fill(memory, changes, ranges)
        else:
            holes = image.read_ranges(folder / manifest.HOLES, len(memory.whole))
            image.lay_over(memory, changes, ranges=ranges, holes=holes)

    def _disk_image(self, facts: manifest.DiskFacts) -> DiskImage:
        folder, base = self.snapshot.folder, Path(facts.base)
        return DiskImage(
            # What is no absolute path is the snapshot's own copy of a disk that was written to directly.
            base=base if base.is_absolute() else manifest.place(folder, facts.base),
            base_bytes=facts.base_bytes,
            base_mtime_ns=facts.base_mtime_ns,
            size_bytes=facts.size_bytes,
            layers=tuple(manifest.place(folder, name) for name in facts.layers),
            block_map=manifest.place(folder, facts.block_map) if facts.block_map else None,
        )

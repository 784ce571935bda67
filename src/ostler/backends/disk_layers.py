"""A throw-away disk's content, put away and taken up again: one sparse file and a map of which blocks it has.

    NAME.blocks   what was written over the base, each block at its own place; the rest is holes
    NAME.map      for each block the number of the layer that has it, 0 for the base, compressed with zlib

There is one layer; a fork, whose children begin at once, names those of its parent. A disk made of them writes to a
new nameless layer above and leaves the files as they are, so that many guests may begin with them. The base is told by
its path, size and time of change; another one under the same path is refused.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from ostler.backends.disk import RawDisk, open_raw
from ostler.backends.disk_overlay import BASE, FrozenLayers, OverlayDisk, block_bytes, map_runs
from ostler.errors import StateError
from ostler.host import files

BLOCKS_SUFFIX, MAP_SUFFIX = ".blocks", ".map"
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DiskImage:
    """What a disk begins with: its base as it was, the layers above it, from below, and the map."""

    base: Path
    base_bytes: int
    base_mtime_ns: int
    size_bytes: int
    layers: tuple[Path, ...]
    block_map: Path


def save_map(frozen: FrozenLayers, path: Path, *, flat: bool) -> None:
    """Write which layer has which block; if `flat`, all layers are one. Raises OSError."""
    found = frozen.block_map.translate(bytes([0]) + bytes([1]) * 255) if flat else frozen.block_map
    path.write_bytes(zlib.compress(found, 1))


def save_blocks(frozen: FrozenLayers, fd: int) -> None:
    """Write the content of all layers into the empty file `fd`. Raises OSError."""
    os.ftruncate(fd, len(frozen.block_map) * frozen.block_bytes)
    used = {kind for _, _, kind in map_runs(frozen.block_map, 0, len(frozen.block_map))} - {BASE}
    for layer in used:
        if _has_all(frozen, layer) and files.clone(frozen.layers[layer - 1], fd):
            return
    for first, count, kind in map_runs(frozen.block_map, 0, len(frozen.block_map)):
        if kind != BASE:
            _copy(frozen.layers[kind - 1], fd, first * frozen.block_bytes, count * frozen.block_bytes)


def _has_all(frozen: FrozenLayers, layer: int) -> bool:
    """Whether one layer has every block there is."""
    return frozen.block_map.count(layer) == len(frozen.block_map)


def _copy(source: int, target: int, offset: int, size: int) -> None:
    """Copy a range but for its holes."""
    end = min(offset + size, os.fstat(source).st_size)
    while offset < end:
        try:
            start = os.lseek(source, offset, os.SEEK_DATA)
        except OSError:
            return  # nothing but a hole from here on
        offset = min(os.lseek(source, start, os.SEEK_HOLE), end)
        while start < offset:
            start += os.pwrite(target, os.pread(source, min(offset - start, _COPY_BYTES), start), start)
        if start >= end:
            return


def open_layered(image: DiskImage, *, folder: Path | None = None, serial: str | None = None) -> OverlayDisk:
    """A disk that begins as it was put away. Raises BadRequest, DiskBusy, HostError as `open_raw`, and StateError."""
    base = open_raw(image.base, read_only=True, serial=serial)
    opened: list[int] = []
    try:
        found = os.fstat(base.fileno())
        if (base.size_bytes, found.st_mtime_ns) != (image.base_bytes, image.base_mtime_ns):
            raise StateError(f"disk {image.base}: is not what it was when the guest was saved")
        block = block_bytes(image.size_bytes)
        blocks = -(-image.size_bytes // block)
        beyond = -(-base.size_bytes // block)
        block_map = load_map(image.block_map, blocks, beyond, layers=len(image.layers))
        for path in image.layers:
            opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            if os.fstat(opened[-1]).st_size < blocks * block:
                raise StateError(f"saved disk {path}: expected {blocks * block} bytes")
        place = folder or Path(tempfile.gettempdir())
        opened.append(files.unnamed(place))
        return OverlayDisk(
            base, opened[-1], size_bytes=image.size_bytes, layers=opened[:-1], block_map=block_map, folder=place
        )
    except OSError as error:
        _close(base, opened)
        raise StateError(f"saved disk {error.filename or image.base}: {error.strerror or error}") from error
    except BaseException:
        _close(base, opened)
        raise


def _close(base: RawDisk, opened: list[int]) -> None:
    base.close()
    for fd in opened:
        os.close(fd)


def load_map(path: Path, blocks: int, base_blocks: int, *, layers: int) -> bytes:
    """The map of a disk of so many blocks, of which the base has only the first. Raises StateError, OSError."""
    unpacking = zlib.decompressobj()
    try:
        with path.open("rb") as file:
            # One byte more than expected is enough to know that it is too many.
            found = unpacking.decompress(file.read(blocks + 1024), blocks + 1)
    except zlib.error as error:
        raise StateError(f"saved disk map {path}: {error}") from error
    known = bytes(range(layers + 1))
    if len(found) != blocks or found.translate(None, known) or BASE in found[base_blocks:]:
        raise StateError(f"saved disk map {path}: expected {blocks} blocks in {layers} layers")
    return found

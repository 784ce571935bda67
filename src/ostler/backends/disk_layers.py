"""A throw-away disk's content, put away and taken up again: one sparse file and a map of which blocks it has.

    NAME.blocks   what was written over the base, each block at its own place; the rest is holes
    NAME.map      runs of blocks that are not the base's: first block, number of blocks, number of the layer, each in
                  four bytes, little endian, in ascending order

There is one layer; a fork, whose children begin at once, names those of its parent. A disk made of them writes to a
new nameless layer above and leaves the files as they are, so that many guests may begin with them. The base is told by
its path, size and time of change; another one under the same path is refused.
"""

from __future__ import annotations

import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ostler.backends.disk import RawDisk, open_raw
from ostler.backends.disk_overlay import BASE, FrozenLayers, OverlayDisk, block_bytes, map_runs
from ostler.errors import StateError
from ostler.host import files

BLOCKS_SUFFIX, MAP_SUFFIX = ".blocks", ".map"
RUN = struct.Struct("<III")
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DiskImage:
    """What a disk begins with: its base as it was, the layers above it, from below, and the map."""

    base: Path
    base_bytes: int
    base_mtime_ns: int
    size_bytes: int
    layers: tuple[Path, ...]
    block_map: Path | None
    """None without layers."""


def save_map(frozen: FrozenLayers, path: Path, *, flat: bool) -> None:
    """Write which layer has which block; if `flat`, all layers are one. Raises OSError."""
    found = frozen.block_map.translate(bytes([0]) + bytes([1]) * 255) if flat else frozen.block_map
    runs = (RUN.pack(*each) for each in map_runs(found, 0, len(found)) if each[2] != BASE)
    path.write_bytes(b"".join(runs))


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
        runs = load_map(image.block_map, blocks, beyond, layers=len(image.layers)) if image.block_map else None
        for path in image.layers:
            opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            if os.fstat(opened[-1]).st_size < blocks * block:
                raise StateError(f"saved disk {path}: expected {blocks * block} bytes")
        place = folder or Path(tempfile.gettempdir())
        opened.append(files.unnamed(place))
        return OverlayDisk(base, opened[-1], size_bytes=image.size_bytes, layers=opened[:-1], runs=runs, folder=place)
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


def load_map(path: Path, blocks: int, base_blocks: int, *, layers: int) -> list[tuple[int, int, int]]:
    """The runs of a disk of so many blocks, of which the base has only the first. Raises StateError, OSError."""
    most = blocks * RUN.size
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most or len(data) % RUN.size:
        raise StateError(f"saved disk map {path}: {len(data)} bytes, expected runs of {RUN.size}")
    runs, end, missing = [], 0, blocks - base_blocks
    for first, count, layer in RUN.iter_unpack(data):
        if first < end or not count or first + count > blocks or not 0 < layer <= layers:
            raise StateError(f"saved disk map {path}: blocks {first}+{count} in layer {layer} cannot be")
        end = first + count
        missing -= max(0, end - max(first, base_blocks))
        runs.append((first, count, layer))
    if missing:
        raise StateError(f"saved disk map {path}: {missing} blocks are in no layer, nor in the base")
    return runs

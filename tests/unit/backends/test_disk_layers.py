"""Disks put away and taken up again: as they were, whatever is done above them, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from ostler.backends import disk_layers
from ostler.backends.disk_layers import RUN, DiskImage
from ostler.backends.disk_overlay import OverlayDisk, open_overlay
from ostler.errors import StateError
from ostler.host import files

BLOCK = 4096
SIZE_BYTES = 64 * BLOCK


@pytest.fixture(autouse=True)
def _no_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "clone", lambda _source, _target: False)


def base_file(folder: Path) -> Path:
    path = folder / "base.raw"
    path.write_bytes(bytes(i % 251 for i in range(21 * 512)))
    return path


def read(disk: OverlayDisk) -> bytes:
    data = bytearray(SIZE_BYTES)
    disk.readv(0, [memoryview(data)])
    return bytes(data)


def put_away(folder: Path) -> tuple[DiskImage, bytes]:
    """A disk written to in two layers, put away, and what was on it."""
    path = base_file(folder)
    disk = open_overlay(path, size_bytes=SIZE_BYTES)
    assert isinstance(disk, OverlayDisk)
    with disk:
        disk.writev(5000, [memoryview(b"first layer")])
        disk.freeze()
        disk.writev(7 * BLOCK + 9, [memoryview(b"second layer")])
        disk.write_zeroes(0, 100, unmap=True)
        frozen = disk.freeze()
        expected = read(disk)
        disk.writev(0, [memoryview(b"later")])
        blocks, block_map = folder / "disk0.blocks", folder / "disk0.map"
        disk_layers.save_map(frozen, block_map, flat=True)
        with blocks.open("w+b") as file:
            disk_layers.save_blocks(frozen, file.fileno())
    found = path.stat()
    return DiskImage(path, found.st_size, found.st_mtime_ns, SIZE_BYTES, (blocks,), block_map), expected


def test_disk_put_away_begins_as_it_was(tmp_path: Path) -> None:
    image, expected = put_away(tmp_path)
    with disk_layers.open_layered(image, folder=tmp_path) as disk:
        assert read(disk) == expected
        disk.writev(3, [memoryview(b"changed")])
    with disk_layers.open_layered(image, folder=tmp_path) as disk:
        assert read(disk) == expected


def test_disk_whose_base_changed_is_refused(tmp_path: Path) -> None:
    image, _ = put_away(tmp_path)
    image.base.write_bytes(bytes(SIZE_BYTES // 2))
    with pytest.raises(StateError, match="is not what it was when the guest was saved"):
        disk_layers.open_layered(image)


@pytest.mark.parametrize(
    "damage",
    [b"no runs", RUN.pack(0, 0, 1), RUN.pack(0, 65, 1), RUN.pack(0, 64, 2), RUN.pack(0, 64, 0), b"",
     RUN.pack(3, 61, 1) + RUN.pack(9, 1, 1), RUN.pack(0, 1, 1) * 65],
)  # fmt: skip
def test_disk_with_a_damaged_map_is_refused(tmp_path: Path, damage: bytes) -> None:
    image, _ = put_away(tmp_path)
    assert image.block_map is not None
    image.block_map.write_bytes(damage)
    with pytest.raises(StateError, match="saved disk map"):
        disk_layers.open_layered(image)


def test_disk_with_missing_or_short_blocks_is_refused(tmp_path: Path) -> None:
    image, _ = put_away(tmp_path)
    image.layers[0].write_bytes(b"")
    with pytest.raises(StateError, match=f"expected {SIZE_BYTES} bytes"):
        disk_layers.open_layered(image)
    image.layers[0].unlink()
    with pytest.raises(StateError, match="No such file"):
        disk_layers.open_layered(image)

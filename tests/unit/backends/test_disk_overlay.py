"""The throw-away overlay against a plain bytearray, and that its base never changes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostler.backends.disk import RawDisk, open_raw
from ostler.backends.disk_overlay import OverlayDisk, open_overlay
from ostler.errors import BadRequest, DiskBusy
from ostler.host import files

SECTOR = 512
BASE_BYTES = 21 * SECTOR  # ends in the middle of a block
SIZE_BYTES = 60 * SECTOR


def base_file(folder: Path) -> Path:
    path = folder / "base.raw"
    path.write_bytes(bytes(i % 251 for i in range(BASE_BYTES)))
    return path


@pytest.fixture(autouse=True)
def _no_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "clone", lambda _source, _target: False)


def read(disk: OverlayDisk | RawDisk, offset: int, size: int) -> bytes:
    first, second = bytearray(size // 3), bytearray(size - size // 3)
    disk.readv(offset, [memoryview(first), memoryview(second)])
    return bytes(first + second)


_RANGE = st.tuples(st.integers(0, 59), st.integers(1, 60)).map(lambda each: (each[0], min(each[1], 60 - each[0])))
_STEP = st.tuples(st.sampled_from(["write", "zero", "discard", "freeze"]), _RANGE, st.integers(1, 255))


@settings(max_examples=150, deadline=None)
@given(st.lists(_STEP, max_size=12))
def test_overlay_behaves_as_a_disk_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, tuple[int, int], int]]
) -> None:
    folder = tmp_path_factory.mktemp("overlay")
    path = base_file(folder)
    original = path.read_bytes()
    expected = bytearray(original + bytes(SIZE_BYTES - BASE_BYTES))
    with open_overlay(path, size_bytes=SIZE_BYTES) as disk:
        for kind, (sector, count), value in steps:
            start, size = sector * SECTOR, count * SECTOR
            if kind == "freeze":
                assert isinstance(disk, OverlayDisk)
                disk.freeze()
                continue
            if kind == "write":
                content = bytes([value]) * size
                disk.writev(start, [memoryview(content)[: size // 2], memoryview(content)[size // 2 :]])
                expected[start : start + size] = content
            elif kind == "zero":
                disk.write_zeroes(start, size, unmap=bool(value & 1))
                expected[start : start + size] = bytes(size)
            else:
                disk.discard(start, size)
                inner, end = -(-start // 4096) * 4096, (start + size) // 4096 * 4096
                if inner < end:
                    expected[inner:end] = bytes(end - inner)
            assert read(disk, start, size) == expected[start : start + size]
        assert read(disk, 0, SIZE_BYTES) == expected
    assert path.read_bytes() == original


def test_overlay_leaves_no_file_behind(tmp_path: Path) -> None:
    with open_overlay(base_file(tmp_path)) as disk:
        disk.writev(0, [memoryview(bytes(4096))])
        disk.flush()

        assert [each.name for each in tmp_path.iterdir()] == ["base.raw"]


def test_overlay_takes_only_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "base.raw"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with open_overlay(path) as disk:
        assert isinstance(disk, OverlayDisk)
        disk.writev((1 << 40) - 4096, [memoryview(b"x" * 4096)])

        assert disk.allocated_bytes <= 1 << 20
        assert read(disk, (1 << 40) - 4096, 4096) == b"x" * 4096


def test_overlay_bound_is_the_disks_own_full(tmp_path: Path) -> None:
    path = tmp_path / "base.raw"
    path.write_bytes(bytes(1 << 20))
    with open_overlay(path, limit_bytes=64 << 10) as disk:
        disk.writev(0, [memoryview(os.urandom(32 << 10))])
        with pytest.raises(OSError, match="bound of 65536") as caught:
            disk.writev(64 << 10, [memoryview(os.urandom(64 << 10))])

    assert caught.value.errno == errno.ENOSPC


def test_overlay_beyond_its_end_is_refused(tmp_path: Path) -> None:
    with open_overlay(base_file(tmp_path)) as disk:
        for call in (disk.readv, disk.writev):
            with pytest.raises(OSError, match="of a disk of"):
                call(BASE_BYTES - 512, [memoryview(bytearray(1024))])


def test_base_in_use_can_be_shared_but_not_written(tmp_path: Path) -> None:
    path = base_file(tmp_path)
    with open_overlay(path), open_overlay(path), pytest.raises(DiskBusy):
        open_raw(path)
    open_raw(path).close()


def test_overlay_smaller_than_its_base_is_refused_and_nothing_stays_locked(tmp_path: Path) -> None:
    path = base_file(tmp_path)

    with pytest.raises(BadRequest, match=f"at least {BASE_BYTES}"):
        open_overlay(path, size_bytes=512)

    open_raw(path).close()


def test_where_files_can_be_cloned_the_overlay_is_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clone(source: int, target: int) -> bool:
        size = os.fstat(source).st_size
        os.pwrite(target, os.pread(source, size, 0), 0)
        return True

    monkeypatch.setattr(files, "clone", clone)
    path = base_file(tmp_path)
    with open_overlay(path, size_bytes=SIZE_BYTES) as disk:
        assert not isinstance(disk, OverlayDisk)
        disk.writev(0, [memoryview(b"x" * 512)])
        assert read(disk, 0, SIZE_BYTES) == b"x" * 512 + path.read_bytes()[512:] + bytes(SIZE_BYTES - BASE_BYTES)
        with pytest.raises(DiskBusy):
            open_raw(path)

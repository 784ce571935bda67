"""`ostler disk`: nothing overwritten, nothing half-done, nobody's open disk touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ostler.backends.disk import open_raw
from ostler.errors import BadRequest, DiskBusy, ImageError
from ostler.images import qemu_img

MIB = 1 << 20


@pytest.mark.parametrize("suffix", ["raw", "qcow2"])
def test_create_resize_and_info_agree(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"disk.{suffix}"

    qemu_img.create(path, 64 * MIB)
    qemu_img.resize(path, 96 * MIB)
    found = qemu_img.info(path)

    assert (found.format, found.size_bytes, found.in_use_by) == (suffix, 96 * MIB, None)
    assert found.disk_bytes < MIB
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_create_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"mine" * 128)

    with pytest.raises(BadRequest, match="is there already"):
        qemu_img.create(path, MIB)
    with pytest.raises(BadRequest, match="there is no folder"):
        qemu_img.create(tmp_path / "no" / "disk.raw", MIB)

    assert path.read_bytes() == b"mine" * 128


def test_smaller_size_must_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    qemu_img.create(path, 2 * MIB)

    with pytest.raises(BadRequest, match="would cut it; --shrink"):
        qemu_img.resize(path, MIB)
    qemu_img.resize(path, MIB, shrink=True)

    assert path.stat().st_size == MIB


def test_open_disk_is_neither_resized_nor_converted_but_described(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    qemu_img.create(path, MIB)
    with open_raw(path):
        with pytest.raises(DiskBusy, match="in use by this process"):
            qemu_img.resize(path, 2 * MIB)
        with pytest.raises(DiskBusy, match="in use by this process"):
            qemu_img.convert(path, tmp_path / "copy.qcow2")
        assert qemu_img.info(path).in_use_by == "this process"

    assert path.stat().st_size == MIB
    assert [each.name for each in tmp_path.iterdir()] == ["disk.raw"]


def test_convert_there_and_back_keeps_the_content(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(os.urandom(MIB) + bytes(7 * MIB))
    fractions: list[float] = []

    qemu_img.convert(path, tmp_path / "copy.qcow2", compress=True, report=fractions.append)
    qemu_img.convert(tmp_path / "copy.qcow2", tmp_path / "back.raw")

    assert (tmp_path / "back.raw").read_bytes() == path.read_bytes()
    assert fractions[-1] == 1.0
    with pytest.raises(BadRequest, match="is there already"):
        qemu_img.convert(path, tmp_path / "back.raw")


def test_convert_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"QFI\xfb" + bytes(1000))

    with pytest.raises(ImageError, match=r"^qemu-img: "):
        qemu_img.convert(path, tmp_path / "copy.raw")

    assert [each.name for each in tmp_path.iterdir()] == ["disk.qcow2"]


def test_raw_disk_with_a_qcow2_header_of_its_guests_making_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"QFI\xfb" + bytes(MIB - 4))

    with pytest.raises(BadRequest, match="raw by its name and qcow2 by its content"):
        qemu_img.info(path)
    assert qemu_img.info(path, "raw").size_bytes == MIB


def test_missing_qemu_img_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ostler.images.tools.SYSTEM_PATH", "/nonexistent")
    monkeypatch.setenv("PATH", "/nonexistent")

    with pytest.raises(ImageError, match="apt-get install qemu-utils"):
        qemu_img.create(tmp_path / "disk.raw", MIB)

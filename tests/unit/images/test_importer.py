"""Disks, archives and folders from elsewhere."""

from __future__ import annotations

import io
import struct
import subprocess
import tarfile
import uuid
from pathlib import Path

import pytest

from ostler.abi import partitions
from ostler.errors import BadRequest, ImageError
from ostler.images import importer, store, tools

pytestmark = pytest.mark.usefixtures("fake_kernel")
MIB = 1 << 20


def file_system(folder: Path, size: int = 16 * MIB) -> bytes:
    """Return an ext4 file system with an init and an os-release."""
    tree = folder / "system"
    (tree / "sbin").mkdir(parents=True)
    (tree / "sbin/init").touch()
    (tree / "etc").mkdir()
    (tree / "etc/os-release").write_text("PRETTY_NAME=Cloudy\n")
    disk = folder / "system.ext4"
    tools.run(["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(disk), f"{size >> 10}k"], package="e2fsprogs")
    return disk.read_bytes()


def mbr(content: bytes) -> bytes:
    sectors = len(content) // 512
    entry = struct.pack("<B3sB3sII", 0x80, b"", 0x83, b"", 2048, sectors)
    return (bytes(446) + entry + bytes(48) + b"\x55\xaa").ljust(2048 * 512, b"\0") + content


def gpt(content: bytes) -> bytes:
    sectors = len(content) // 512
    total = 2048 + sectors + 33
    protective = struct.pack("<B3sB3sII", 0, b"", 0xEE, b"", 1, total - 1)
    header = struct.pack(
        "<8s4sIIIQQQQ16sQIII", b"EFI PART", b"\0\0\1\0", 92, 0, 0, 1, total - 1, 34, total - 34, b"", 2, 128, 128, 0
    )
    boot = struct.pack("<16s16sQQQ72s", uuid.uuid4().bytes_le, b"1" * 16, 34, 40, 0, b"")
    root = struct.pack("<16s16sQQQ72s", partitions.ROOT_X86_64.bytes_le, b"2" * 16, 2048, 2047 + sectors, 0, b"")
    front = (bytes(446) + protective + bytes(48) + b"\x55\xaa" + header).ljust(1024, b"\0") + boot + root
    return (front.ljust(2048 * 512, b"\0") + content).ljust(total * 512, b"\0")


@pytest.mark.parametrize(("table", "root"), [(mbr, "/dev/vda1"), (gpt, "/dev/vda2")])
def test_partitioned_disk_starts_its_own_init(tmp_path: Path, table: object, root: str) -> None:
    path = tmp_path / "cloud.raw"
    path.write_bytes(table(file_system(tmp_path)))  # type: ignore[operator]

    image = importer.load(path)

    assert image.name == "cloud"
    assert image.config.boot == "init"
    assert (image.config.disk.root, image.config.disk.filesystem) == (root, "ext4")
    assert image.config.os.pretty_name == "Cloudy"
    assert image.disk.read_bytes() == path.read_bytes()


def test_qcow2_becomes_raw_and_may_grow(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(file_system(tmp_path))
    tools.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(tmp_path / "disk.qcow2")], package="qemu-utils")

    image = importer.load(tmp_path / "disk.qcow2", name="grown", size_bytes=64 * MIB)

    assert image.config.disk.root == "/dev/vda"
    assert image.disk.stat().st_size == 64 * MIB
    assert image.disk.read_bytes()[: 16 * MIB] == raw.read_bytes()


def test_qcow2_over_a_file_of_the_host_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(MIB))
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", tmp_path / "evil.qcow2"],
        check=True,
    )

    with pytest.raises(BadRequest, match=r"refers to another file \(.*secret\)"):
        importer.load(tmp_path / "evil.qcow2")
    assert store.stored() == []


@pytest.mark.parametrize("table", [mbr, gpt])
def test_disk_shorter_than_its_table_is_refused(tmp_path: Path, table: object) -> None:
    path = tmp_path / "cut.raw"
    content = table(file_system(tmp_path))  # type: ignore[operator]
    path.write_bytes(content[: len(content) - MIB])

    with pytest.raises(BadRequest, match=r"expected the \d+ that its partition table says"):
        importer.load(path)


def test_disk_without_a_file_system_is_refused(tmp_path: Path) -> None:
    for name, content in (("zero.raw", bytes(MIB)), ("empty.raw", b""), ("noise.raw", bytes(range(256)) * 4096)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadRequest, match="no file system|is empty"):  # noqa: RUF043
            importer.load(tmp_path / name)


def test_tar_and_folder_make_the_same_kind_of_image(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin/busybox").write_text("program")
    with tarfile.open(tmp_path / "tree.tar.gz", "w:gz") as archive:
        archive.add(tree, ".")

    for file in (tree, tmp_path / "tree.tar.gz"):
        image = importer.load(file, size_bytes=32 * MIB)
        assert (image.name, image.config.boot, image.config.command) == ("tree", "agent", ("sh",))
        shown = tools.run(["debugfs", "-R", "cat /bin/busybox", str(image.disk)], package="e2fsprogs")
        assert shown == "program"
    assert sorted(path.name for path in tree.rglob("*")) == ["bin", "busybox"]  # a user's folder is only read


def test_what_is_no_root_tree_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("readme"), io.BytesIO())

    with pytest.raises(BadRequest, match="no root tree, expected bin/sh"):
        importer.load(tmp_path / "other.tar")
    (tmp_path / "broken.tar").write_bytes(b"x" * 1000)
    with pytest.raises(ImageError, match="not a whole tar archive"):
        importer.load(tmp_path / "broken.tar")


def test_bad_arguments_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="not there, expected a disk"):
        importer.load(tmp_path / "none")
    with pytest.raises(BadRequest, match="format 'iso': expected one of auto, raw"):
        importer.load(tmp_path, format="iso")
    with pytest.raises(BadRequest, match="is a folder, which format raw is not for"):
        importer.load(tmp_path, format="raw")

"""A tar stream becomes an ext4 disk: owners, modes and links as the archive says, whoever unpacks it."""

from __future__ import annotations

import io
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from ostler.errors import ImageError
from ostler.images import digests, rootdisk, tools, trees

SIZE = 32 << 20


def member(name: str, mode: int = 0o644, *, uid: int = 0, gid: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "",
           content: bytes = b"") -> tuple[tarfile.TarInfo, bytes]:  # fmt: skip
    info = tarfile.TarInfo(name)
    info.mode, info.uid, info.gid, info.type, info.linkname, info.size = mode, uid, gid, kind, link, len(content)
    return info, content


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    stream.seek(0)
    return stream


def debugfs(disk: Path, request: str) -> str:
    return tools.run(["debugfs", "-R", request, str(disk)], package="e2fsprogs")


def look(disk: Path, name: str) -> tuple[int, int, int]:
    """Return uid, gid and mode of a file on the disk."""
    words = debugfs(disk, f'stat "{name}"').split()
    kind = {"directory": stat.S_IFDIR, "regular": stat.S_IFREG}[words[words.index("Type:") + 1]]
    return int(words[words.index("User:") + 1]), int(words[words.index("Group:") + 1]), kind | int(
        words[words.index("Mode:") + 1], 8
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "tree"
    place.mkdir()
    return place


def test_disk_has_owners_and_modes_of_the_archive(tmp_path: Path, folder: Path) -> None:
    stream = archive(
        member("./", 0o755, kind=tarfile.DIRTYPE),
        member("./etc", 0o755, kind=tarfile.DIRTYPE),
        member("./etc/shadow", 0o640, gid=42, content=b"root:*\n"),
        member("./etc/unreadable", 0, uid=7, content=b"x"),
        member("./bin/su", 0o4755, content=b"program"),
        member("./var/with space and \"quote\"", 0o600, uid=100_000, gid=70_000),
        member("./var/locked", 0o500, uid=33, gid=33, kind=tarfile.DIRTYPE),
        member("./var/locked/inside", 0o400, uid=33, content=b"inside"),
        member("./dev/sda", 0o660, kind=tarfile.BLKTYPE),
    )  # fmt: skip
    disk = tmp_path / "disk.raw"

    rootdisk.build(trees.unpack(stream, folder), disk, size_bytes=SIZE)

    assert look(disk, "/etc/shadow") == (0, 42, 0o100640)
    assert look(disk, "/etc/unreadable") == (7, 0, 0o100000)
    assert look(disk, "/bin/su") == (0, 0, 0o104755)
    assert look(disk, '/var/with space and ""quote""') == (100_000, 70_000, 0o100600)
    assert look(disk, "/var/locked") == (33, 33, 0o40500)
    assert look(disk, "/tmp") == (0, 0, 0o41777)
    assert look(disk, "/") == (0, 0, 0o40755)
    assert debugfs(disk, "cat /var/locked/inside") == "inside"
    assert not (folder / "dev/sda").exists()
    assert disk.stat().st_size == SIZE
    assert disk.stat().st_blocks * 512 < SIZE // 2
    check = subprocess.run(
        [tools.require("e2fsck", package="e2fsprogs"), "-fn", disk], capture_output=True, check=False
    )
    assert check.returncode == 0


def test_hard_links_share_their_inode_on_the_disk(tmp_path: Path, folder: Path) -> None:
    stream = archive(
        member("one", 0o711, uid=5, content=b"same"), member("a-link", kind=tarfile.LNKTYPE, link="./one"),
        member("soft", kind=tarfile.SYMTYPE, link="/one"),
    )  # fmt: skip
    disk = tmp_path / "disk.raw"

    rootdisk.build(trees.unpack(stream, folder), disk, size_bytes=SIZE)

    assert debugfs(disk, "cat a-link") == "same"
    assert look(disk, "/a-link") == look(disk, "/one") == (5, 0, 0o100711)
    assert "one" in debugfs(disk, "stat soft")


@pytest.mark.parametrize(
    "hostile",
    [
        [member("../outside", content=b"x")],
        [member("way", kind=tarfile.SYMTYPE, link="/"), member("way/tmp/outside", content=b"x")],
        [member("steal", kind=tarfile.LNKTYPE, link="../secret")],
    ],
)
def test_archive_that_leaves_the_tree_is_refused(
    tmp_path: Path, folder: Path, hostile: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    (tmp_path / "secret").write_text("secret")

    with pytest.raises(ImageError, match=r"^archive: .*outside"):
        trees.unpack(archive(*hostile), folder)

    assert not (tmp_path / "outside").exists()


def test_archive_cut_short_or_none_at_all_is_one_line(folder: Path) -> None:
    whole = archive(member("a", content=b"x" * 5000)).getvalue()

    with pytest.raises(ImageError, match="not a whole tar archive"):
        trees.unpack(io.BytesIO(whole[:2000]), folder)
    with pytest.raises(ImageError, match="not a whole tar archive"):
        trees.unpack(io.BytesIO(b"no archive" * 100), folder)


def test_tree_larger_than_the_disk_is_refused_before_it_is_written(tmp_path: Path, folder: Path) -> None:
    (folder / "big").write_bytes(b"x" * (20 << 20))

    with pytest.raises(ImageError, match=r"size of 16 MiB, expected at least 37 MiB"):
        rootdisk.build(trees.Tree(folder), tmp_path / "disk.raw", size_bytes=16 << 20)


def test_inside_follows_links_as_the_guest_would(folder: Path) -> None:
    (folder / "usr/bin").mkdir(parents=True)
    (folder / "usr/bin/sh").touch()
    (folder / "bin").symlink_to("/usr/bin")
    (folder / "out").symlink_to("../../../../usr")
    (folder / "loop").symlink_to("loop")
    tree = trees.Tree(folder)

    assert tree.inside("bin/sh") == folder / "usr/bin/sh"
    assert tree.inside("out/bin") == folder / "usr/bin"
    assert tree.inside("loop") is None
    assert not tree.has("bin/nothing")


def test_sparse_digest_depends_on_content_not_on_holes(tmp_path: Path) -> None:
    sparse, full, other = tmp_path / "a.raw", tmp_path / "b.raw", tmp_path / "c.raw"
    content = bytearray(1 << 20)
    content[300_000:300_010] = b"0123456789"
    full.write_bytes(content)
    with sparse.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(300_000)
        file.write(b"0123456789")
    content[0] = 1
    other.write_bytes(content)

    assert digests.digest(sparse) == digests.digest(full)
    assert digests.digest(full) != digests.digest(other)

"""A tree becomes an ext4 disk: mke2fs copies it in, debugfs sets what only root could have set on the host.

Neither needs a mount, a loop device or a privilege, so a plain user's image is the same as root's. The result is a raw
sparse file without a partition table; its size is a limit, not a cost.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ostler.errors import ImageError
from ostler.images import tools
from ostler.images.progress import Progress, silent
from ostler.images.trees import Attributes, Tree

DEFAULT_SIZE_BYTES = 8 << 30
MIN_SIZE_BYTES = 16 << 20
# The first process mounts something on each of them.
_MOUNT_POINTS = {"dev": 0o755, "proc": 0o555, "sys": 0o555, "run": 0o755, "tmp": 0o1777}


def build(tree: Tree, disk: Path, *, size_bytes: int = DEFAULT_SIZE_BYTES, progress: Progress = silent) -> None:
    """Write the new file `disk`, an ext4 file system that holds `tree`.

    Raises:
        ImageError: the tree does not fit, the host's disk is full, a tool is missing.
    """
    # Inode tables and journal are zeroes already: they stay holes, and the guest need not clear them later.
    options = "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=1,discard"
    _check_room(tree, size_bytes)
    progress("writing the root disk")
    try:
        with disk.open("xb") as file:
            file.truncate(size_bytes)
        command = ["mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-m", "1", "-E", options, "-d"]
        tools.run([*command, str(tree.path), str(disk)], package="e2fsprogs")
        progress("setting owners and modes")
        _debugfs(disk, list(_corrections(tree)))
    except OSError as error:
        raise ImageError(f"disk {disk}: {error.strerror or error}") from error


def _check_room(tree: Tree, size_bytes: int) -> None:
    """mke2fs of a tree too large says so late and in words of its own."""
    sizes = {(status.st_dev, status.st_ino): status.st_blocks * 512 for status in _statuses(tree)}
    needed = sum(sizes.values()) * 105 // 100 + MIN_SIZE_BYTES
    if size_bytes < needed:
        raise ImageError(f"root disk: size of {size_bytes >> 20} MiB, expected at least {-(-needed >> 20)} MiB")


def _statuses(tree: Tree) -> Iterator[os.stat_result]:
    for path in tree.path.rglob("*"):
        yield path.lstat()


def _corrections(tree: Tree) -> Iterator[str]:
    """Yield debugfs commands that make the disk's inodes what the tree's table says."""
    for name, mode in _MOUNT_POINTS.items():
        if not (tree.path / name).is_symlink() and not (tree.path / name).exists():
            yield f"mkdir /{name}"
            yield f"set_inode_field /{name} mode 0{stat.S_IFDIR | mode:o}"
    seen: set[tuple[int, int]] = set()
    for path in [tree.path, *tree.path.rglob("*")]:
        status = path.lstat()
        if status.st_nlink > 1 and not path.is_dir():
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
        name = str(path.relative_to(tree.path))
        yield from _changes(name, status, _wanted(tree, name, status))


def _wanted(tree: Tree, name: str, status: os.stat_result) -> Attributes:
    if known := tree.attributes.get(name):
        return known
    own_uid, own_gid = tree.owner
    uid = 0 if status.st_uid == own_uid else status.st_uid
    gid = 0 if status.st_gid == own_gid else status.st_gid
    return Attributes(uid, gid, status.st_mode)


def _changes(name: str, status: os.stat_result, wanted: Attributes) -> Iterator[str]:
    # The root folder's owner was mke2fs's matter already.
    has_uid, has_gid = (0, 0) if name == "." else (status.st_uid, status.st_gid)
    quoted = _quoted(name)
    if wanted.uid != has_uid:
        yield f"set_inode_field {quoted} uid {wanted.uid}"
    if wanted.gid != has_gid:
        yield f"set_inode_field {quoted} gid {wanted.gid}"
    if wanted.mode != status.st_mode and not stat.S_ISLNK(status.st_mode):
        yield f"set_inode_field {quoted} mode 0{wanted.mode:o}"


def _quoted(name: str) -> str:
    if "\n" in name or "\r" in name:
        raise ImageError(f"root disk: file name {name!r} has a line break, which debugfs cannot take")
    path = "/" if name == "." else f"/{name}"
    return '"' + path.replace('"', '""') + '"'


def _debugfs(disk: Path, commands: list[str]) -> None:
    if not commands:
        return
    script = "\n".join(commands).encode(errors="surrogateescape") + b"\n"
    program = tools.require("debugfs", package="e2fsprogs")
    complaints = tools.complaints([program, "-w", "-f", "/dev/stdin", disk], stdin=script)
    # debugfs ends with 0 whatever happened; its first line is its version.
    wrong = [line for line in complaints.splitlines() if line.strip() and not line.startswith("debugfs ")]
    if wrong:
        raise ImageError(f"debugfs: {wrong[0]}")

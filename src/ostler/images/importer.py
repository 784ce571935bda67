"""`ostler image import`: a disk, an archive or a folder from elsewhere becomes an image.

A disk is copied as it is (qcow2 into a raw one). If it has partitions it was made for a machine of its own, so the
guest starts the init on it; a disk that is one file system, too, if there is an init. Archives and folders become a
root disk of Ostler's making, and the agent stays the first process there. Any of them boots one of Ostler's kernels.

What is imported may come from anybody: a qcow2 file that refers to other files of the host is refused, archives cannot
leave their tree.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ostler.abi import partitions
from ostler.errors import BadRequest, ImageError
from ostler.host import files
from ostler.host.disk_format import is_qcow2
from ostler.host.locks import claim_disk
from ostler.images import kernels, making, qemu_img, rootdisk, store, tools, trees
from ostler.images.kernels import DEFAULT_KERNEL
from ostler.images.progress import Progress, silent
from ostler.images.schema import DISK_FILE, DiskInfo, OsRelease
from ostler.images.trees import Tree, parse_os_release

FORMATS = ("auto", "raw", "qcow2", "tar", "tree")
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
Boot = Literal["agent", "init"]


def load(
    file: Path,
    *,
    name: str | None = None,
    format: str = "auto",  # noqa: A002 - the option's name
    boot: Boot | None = None,
    kernel: str = DEFAULT_KERNEL,
    size_bytes: int | None = None,
    progress: Progress = silent,
) -> store.Image:
    """Import `file` and give the image the name `name` (default: the file's own, without what follows a dot).

    `boot` says who is the guest's first process, where the guess of the file's head is wrong. `size_bytes` may enlarge
    a disk, never shrink it.

    Raises:
        BadRequest: no such file, an unknown or wrong format, a disk shorter than its partition table says.
        ImageError: a tool is missing, the host's disk is full, an archive is broken.
    """
    kind = _kind(file, format)
    names = (name or file.absolute().name.split(".")[0],)
    progress(f"importing {file}")
    if kind in ("raw", "qcow2"):
        return _disk(file, kind, names, boot=boot, kernel=kernel, size_bytes=size_bytes, progress=progress)
    size = size_bytes or rootdisk.DEFAULT_SIZE_BYTES
    if kind == "tree":
        return _tree(Tree(file), file, names, boot=boot, kernel=kernel, size_bytes=size, progress=progress)
    with making.workspace() as scratch:
        folder = scratch / "tree"
        folder.mkdir(mode=0o755)
        with file.open("rb") as stream:
            tree = trees.unpack(stream, folder)
        return _tree(tree, file, names, boot=boot, kernel=kernel, size_bytes=size, progress=progress)


def _kind(file: Path, given: str) -> str:
    if given not in FORMATS:
        raise BadRequest(f"format {given!r}: expected one of {', '.join(FORMATS)}")
    if not file.exists():
        raise BadRequest(f"{file}: not there, expected a disk, a tar archive or a folder")
    if file.is_dir() != (given == "tree") and (given != "auto"):
        raise BadRequest(f"{file}: is {'a' if file.is_dir() else 'no'} folder, which format {given} is not for")
    if not os.access(file, os.R_OK):
        raise BadRequest(f"{file}: cannot be read by this user")
    if given != "auto":
        return given
    if file.is_dir():
        return "tree"
    # Guessing is safe here, unlike for a guest's own disk: nothing is read but this file (see qemu_img.standalone).
    if is_qcow2(file):
        return "qcow2"
    return "tar" if file.name.lower().endswith(_ARCHIVES) else "raw"


def _tree(
    tree: Tree,
    file: Path,
    names: tuple[str, ...],
    *,
    boot: Boot | None,
    kernel: str,
    size_bytes: int,
    progress: Progress,
) -> store.Image:
    if not tree.has("bin/sh", "usr/bin/sh", "sbin/init", "bin/busybox"):
        raise BadRequest(f"{file}: no root tree, expected bin/sh, sbin/init or bin/busybox in it")
    shell = ("bash",) if tree.has("bin/bash", "usr/bin/bash") else ("sh",)
    defaults = making.Defaults(
        reference=file.name,
        source="tree",
        boot=boot or "agent",
        command=shell,
        env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    return making.add_tree(tree, defaults, names=names, kernel=kernel, size_bytes=size_bytes, progress=progress)


def _disk(
    file: Path,
    kind: str,
    names: tuple[str, ...],
    *,
    boot: Boot | None,
    kernel: str,
    size_bytes: int | None,
    progress: Progress,
) -> store.Image:
    fetched = kernels.fetch(kernel, progress)
    modules = kernels.module_tree(fetched, progress)
    with making.workspace() as folder:
        disk = folder / DISK_FILE
        _copy(file, kind, disk, progress)
        _enlarge(file, disk, size_bytes)
        info, own_boot, system = _look(file, disk)
        first = boot or own_boot
        config = making.config_of(
            # An init of its own needs nobody to tell it what to run.
            making.Defaults(reference=file.name, source="disk", boot=first, command=() if first == "init" else ("sh",)),
            fetched, info, os=system,
        )  # fmt: skip
        return making.admit(folder, config, fetched, modules, names=names, progress=progress)


def _copy(file: Path, kind: str, disk: Path, progress: Progress) -> None:
    step = f"copying {file.name}"
    if kind == "qcow2":
        qemu_img.standalone(file)
        qemu_img.convert(
            file, disk, source_format="qcow2", target_format="raw", report=lambda done: progress(step, done)
        )
        return
    claim_disk(file, write=False)
    with file.open("rb") as source, disk.open("xb") as target:
        files.copy_sparse(source.fileno(), target.fileno(), lambda done: progress(step, done))


def _enlarge(file: Path, disk: Path, size_bytes: int | None) -> None:
    have = disk.stat().st_size
    if have == 0:
        raise BadRequest(f"disk {file}: is empty")
    if size_bytes is not None and size_bytes < have:
        raise BadRequest(f"disk {file}: has {have} bytes, expected a size of at least that")
    # Image files now and then end in the middle of a sector.
    os.truncate(disk, -(-(size_bytes or have) // 512) * 512)


def _look(file: Path, disk: Path) -> tuple[DiskInfo, Boot, OsRelease]:
    """Find the root file system of a disk, whether it has an init, and what system it is."""
    size_bytes = disk.stat().st_size
    with disk.open("rb") as opened:

        def read(offset: int, size: int) -> bytes:
            return os.pread(opened.fileno(), size, offset) if 0 <= offset < size_bytes else b""

        table = partitions.read_table(read)
        if table is None:
            kind, root, start = partitions.file_system(read, 0), "/dev/vda", 0
        else:
            if table.needed_bytes > size_bytes:
                raise BadRequest(
                    f"disk {file}: {size_bytes} bytes, expected the {table.needed_bytes} that its partition table says"
                )
            found = partitions.find_root(table, read)
            kind, root, start = (
                (found[1], f"/dev/vda{found[0].number}", found[0].start_bytes) if found else (None, "", 0)
            )
    if kind is None:
        raise BadRequest(f"disk {file}: no file system on it that Linux could have its root on")
    system = parse_os_release(_peek(disk, start, "/etc/os-release") or _peek(disk, start, "/usr/lib/os-release"))
    has_init = table is not None or any(_there(disk, start, path) for path in ("/sbin/init", "/usr/sbin/init"))
    return DiskInfo(size_bytes=size_bytes, root=root, filesystem=kind), "init" if has_init else "agent", system


def _peek(disk: Path, start: int, name: str) -> str:
    """Return a file of an ext file system; empty for other file systems and where there is none."""
    try:
        return tools.run(["debugfs", "-R", f"cat {name}", f"{disk}?offset={start}"], package="e2fsprogs")[: 64 << 10]
    except ImageError:
        return ""


def _there(disk: Path, start: int, name: str) -> bool:
    try:
        return "Inode:" in tools.run(["debugfs", "-R", f"stat {name}", f"{disk}?offset={start}"], package="e2fsprogs")
    except ImageError:
        return False

"""How an image comes into the store: made in a workspace, completed, named by its content, renamed into place.

Whatever ends a build before that, nothing of it stays: a workspace is removed when its block is left, and one whose
process was killed by whoever makes or prunes next. A lock on the folder itself says whether anybody still works in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ostler.errors import ImageError
from ostler.images import cache, digests, kernels, rootdisk, store
from ostler.images.kernels import DEFAULT_KERNEL
from ostler.images.progress import Progress, silent
from ostler.images.schema import DISK_FILE, KERNEL_FILE, MODULES_FOLDER, DiskInfo, ImageConfig, KernelInfo
from ostler.images.store import CONFIG_FILE, FILES_FILE, LOOKED_AT, Image
from ostler.images.trees import Tree


@dataclass(frozen=True, slots=True)
class Defaults:
    """What an image's maker knows of it beside its tree; see ImageConfig for each."""

    reference: str
    source: Literal["debian", "oci", "disk", "tree"]
    boot: Literal["agent", "init"] = "agent"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = ""
    ports: tuple[str, ...] = ()
    build: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Give an empty folder on the store's file system and remove it at the end, whatever the end.

    Folders of processes that were killed are removed here too.

    Raises:
        ImageError: the store cannot be written, or OSError of the disk while the caller worked (disk full).
    """
    place = store.root() / "tmp"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with cache.locked("images-tmp"):
            store.sweep(place)
            folder = Path(tempfile.mkdtemp(dir=place))
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            folder.chmod(0o755)
            yield folder
        finally:
            store.remove_folder(folder)
            os.close(lock)
    except OSError as error:
        raise ImageError(f"images {store.root()}: {error.strerror or error}") from error


def add_tree(
    tree: Tree,
    defaults: Defaults,
    *,
    names: Sequence[str],
    kernel: str = DEFAULT_KERNEL,
    size_bytes: int = rootdisk.DEFAULT_SIZE_BYTES,
    progress: Progress = silent,
) -> Image:
    """Make an image of a root tree; its modules go into it too where something there loads modules.

    The tree may be added to. Must be called within `workspace`.
    """
    fetched = kernels.fetch(kernel, progress)
    modules = kernels.module_tree(fetched, progress)
    with workspace() as folder:
        if tree.path.is_relative_to(store.root()) and tree.has("sbin/modprobe", "usr/sbin/modprobe"):
            _add_modules(tree, modules, fetched.release)
        rootdisk.build(tree, folder / DISK_FILE, size_bytes=size_bytes, progress=progress)
        config = config_of(defaults, fetched, DiskInfo(size_bytes=size_bytes), os=tree.os_release())
        return admit(folder, config, fetched, modules, names=names, progress=progress)


def admit(
    folder: Path,
    config: ImageConfig,
    kernel: kernels.Kernel,
    modules: Path,
    *,
    names: Sequence[str],
    progress: Progress = silent,
) -> Image:
    """Complete the image in `folder`, which holds its disk, give it its place and its names."""
    progress("naming the image by its content")
    _link(kernel.image, folder / KERNEL_FILE)
    shutil.copytree(modules / "lib", folder / MODULES_FOLDER / "lib", copy_function=_link)
    files = {name: digests.digest(folder / name) for name in (KERNEL_FILE, DISK_FILE, MODULES_FOLDER)}
    digest = config.digest(files)
    (folder / FILES_FILE).write_text(json.dumps(files, indent=2) + "\n")
    (folder / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n")
    (folder / DISK_FILE).chmod(0o444)
    _sync(folder / DISK_FILE)
    place = store.place_of(digest)
    with cache.locked(f"image-{digest[:16]}"):
        if place.exists():
            shutil.rmtree(place)  # the same content, or a damaged copy of it
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(place)
        cache.check(place, {file: files[file] for file in LOOKED_AT}, lambda path: files[path.name])
    for name in names:
        store.tag(name, digest)
    return Image(names[0] if names else digest, digest, place, config)


def config_of(defaults: Defaults, kernel: kernels.Kernel, disk: DiskInfo, **more: Any) -> ImageConfig:
    """Return an image's whole configuration. Raises ImageError where what its maker says does not validate."""
    given = {name: getattr(defaults, name) for name in Defaults.__slots__}
    given |= {name: dict(given[name]) for name in ("env", "build", "origin")}
    info = KernelInfo(name=kernel.name, release=kernel.release, package_version=kernel.package_version)
    try:
        return ImageConfig(**given, kernel=info, disk=disk, created=datetime.now(UTC), **more)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(str(part) for part in first["loc"])
        raise ImageError(
            f"image {defaults.reference}: {field_name} {str(first['input'])[:80]!r}: {first['msg']}"
        ) from error


def _add_modules(tree: Tree, modules: Path, release: str) -> None:
    library = tree.inside("lib")
    if library is not None and library.is_dir():
        shutil.copytree(modules / "lib" / "modules" / release, library / "modules" / release, dirs_exist_ok=True)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""The store of guest images: whole folders named by the digest of their content, and names that point at them.

    images/sha256/<digest>/   image.json, vmlinuz, modules/lib/modules/<release>/, disk.raw
    images/names/<name>.json  the digest, and when it got the name
    images/tmp/               workspaces of builds under way; a lock says whether anybody still works in one

An image is built in a workspace and renamed into place, so it is whole or not there. Its digest is that of its
configuration and files; both are looked at before each use. A damaged image is never run: one whose recipe is known is
built again, any other is refused. Files are read-only: guests write to overlays.
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
from urllib.parse import quote, unquote

from pydantic import ValidationError

from ostler.errors import DiskBusy, ImageError, NoSuchImage
from ostler.host.locks import claim_disk
from ostler.images import cache, digests, kernels, rootdisk
from ostler.images.kernels import DEFAULT_KERNEL
from ostler.images.progress import Progress, silent
from ostler.images.schema import DISK_FILE, KERNEL_FILE, MODULES_FOLDER, DiskInfo, ImageConfig, KernelInfo
from ostler.images.trees import Tree

CONFIG_FILE = "image.json"
FILES_FILE = "files.json"
# The module tree is read only when an initrd is made of it; looking at its thousand files before every start is not
# worth what it costs.
_LOOKED_AT = (KERNEL_FILE, DISK_FILE)


@dataclass(frozen=True, slots=True)
class Image:
    """An image that was found whole."""

    name: str
    """By which it was asked for; a digest if it has no name."""
    digest: str
    path: Path
    config: ImageConfig

    @property
    def kernel(self) -> Path:
        """The bzImage."""
        return self.path / KERNEL_FILE

    @property
    def modules(self) -> Path:
        """The folder that holds `modules.dep` of the kernel."""
        return self.path / MODULES_FOLDER / "lib" / "modules" / self.config.kernel.release

    @property
    def disk(self) -> Path:
        """The raw root disk; never written to."""
        return self.path / DISK_FILE

    @property
    def disk_bytes(self) -> int:
        """What the root disk takes on the host."""
        return self.disk.stat().st_blocks * 512


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


def root() -> Path:
    """Return the store's folder."""
    return cache.root() / "images"


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Give an empty folder on the store's file system and remove it at the end, whatever the end.

    Folders of processes that were killed are removed here too.

    Raises:
        ImageError: the store cannot be written, or OSError of the disk while the caller worked (disk full).
    """
    place = root() / "tmp"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with cache.locked("images-tmp"):
            _sweep(place)
            folder = Path(tempfile.mkdtemp(dir=place))
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            folder.chmod(0o755)
            yield folder
        finally:
            _remove(folder)
            os.close(lock)
    except OSError as error:
        raise ImageError(f"images {root()}: {error.strerror or error}") from error


def find(name: str) -> Image | None:
    """Return the image of this name, digest or unique beginning of a digest (12 digits or more); None if there is none.

    Raises:
        ImageError: it is there, but damaged.
    """
    digest = _digest_of(name)
    if digest is None:
        return None
    path = _place(digest)
    if not path.is_dir():
        return None
    config, files = _read(path, digest, name)
    looked_at = {file: files[file] for file in _LOOKED_AT if file in files}
    if wrong := cache.check(path, looked_at, digests.digest):
        raise ImageError(f"image {name}: damaged, {wrong} is not what it was when the image was made")
    return Image(name, digest, path, config)


def get(name: str) -> Image:
    """Return an image as `find` does. Raises NoSuchImage where there is none."""
    image = find(name)
    if image is None:
        raise NoSuchImage(f"image {name!r}: not there; `ostler image ls` shows which are")
    return image


def ensure(name: str, progress: Progress = silent, *, insecure: bool = False) -> Image:
    """Return the image `name`, built or pulled first where it is missing or damaged; see images.ensure."""
    from ostler.images import ensure as makers  # they import this file

    return makers.ensure(name, progress, insecure=insecure)


def recipe_of(name: str) -> ImageConfig | None:
    """Return the configuration of an image that may be damaged elsewhere; None where that cannot be read."""
    digest = _digest_of(name)
    try:
        return _read(_place(digest), digest, name)[0] if digest else None
    except ImageError:
        return None


def names() -> dict[str, str]:
    """Return all names and the digests they stand for, damaged entries left out."""
    found = {}
    for file in sorted((root() / "names").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found[unquote(file.name.removesuffix(".json"))] = str(json.loads(file.read_text())["digest"])
    return found


def stored() -> list[str]:
    """Return the digests of all images, damaged ones too."""
    with contextlib.suppress(OSError):
        return sorted(path.name for path in (root() / "sha256").iterdir() if path.is_dir())
    return []


def verify(image: Image) -> None:
    """Hash every file of an image. Raises ImageError naming the first that is damaged."""
    _config, files = _read(image.path, image.digest, image.name)
    for file, expected in files.items():
        if not (image.path / file).exists() or digests.digest(image.path / file) != expected:
            cache.drop_stamp(image.path)
            raise ImageError(f"image {image.name}: damaged, {file} is not what it was when the image was made")


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
        if tree.path.is_relative_to(root()) and tree.has("sbin/modprobe", "usr/sbin/modprobe"):
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
    place = _place(digest)
    with cache.locked(f"image-{digest[:16]}"):
        if place.exists():
            shutil.rmtree(place)  # the same content, or a damaged copy of it
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(place)
        cache.check(place, {file: files[file] for file in _LOOKED_AT}, lambda path: files[path.name])
    for name in names:
        tag(name, digest)
    return Image(names[0] if names else digest, digest, place, config)


def tag(name: str, digest: str) -> None:
    """Let `name` stand for the image `digest` from now on."""
    record = {"digest": digest, "since": datetime.now(UTC).isoformat(timespec="seconds")}
    cache.write_atomically(_name_file(name), json.dumps(record) + "\n")


def remove(name: str) -> list[str]:
    """Take a name away, and the image with the last of its names; return what was removed: names, digests.

    Given a digest, all its names go too. Damaged images can be removed.

    Raises:
        NoSuchImage: there is no such image.
        ImageError: a guest uses it.
    """
    digest = _digest_of(name)
    if digest is None:
        raise NoSuchImage(f"image {name!r}: not there; `ostler image ls` shows which are")
    having = [each for each, its in names().items() if its == digest]
    going = [name] if name in having else having
    removed = list(going)
    if set(going) == set(having):
        discard(digest, name)
        removed.append(digest)
    for each in going:
        _name_file(each).unlink(missing_ok=True)
    return removed


def discard(digest: str, name: str) -> int:
    """Remove an image's folder; return how many bytes the host gets back (files shared with others not counted).

    Raises:
        ImageError: a guest uses it, or it cannot be removed.
    """
    place = _place(digest)
    with cache.locked(f"image-{digest[:16]}"):
        freed = _size(place)
        try:
            if (place / DISK_FILE).exists():
                claim_disk(place / DISK_FILE, write=True)
            # Renamed first: nobody may find half an image.
            (root() / "tmp").mkdir(exist_ok=True)
            doomed = Path(tempfile.mkdtemp(dir=root() / "tmp"))
            place.rename(doomed / digest)
            _remove(doomed)
        except DiskBusy as error:
            raise ImageError(f"image {name}: a guest uses it: {str(error).partition(': ')[2]}") from error
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ImageError(f"image {name}: cannot be removed ({error.strerror})") from error
        cache.drop_stamp(place)
    return freed


def prune() -> tuple[list[str], int]:
    """Remove images that have no name and that nobody uses; return their digests and the bytes given back."""
    kept = set(names().values())
    removed, freed = [], 0
    for digest in stored():
        if digest not in kept:
            with contextlib.suppress(ImageError):
                freed += discard(digest, digest[:12])
                removed.append(digest)
    with workspace():
        pass  # which sweeps away what killed builds left
    return removed, freed


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


def _read(path: Path, digest: str, name: str) -> tuple[ImageConfig, dict[str, str]]:
    try:
        config = ImageConfig.model_validate_json((path / CONFIG_FILE).read_text())
        files = {str(file): str(value) for file, value in json.loads((path / FILES_FILE).read_text()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ImageError(f"image {name}: damaged, {CONFIG_FILE} or {FILES_FILE} cannot be read") from error
    if config.digest(files) != digest:
        raise ImageError(f"image {name}: damaged, {CONFIG_FILE} or {FILES_FILE} is not what its digest says")
    return config, files


def _digest_of(name: str) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(_name_file(name).read_text())["digest"])
    wanted = name.removeprefix("sha256:")
    matching = [digest for digest in stored() if digest.startswith(wanted)] if len(wanted) >= 12 else []
    return matching[0] if len(matching) == 1 else None


def _name_file(name: str) -> Path:
    return root() / "names" / f"{quote(name, safe='')}.json"


def _place(digest: str) -> Path:
    return root() / "sha256" / digest


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


def _size(place: Path) -> int:
    # Blocks of files that another entry of the cache links to stay.
    statuses = [path.lstat() for path in place.rglob("*")]
    return sum(status.st_blocks * 512 for status in statuses if status.st_nlink == 1)


def _sweep(place: Path) -> None:
    for folder in place.iterdir():
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)
            finally:
                os.close(fd)


def _remove(folder: Path) -> None:
    """Remove a folder, also one with folders in it that their owner may not write to."""
    if not folder.exists():
        return
    for path in [folder, *(each for each in folder.rglob("*") if each.is_dir() and not each.is_symlink())]:
        with contextlib.suppress(OSError):
            path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)

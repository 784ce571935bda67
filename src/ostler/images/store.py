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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, unquote

from ostler.errors import DiskBusy, ImageError, NoSuchImage
from ostler.host.locks import claim_disk
from ostler.images import cache, digests
from ostler.images.progress import Progress, silent
from ostler.images.schema import DISK_FILE, KERNEL_FILE, MODULES_FOLDER, ImageConfig

CONFIG_FILE = "image.json"
FILES_FILE = "files.json"
# The module tree is read only when an initrd is made of it; looking at its thousand files before every start is not
# worth what it costs.
LOOKED_AT = (KERNEL_FILE, DISK_FILE)


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


def root() -> Path:
    """Return the store's folder."""
    return cache.root() / "images"


def find(name: str) -> Image | None:
    """Return the image of this name, digest or unique beginning of a digest (12 digits or more); None if there is none.

    Raises:
        ImageError: it is there, but damaged.
    """
    digest = _digest_of(name)
    if digest is None:
        return None
    path = place_of(digest)
    if not path.is_dir():
        return None
    config, files = _read(path, digest, name)
    looked_at = {file: files[file] for file in LOOKED_AT if file in files}
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
        return _read(place_of(digest), digest, name)[0] if digest else None
    except ImageError:
        return None


def files_of(name: str) -> list[Path]:
    """What `find` looks at for an image that is there: where these are what they were, it finds the same."""
    digest = _digest_of(name)
    return [] if digest is None else [_name_file(name), *sorted(place_of(digest).iterdir())]


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
    place = place_of(digest)
    with cache.locked(f"image-{digest[:16]}"):
        freed = _size(place)
        try:
            if (place / DISK_FILE).exists():
                claim_disk(place / DISK_FILE, write=True)
            # Renamed first: nobody may find half an image.
            (root() / "tmp").mkdir(exist_ok=True)
            doomed = Path(tempfile.mkdtemp(dir=root() / "tmp"))
            place.rename(doomed / digest)
            remove_folder(doomed)
        except DiskBusy as error:
            holder = str(error).partition("in use by ")[2].partition("; expected")[0]
            raise ImageError(f"image {name}: a guest uses it, {holder}") from error
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
    if (root() / "tmp").is_dir():
        with cache.locked("images-tmp"):
            sweep(root() / "tmp")
    return removed, freed


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


def place_of(digest: str) -> Path:
    return root() / "sha256" / digest


def _size(place: Path) -> int:
    # Blocks of files that another entry of the cache links to stay.
    statuses = [path.lstat() for path in place.rglob("*")]
    return sum(status.st_blocks * 512 for status in statuses if status.st_nlink == 1)


def sweep(place: Path) -> None:
    """Remove the workspaces in `place` that nobody works in any more. Call it with the lock `images-tmp` held."""
    for folder in place.iterdir():
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_folder(folder)
            finally:
                os.close(fd)


def remove_folder(folder: Path) -> None:
    """Remove a folder, also one with folders in it that their owner may not write to."""
    if not folder.exists():
        return
    for path in [folder, *(each for each in folder.rglob("*") if each.is_dir() and not each.is_symlink())]:
        with contextlib.suppress(OSError):
            path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)

"""`--persist NAME`: a guest's root disk that outlives it.

    <user's data folder>/guests/<name>/   image.json, files.json, vmlinuz, modules/, disk.raw, origin.json

It begins as a copy of an image with everything that boots it, so it goes on when the image is rebuilt or removed. The
disk is a plain raw file: what the guest flushed is in it by fdatasync, there is no map or log of Ostler's that a kill
could leave half-written. That is why it is a copy and not an overlay; the copy is a clone where the file system can,
else only the image's data is copied, once. Not in the cache folder: these are data nobody can make again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, unquote

import platformdirs

from ostler.errors import BadRequest, ImageError
from ostler.host import files
from ostler.host.locks import claim_disk
from ostler.images import cache, store
from ostler.images.progress import Progress, silent
from ostler.images.schema import DISK_FILE, ImageConfig
from ostler.images.store import CONFIG_FILE, Image

ORIGIN_FILE = "origin.json"


def root() -> Path:
    """Return the folder of all: `OSTLER_DATA`, else the user's data directory."""
    chosen = os.environ.get("OSTLER_DATA")
    return (Path(chosen) if chosen else platformdirs.user_data_path("ostler")) / "guests"


def obtain(name: str, image_name: str, ensure: Callable[[], Image], progress: Progress = silent) -> Image:
    """Return the persistent copy `name`, made at its first use from the image that `ensure` then gives.

    Its disk is writable, and not locked yet.

    Raises:
        BadRequest: it was made from another image than `image_name`.
        ImageError: it cannot be written, or is damaged; also whatever `ensure` raises.
    """
    found = find(name)
    if found is None:
        image = ensure()
        with cache.locked(f"persist-{quote(name, safe='')}", progress):
            found = find(name) or _make(name, image, progress)
    _check_origin(found, image_name)
    return found


def _check_origin(found: Image, image_name: str) -> None:
    made_from = _origin(found.path).get("image", "")
    if made_from == image_name:
        return
    # Another name of the same image, or of a later build of it, will do.
    recipe = store.recipe_of(image_name)
    if recipe is None or recipe.reference != found.config.reference:
        raise BadRequest(
            f"persistent disk {found.name!r}: was made from the image {made_from}, expected one of {image_name}; "
            f"`ostler disk rm {found.name}` removes it"
        )


def find(name: str) -> Image | None:
    """Return the persistent copy `name` as an image of its own; None if there is none. Raises ImageError if damaged."""
    path = _place(name)
    if not path.is_dir():
        return None
    try:
        config = ImageConfig.model_validate_json((path / CONFIG_FILE).read_text())
        digest = str(_origin(path)["digest"])
        size_bytes = (path / DISK_FILE).stat().st_size
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(f"persistent disk {name!r}: damaged, {path} lacks what boots it") from error
    disk = config.disk.model_copy(update={"size_bytes": size_bytes})
    return Image(name, digest, path, config.model_copy(update={"disk": disk}))


def names() -> Iterator[str]:
    """Yield the names of all persistent disks."""
    with contextlib.suppress(OSError):
        for path in sorted(root().iterdir()):
            if not path.name.startswith("."):
                yield unquote(path.name)


def origin(name: str) -> dict[str, str]:
    """Return what `name` was made from: image, digest, since."""
    return _origin(_place(name))


def remove(name: str) -> None:
    """Remove a persistent disk for good.

    Raises:
        BadRequest: there is none of that name.
        DiskBusy: a guest uses it.
    """
    path = _place(name)
    if not path.is_dir():
        raise BadRequest(f"persistent disk {name!r}: not there; `ostler disk ls` shows which are")
    if (path / DISK_FILE).exists():
        claim_disk(path / DISK_FILE, write=True)
    try:
        doomed = Path(tempfile.mkdtemp(prefix=".rm-", dir=root()))
        path.rename(doomed / path.name)
        shutil.rmtree(doomed)
    except OSError as error:
        raise ImageError(f"persistent disk {name!r}: cannot be removed ({error.strerror})") from error


def _make(name: str, image: Image, progress: Progress) -> Image:
    progress(f"making the persistent disk {name}")
    place = _place(name)
    try:
        root().mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=root()))
        try:
            for entry in image.path.iterdir():
                if entry.name != DISK_FILE:
                    _copy(entry, part / entry.name)
            record = {
                "image": image.name,
                "digest": image.digest,
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            (part / ORIGIN_FILE).write_text(json.dumps(record, indent=2) + "\n")
            with image.disk.open("rb") as source, (part / DISK_FILE).open("xb") as target:
                files.copy_sparse(source.fileno(), target.fileno(), lambda done: progress(f"copying to {name}", done))
                os.fsync(target.fileno())
            part.rename(place)
            _sync_folder(root())
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise ImageError(f"persistent disk {name!r} in {root()}: {error.strerror or error}") from error
    made = find(name)
    if made is None:
        raise ImageError(f"persistent disk {name!r}: gone as soon as it was made")
    return made


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _origin(path: Path) -> dict[str, str]:
    try:
        found = json.loads((path / ORIGIN_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _place(name: str) -> Path:
    if not name or len(name) > 100 or name.startswith("."):
        raise BadRequest(f"persistent disk {name!r}: expected a name of up to 100 characters without a dot in front")
    return root() / quote(name, safe="")

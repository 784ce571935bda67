"""Root disks that outlive their guests, by name: `--persist NAME`.

The first run copies the image's disk, as a clone where the file system can, sparse elsewhere; later runs use the copy
and boot the very image it was made of, whose kernel its modules belong to. Copies lie in the user's data folder
(`OSTLER_DATA` names another), not in the cache, which may be removed at any time. `rm` removes one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from ostler.errors import BadRequest, HostError
from ostler.images.progress import Progress, silent

if TYPE_CHECKING:
    from ostler.images.store import Image

DISK, RECORD = "disk.raw", "made-of.json"


def folder() -> Path:
    """Where the disks are."""
    chosen = os.environ.get("OSTLER_DATA")
    return (Path(chosen) if chosen else platformdirs.user_data_path("ostler")) / "disks"


def made_of(name: str) -> str | None:
    """The digest of the image that the disk of this name was made of; None where there is no such disk."""
    try:
        return str(json.loads((folder() / name / RECORD).read_text())["digest"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HostError(f"persistent disk {name!r}: {folder() / name / RECORD} cannot be read ({error})") from error


def persistent_disk(name: str, image: Image, progress: Progress = silent) -> Path:
    """The disk of this name, made of `image` where it is not there yet.

    Raises:
        BadRequest: it was made of another image.
        HostError: it cannot be made.
    """
    place = folder() / name
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with _locked(folder()):
            found = made_of(name)
            if found is None:
                progress(f"copying the disk of {image.name} for {name}")
                _make(place, image)
            elif found != image.digest:
                raise BadRequest(
                    f"persist {name!r}: made of image {found[:12]}, not of {image.name!r} ({image.digest[:12]})"
                )
    except OSError as error:
        raise HostError(f"persistent disk {place}: {error.strerror or error}") from error
    return place / DISK


def _make(place: Path, image: Image) -> None:
    """Whole or not at all: the record is what makes a folder a disk."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700)
    done = subprocess.run(
        ["cp", "--reflink=auto", "--sparse=always", image.disk, place / DISK], capture_output=True, check=False
    )
    if done.returncode != 0:
        shutil.rmtree(place, ignore_errors=True)
        raise HostError(f"persistent disk {place}: {done.stderr.decode(errors='replace').strip()}")
    (place / DISK).chmod(0o600)
    (place / RECORD).write_text(json.dumps({"digest": image.digest, "image": image.name}))


@contextmanager
def _locked(where: Path) -> Iterator[None]:
    with (where / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

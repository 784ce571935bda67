"""qemu-img: disk files made, resized, described, converted.

Every function refuses a disk that somebody has open in a way that would hurt, by the locks of `host.locks`, and names
the holder; qemu-img looks once more by itself. A file that comes into being is written under another name first, so
that an interrupted command leaves nothing half-done.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ostler.abi import partitions
from ostler.errors import BadRequest, DiskBusy, ImageError
from ostler.host.disk_format import FORMATS, disk_format
from ostler.host.locks import claim_disk
from ostler.images import tools

PACKAGE = "qemu-utils"
_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")


@dataclass(frozen=True, slots=True)
class DiskInfo:
    """A disk file, seen from outside."""

    path: str
    format: str
    size_bytes: int
    """What a guest sees."""
    disk_bytes: int
    """What it takes on the host."""
    backing: str | None
    data_file: str | None
    in_use_by: str | None
    partitions: tuple[dict[str, Any], ...]
    warning: str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def info(path: Path, given: str = "auto") -> DiskInfo:
    """Describe a disk.

    Raises:
        BadRequest: no such file, or not of the format it is said to have.
        ImageError: qemu-img is missing.
    """
    chosen = _existing(path, given)
    told = _ask(path, chosen)
    held = _holder(path)
    table = _table(path) if chosen == "raw" else None
    size_bytes = int(told["virtual-size"])
    short = table is not None and table.needed_bytes > size_bytes
    return DiskInfo(
        path=str(path),
        format=chosen,
        size_bytes=size_bytes,
        disk_bytes=int(told.get("actual-size", 0)),
        backing=told.get("full-backing-filename") or told.get("backing-filename"),
        data_file=told.get("format-specific", {}).get("data", {}).get("data-file"),
        in_use_by=held,
        partitions=tuple(asdict(each) for each in table.partitions) if table else (),
        warning=f"its partition table needs {table.needed_bytes} bytes" if table and short else None,
    )


def create(path: Path, size_bytes: int, *, given: str = "auto") -> None:
    """Make an empty disk; nothing is ever overwritten.

    Raises:
        BadRequest: there is such a file already, or no such folder.
        ImageError: qemu-img is missing or failed.
    """
    chosen = disk_format(path, given) if given != "auto" or not path.exists() else given
    _absent(path)
    with _Part(path) as part:
        tools.run(["qemu-img", "create", "-q", "-f", chosen, str(part), str(size_bytes)], package=PACKAGE)
        _publish(part, path)


def resize(path: Path, size_bytes: int, *, given: str = "auto", shrink: bool = False) -> None:
    """Give a disk another size. What lies beyond a smaller one is lost, so that must be asked for by `shrink`.

    Raises:
        BadRequest: no such file; smaller without `shrink`.
        DiskBusy: somebody has it open.
        ImageError: qemu-img is missing or failed.
    """
    chosen = _existing(path, given)
    claim_disk(path, write=True)
    now = int(_ask(path, chosen)["virtual-size"])
    if size_bytes < now and not shrink:
        raise BadRequest(f"disk {path}: has {now} bytes, {size_bytes} would cut it; --shrink allows that")
    if size_bytes == now:
        return
    more = ["--shrink"] if shrink else []
    tools.run(["qemu-img", "resize", "-q", "-f", chosen, *more, str(path), str(size_bytes)], package=PACKAGE)


def convert(
    source: Path,
    target: Path,
    *,
    source_format: str = "auto",
    target_format: str = "auto",
    compress: bool = False,
    report: Callable[[float], None] = lambda _fraction: None,
) -> None:
    """Copy a disk into a new file of another format, holes kept. `report` is told the fraction done.

    Raises:
        BadRequest: no such source, the target is there already, compression of a raw disk.
        DiskBusy: somebody writes to the source.
        ImageError: qemu-img is missing or failed (the host's disk is full).
    """
    have = _existing(source, source_format)
    want = disk_format(target, target_format) if target_format != "auto" or not target.exists() else target_format
    _absent(target)
    if compress and want != "qcow2":
        raise BadRequest(f"disk {target}: only qcow2 can be compressed")
    claim_disk(source, write=False)
    with _Part(target) as part:
        command = ["qemu-img", "convert", "-p", "-f", have, "-O", want, *(["-c"] if compress else [])]
        _run_reporting([*command, str(source), str(part)], report)
        _publish(part, target)


def standalone(path: Path) -> None:
    """Refuse a qcow2 file that would bring in other files of the host. Raises BadRequest."""
    found = info(path, "qcow2")
    for other in (found.backing, found.data_file):
        if other:
            raise BadRequest(f"disk {path}: refers to another file ({other}), expected one that stands alone")


def _ask(path: Path, chosen: str) -> dict[str, Any]:
    text = tools.run(["qemu-img", "info", "-U", "--output=json", "-f", chosen, str(path)], package=PACKAGE)
    told = json.loads(text)
    if not isinstance(told, dict):
        raise ImageError(f"qemu-img info {path}: an answer that is not understood")
    return told


def _holder(path: Path) -> str | None:
    try:
        claim_disk(path, write=True)
    except DiskBusy as error:
        return str(error).partition("in use by ")[2].partition("; expected")[0]
    return None


def _table(path: Path) -> partitions.Table | None:
    with path.open("rb") as file:
        return partitions.read_table(lambda offset, size: os.pread(file.fileno(), size, offset) if offset >= 0 else b"")


def _existing(path: Path, given: str) -> str:
    if given != "auto" and given not in FORMATS:
        return disk_format(path, given)
    if not path.exists() or path.is_dir():
        reason = os.strerror(errno.EISDIR if path.is_dir() else errno.ENOENT)
        raise BadRequest(f"disk {path}: {reason}, expected a file or block device")
    return disk_format(path, given)


def _absent(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise BadRequest(f"disk {path}: is there already, and nothing is overwritten")
    if not path.absolute().parent.is_dir():
        raise BadRequest(f"disk {path}: there is no folder {path.absolute().parent}")


class _Part:
    """A name in a folder of its own beside `path`; gone at the end with whatever came into being there."""

    def __init__(self, path: Path) -> None:
        try:
            self._folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent)
        except OSError as error:
            raise BadRequest(f"disk {path}: {error.strerror}, expected a folder that can be written") from error
        self._name = path.name

    def __enter__(self) -> Path:
        return Path(self._folder.name) / self._name

    def __exit__(self, *_exc: object) -> None:
        self._folder.cleanup()


def _publish(part: Path, path: Path) -> None:
    try:
        os.link(part, path)  # unlike a rename, this never replaces what somebody else just made
    except FileExistsError as error:
        raise BadRequest(f"disk {path}: is there already, and nothing is overwritten") from error
    except OSError:
        part.rename(path)  # a file system without hard links


def _run_reporting(command: list[str], report: Callable[[float], None]) -> None:
    program = tools.require(command[0], package=PACKAGE)
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(
            [*tools.tied(), program, *command[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            env=tools.environment(),
        ) as process:  # fmt: skip
            assert process.stdout is not None
            try:
                while chunk := process.stdout.read1(4096):  # type: ignore[attr-defined]
                    if found := _PERCENT.findall(chunk):
                        report(float(found[-1]) / 100)
            except BaseException:
                tools.stop(process)
                raise
        if process.returncode != 0:
            errors.seek(0)
            said = errors.read().decode(errors="replace")
            raise ImageError(f"qemu-img: {tools.complaint(said, process.returncode).removeprefix('qemu-img: ')}")

"""Which format a disk file has. Decided by its name or its user, never by what is in it.

What is in a raw disk belongs to the guest. A guest that writes a qcow2 header to its first sector, naming a file of the
host as the layer below, would read that file at its next start if the format were guessed. So content only leads to a
refusal.
"""

from __future__ import annotations

from pathlib import Path

from ostler.errors import BadRequest

QCOW2_MAGIC = b"QFI\xfb"
FORMATS = ("raw", "qcow2")
_SUFFIXES = {".qcow2": "qcow2", ".qcow": "qcow2"}


def is_qcow2(path: Path) -> bool:
    """Whether the content begins like qcow2. False for what cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4) == QCOW2_MAGIC
    except OSError:
        return False


def disk_format(path: Path, given: str = "auto") -> str:
    """Return `raw` or `qcow2`: what is `given`, else what the name of the file says.

    Raises:
        BadRequest: another format is given, or name and content contradict each other.
    """
    if given != "auto":
        if given not in FORMATS:
            raise BadRequest(f"format {given!r}: expected one of {', '.join(FORMATS)}")
        return given
    chosen = _SUFFIXES.get(path.suffix.lower(), "raw")
    if path.is_file() and is_qcow2(path) != (chosen == "qcow2"):
        other = "raw" if chosen == "qcow2" else "qcow2"
        raise BadRequest(
            f"disk {path}: {chosen} by its name and {other} by its content, expected one format; "
            f"format={other} or --format {other} says that you mean it"
        )
    return chosen

"""Kernels taken apart before: what unpacking a bzImage and reading its ELF file came to, kept for the next start.

Unpacking tens of megabytes is most of what a guest waits for before its first instruction. An entry is one file: a
line of JSON, padded to a page, and the segments' bytes behind it, which are mapped and not read. It is named by the
kernel file's identity (device, inode, size, times to the nanosecond), so that looking it up reads nothing of the
kernel; a file written to in any ordinary way has another one.

The folder is the user's own and holds nothing that cannot be made again: an entry that is not what it should be counts
as none, and one that cannot be written is not missed. The newest KEPT entries stay.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from pathlib import Path
from typing import Any

from ostler.boot.kernel import MAX_KERNEL_BYTES, Kernel, Protocol, Segment
from ostler.memory.layout import PAGE_SIZE

KEPT = 6
VERSION = 1
SUFFIX = ".kernel"


class UnpackedKernels:
    """A folder of such entries. No method raises for what it finds there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, source: Path) -> Kernel | None:
        """What the file `source` was unpacked to, if it was and has not changed since."""
        try:
            with self._entry(source).open("rb") as file:
                mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            os.utime(self._entry(source))
            return _kernel(mapped, str(source))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, source: Path, kernel: Kernel) -> None:
        """Keep what `source` was unpacked to."""
        header = json.dumps(_header(kernel)).encode()
        if len(header) > PAGE_SIZE:
            return
        import tempfile

        with contextlib.suppress(OSError):
            entry = self._entry(source)
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                try:
                    file.write(header.ljust(PAGE_SIZE))
                    for segment in kernel.segments:
                        file.write(segment.data)
                except OSError:
                    Path(file.name).unlink()
                    raise
            Path(file.name).replace(entry)
            self._forget_old()

    def _entry(self, source: Path) -> Path:
        """Raises OSError where there is no such file."""
        found = source.stat()
        identity = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        return self._folder / ("-".join(f"{number:x}" for number in (VERSION, *identity)) + SUFFIX)

    def _forget_old(self) -> None:
        entries = sorted(self._folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime_ns)
        for path in entries[:-KEPT]:
            path.unlink(missing_ok=True)


def _header(kernel: Kernel) -> dict[str, Any]:
    return {
        "protocol": kernel.protocol.name,
        "segments": [(segment.gpa, len(segment.data), segment.size_bytes) for segment in kernel.segments],
        "entry": kernel.entry,
        "cmdline_limit": kernel.cmdline_limit,
        "setup_header": kernel.setup_header.hex(),
        "initrd_limit": kernel.initrd_limit,
    }


def _kernel(mapped: memoryview, name: str) -> Kernel:
    """Raises ValueError, KeyError or TypeError for what `_header` did not write."""
    header = json.loads(bytes(mapped[:PAGE_SIZE]))
    segments, at = [], PAGE_SIZE
    for gpa, length, size_bytes in header["segments"]:
        if not 0 <= length <= size_bytes <= MAX_KERNEL_BYTES or at + length > len(mapped):
            raise ValueError("segment beyond the end")
        segments.append(Segment(int(gpa), mapped[at : at + length], int(size_bytes)))
        at += length
    return Kernel(
        name=name,
        protocol=Protocol[header["protocol"]],
        segments=tuple(segments),
        entry=int(header["entry"]),
        cmdline_limit=int(header["cmdline_limit"]),
        setup_header=bytes.fromhex(header["setup_header"]),
        initrd_limit=int(header["initrd_limit"]),
    )

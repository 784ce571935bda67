"""What Linux can do with the space of a file beyond what `os` offers: holes, zeroes, clones, sparse copies.

fallocate(2), ioctl_ficlone(2), lseek(2) with SEEK_DATA. All calls release the interpreter lock and raise OSError.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
FICLONE = 0x4004_9409  # _IOW(0x94, 9, int)
# What a file system without the operation answers; ENOSYS comes from seccomp filters and old layers.
UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENODEV})
_COPY_BYTES = 64 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    while _libc.fallocate(fd, mode, offset, size) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, size: int) -> None:
    """Give `size` bytes at `offset` back to the file system; they read as zeroes."""
    _fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)


def zero_range(fd: int, offset: int, size: int) -> None:
    """Make `size` bytes at `offset` read as zeroes and keep their space."""
    _fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, size)


def clone(source: int, target: int) -> bool:
    """Make the file `target` share all blocks of `source`, copied on write. False where the file system cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def data_extents(fd: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of the parts of a file that are not holes; moves the file's position."""
    end, at = os.fstat(fd).st_size, 0
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at - start


def copy_sparse(source: int, target: int, report: Callable[[float], None] | None = None) -> None:
    """Copy a file's content and holes into an empty file; shares blocks where the file system can.

    `report` is told the fraction of the file's length that is done.
    """
    size_bytes = os.fstat(source).st_size
    os.ftruncate(target, size_bytes)
    if clone(source, target):
        return
    for start, size in data_extents(source):
        done = 0
        while done < size:
            step = min(size - done, _COPY_BYTES)
            copied = _copy_range(source, target, start + done, step)
            if copied == 0:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            done += copied
            if report:
                report((start + done) / size_bytes)


def _copy_range(source: int, target: int, offset: int, size: int) -> int:
    try:
        return os.copy_file_range(source, target, size, offset, offset)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    # Between file systems of different kinds; never more than the file's real data goes through here.
    return os.pwrite(target, os.pread(source, min(size, 1 << 20), offset), offset)


def unnamed(folder: Path) -> int:
    """Open a file of no name in `folder`, read-write: whatever ends this process, the kernel removes it."""
    with contextlib.suppress(OSError):
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    import tempfile

    fd, name = tempfile.mkstemp(prefix=".ostler-", dir=folder)
    Path(name).unlink()
    return fd

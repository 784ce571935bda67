"""Locks on disk files: one writer or many readers, understood by QEMU's programs too.

QEMU marks the use of an image by open-file-description locks on single bytes, far outside of any content that matters
(a lock needs no bytes behind it): byte 100+n says "I use permission n", byte 200+n says "nobody else may use
permission n". All locks taken are shared ones; a conflict is found by asking whether an exclusive one would be
refused. By following that convention (its documentation: "Disk image file locking") Ostler's guests, `qemu-img` and
`qemu-storage-daemon` keep out of each other's way. Such a lock ends with the descriptor: nothing to clean up after a
kill.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from pathlib import Path

from ostler.errors import BadRequest, DiskBusy, HostError

_USES, _DENIES = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: l_type, l_whence, l_start, l_len, l_pid


def lock_disk(fd: int, name: str, *, write: bool) -> None:
    """Claim the open file for reading, or for writing alone, until its descriptor is closed.

    The first claim stays in force when a second call widens it. `fd` must be open for reading.

    Raises:
        DiskBusy: another process uses the file in a way that excludes this one; says which.
        OSError: the file system has no such locks.
    """
    uses = (_READ, _WRITE, _RESIZE) if write else (_READ,)
    denies = (_WRITE, _RESIZE)
    # Claim first, look second: of two that start at once at least one sees the other.
    for byte in [_USES + each for each in uses] + [_DENIES + each for each in denies]:
        _set(fd, byte)
    conflicts = [_DENIES + each for each in uses] + [_USES + each for each in denies]
    if any(_held(fd, byte) for byte in conflicts):
        holder = holder_of(fd)
        wish = "writing" if write else "reading"
        raise DiskBusy(f"disk {name}: in use by {holder}; expected one that nobody else has open for {wish}")


def unlock_disk(fd: int) -> None:
    """Undo `lock_disk`; the descriptor stays open. Raises OSError."""
    for byte in (*range(_USES, _USES + _RESIZE + 1), *range(_DENIES, _DENIES + _RESIZE + 1)):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, byte, 1, 0))


def _set(fd: int, byte: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        # Somebody without QEMU's manners holds an exclusive lock; the caller's question will find it.


def _held(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK


def claim_disk(path: Path, *, write: bool) -> None:
    """See whether the disk could be used now, and let go of it again.

    Raises:
        DiskBusy: somebody has it open; says who.
        BadRequest: it cannot be opened.
        HostError: the file system has no such locks.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadRequest(f"disk {path}: {error.strerror}, expected a file or block device") from error
    try:
        lock_disk(fd, str(path), write=write)
    except OSError as error:
        raise HostError(f"disk {path}: cannot be locked ({error.strerror})") from error
    finally:
        os.close(fd)


def holder_of(fd: int) -> str:
    """Say who else holds a lock on the open file: process number and command, as far as this user may see."""
    wanted = os.fstat(fd)
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) != os.getpid() and _holds(folder, wanted):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            command = " ".join(word.decode(errors="replace") for word in words if word)
            return f"process {folder.name} ({command[:80]})"
    if any(each != str(fd) for each in _locked_descriptors(Path("/proc/self"), wanted)):
        return "this process"
    return "a process of another user"


def _holds(process: Path, wanted: os.stat_result) -> bool:
    return bool(_locked_descriptors(process, wanted))


def _locked_descriptors(process: Path, wanted: os.stat_result) -> list[str]:
    found = []
    with contextlib.suppress(OSError):  # it ended, or belongs to somebody else
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                status = link.stat()
                same = (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino)
                if same and "OFDLCK" in (process / "fdinfo" / link.name).read_text():
                    found.append(link.name)
    return found

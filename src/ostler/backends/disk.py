"""Disks in process: raw files and block devices.

`DiskBackend` is what the virtio block device works on. Every method takes guest memory as it is (no copies), may be
called from several threads at once, blocks, and raises OSError; the device turns that into its own error status.
Offsets and sizes are bytes and come checked from the device; a range beyond the end is refused here once more.

Left out on purpose: the host's page cache is used as it is (no O_DIRECT), so that a plain user's file system, tmpfs
included, always works; a flush is an fdatasync. Formats other than raw are qemu-storage-daemon's.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self

from ostler.abi.partitions import read_table
from ostler.errors import BadRequest, HostError
from ostler.host import files
from ostler.host.locks import lock_disk, unlock_disk

SECTOR_BYTES = 512
SERIAL_BYTES = 20
IOV_MAX = 1024
_ZEROES = bytes(1 << 20)


class DiskBackend(Protocol):
    """A disk's content. Closing twice is harmless."""

    @property
    def size_bytes(self) -> int:
        """A multiple of 512; grows only by `refresh_size` of the back ends that have it."""

    @property
    def read_only(self) -> bool:
        """Whether every method that would change the content raises EROFS."""

    @property
    def serial(self) -> str:
        """At most 20 ASCII characters: what the guest sees below /dev/disk/by-id."""

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill the views from `offset` on."""

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write the views one after another from `offset` on."""

    def flush(self) -> None:
        """Return once everything written before is on stable storage."""

    def discard(self, offset: int, size: int) -> None:
        """Forget a range; advisory, so a host that cannot does nothing."""

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """Make a range read as zeroes; `unmap` allows giving its space back."""

    def close(self) -> None:
        """Release the descriptor and with it the lock."""


class RawDisk:
    """A raw file or block device. Owns its descriptor; a context manager."""

    def __init__(self, fd: int, *, read_only: bool, serial: str, durable: bool = True) -> None:
        """Take over `fd`. Without `durable` a flush does nothing: for files that end with the process."""
        self._fd = fd
        self._can_discard = self._can_zero = True
        self._durable = durable
        self.read_only = read_only
        self.serial = serial
        self.size_bytes = os.lseek(fd, 0, os.SEEK_END)

    def readv(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fill the views. A file cut short behind Ostler's back is an I/O error, not silent zeroes."""
        _transfer(os.preadv, self._fd, offset, views)

    def writev(self, offset: int, views: Sequence[memoryview]) -> None:
        """Write the views; EROFS on a read-only disk, ENOSPC past the end."""
        self._check_write(offset, sum(view.nbytes for view in views))
        _transfer(os.pwritev, self._fd, offset, views)

    def flush(self) -> None:
        """fdatasync."""
        if self._durable and not self.read_only:
            os.fdatasync(self._fd)

    def discard(self, offset: int, size: int) -> None:
        """Punch a hole, where the host can."""
        self._check_write(offset, size)
        if self._can_discard and size:
            self._can_discard = _supported(files.punch_hole, self._fd, offset, size)

    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None:
        """A hole, a range marked as zeroes, or zeroes written: the first of these that may and can be."""
        self._check_write(offset, size)
        if not size:
            return
        if unmap and self._can_discard:
            self._can_discard = _supported(files.punch_hole, self._fd, offset, size)
            if self._can_discard:
                return
        if self._can_zero:
            self._can_zero = _supported(files.zero_range, self._fd, offset, size)
        if not self._can_zero:
            write_zero_bytes(self._fd, offset, size)

    def fileno(self) -> int:
        """The descriptor, for file operations on the whole disk."""
        return self._fd

    def refresh_size(self) -> int:
        """Look at the size again, after somebody grew the file; a smaller one is not believed."""
        size_bytes = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR_BYTES * SECTOR_BYTES
        self.size_bytes = max(self.size_bytes, size_bytes)
        return self.size_bytes

    def lock(self, name: str) -> None:
        """Claim the disk for this process. Raises DiskBusy, OSError."""
        lock_disk(self._fd, name, write=not self.read_only)

    def unlock(self) -> None:
        """Let another process claim the disk, which this one does not touch any more."""
        unlock_disk(self._fd)

    def close(self) -> None:
        """Close once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_write(self, offset: int, size: int) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if offset < 0 or offset + size > self.size_bytes:  # a file would silently grow
            raise OSError(errno.ENOSPC, f"{size} bytes at {offset} of a disk of {self.size_bytes}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def open_raw(path: Path, *, read_only: bool = False, serial: str | None = None, locked: bool = True) -> RawDisk:
    """Open and lock a raw disk; not `locked` is for whoever locks it before the first access.

    Raises:
        BadRequest: no such file, not permitted, neither file nor block device, not a whole number of sectors, shorter
            than its partition table says.
        DiskBusy: another process has it open.
        HostError: the file system has no locks.
    """
    fd = open_locked(path, read_only=read_only, locked=locked)
    try:
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        if size_bytes == 0 or size_bytes % SECTOR_BYTES:
            raise BadRequest(f"disk {path}: {size_bytes} bytes, expected a positive multiple of {SECTOR_BYTES}")
        _check_whole(fd, path, size_bytes)
        return RawDisk(fd, read_only=read_only, serial=serial if serial is not None else default_serial(path))
    except BaseException:
        os.close(fd)
        raise


def open_locked(path: Path, *, read_only: bool, locked: bool = True) -> int:
    """Open a file or block device as a disk and lock it; raises as `open_raw`."""
    try:
        # Not blocking: a FIFO of that name must not make anybody wait.
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = "; read-only may be allowed" if error.errno in (errno.EACCES, errno.EROFS) and not read_only else ""
        raise BadRequest(f"disk {path}: {error.strerror}, expected a file or block device{hint}") from error
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise BadRequest(f"disk {path}: expected a file or block device")
        if locked:
            lock_disk(fd, str(path), write=not read_only)
    except OSError as error:
        os.close(fd)
        raise HostError(f"disk {path}: cannot be locked ({error.strerror})") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_whole(fd: int, path: Path, size_bytes: int) -> None:
    """Refuse a disk that was cut short: its guest would meet I/O errors in the middle of its work."""
    try:
        table = read_table(lambda offset, size: os.pread(fd, size, offset) if offset < size_bytes else b"")
    except OSError:
        return  # the guest's reads will say it
    if table is not None and table.needed_bytes > size_bytes:
        raise BadRequest(
            f"disk {path}: {size_bytes} bytes, expected the {table.needed_bytes} that its partition table says"
        )


def default_serial(path: Path) -> str:
    """Return a serial that stays the same as long as the disk stays where it is."""
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:SERIAL_BYTES]


def write_zero_bytes(fd: int, offset: int, size: int) -> None:
    """Write zeroes the plain way."""
    zeroes = memoryview(_ZEROES)
    while size:
        written = os.pwrite(fd, zeroes[: min(size, len(zeroes))], offset)
        offset, size = offset + written, size - written


def _supported(operation: Callable[[int, int, int], None], fd: int, offset: int, size: int) -> bool:
    try:
        operation(fd, offset, size)
    except OSError as error:
        if error.errno in files.UNSUPPORTED:
            return False
        raise
    return True


def _transfer(
    call: Callable[[int, Sequence[memoryview], int], int], fd: int, offset: int, views: Sequence[memoryview]
) -> None:
    """Move all bytes of the views, however many pieces the kernel makes of it."""
    while views:
        batch = views[:IOV_MAX]
        wanted = sum(view.nbytes for view in batch)
        done = call(fd, batch, offset) if wanted else 0
        if done == 0 and wanted:
            raise OSError(errno.EIO, f"end of the disk at {offset}, {wanted} bytes wanted")
        offset += done
        views = views[IOV_MAX:] if done == wanted else [*_rest(batch, done), *views[IOV_MAX:]]


def _rest(views: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return what of the views is left after the first `done` bytes."""
    rest = []
    for view in views:
        if done < view.nbytes:
            rest.append(view.cast("B")[done:])
        done = max(0, done - view.nbytes)
    return rest

"""Memory that is filled when it is touched: userfaultfd(2), its ioctls in ioctl_userfaultfd(2).

The descriptor belongs to the memory of the process that made it; whoever holds it, another process too, may answer its
faults. That is needed here: a thread that touches a missing page through a memoryview stops holding the interpreter's
lock, so its own process could never answer it. Faults inside system calls are answered like any other, which needs
root, /dev/userfaultfd, or vm.unprivileged_userfaultfd = 1.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Self

SYS_USERFAULTFD = 323
USERFAULTFD_IOC_NEW = 0xAA00
UFFD_API = 0xAA
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER = 0xC018_AA3F, 0xC020_AA00, 0x8010_AA01
UFFDIO_COPY, UFFDIO_ZEROPAGE = 0xC028_AA03, 0xC020_AA04
UFFDIO_REGISTER_MODE_MISSING = 1
UFFD_FEATURE_MISSING_SHMEM = 1 << 5
UFFD_EVENT_PAGEFAULT = 0x12
MESSAGE = struct.Struct("<B7xQQ8x")
MESSAGES_AT_ONCE = 64
PAGE_BYTES = 4096

_libc = ctypes.CDLL(None, use_errno=True)


class Userfault:
    """Owns the descriptor; a context manager."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def new(cls) -> Self:
        """Of this process's memory. Raises OSError where the host does not let this user have one."""
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        fd = _libc.syscall(SYS_USERFAULTFD, flags)
        if fd < 0:
            number = ctypes.get_errno()
            if number != errno.EPERM:
                raise OSError(number, os.strerror(number))
            device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
            try:
                fd = fcntl.ioctl(device, USERFAULTFD_IOC_NEW, flags)
            finally:
                os.close(device)
        found = cls(fd)
        try:
            request = bytearray(struct.pack("<QQQ", UFFD_API, 0, 0))
            fcntl.ioctl(fd, UFFDIO_API, request)
            if not struct.unpack("<QQQ", request)[1] & UFFD_FEATURE_MISSING_SHMEM:
                raise OSError(errno.EOPNOTSUPP, "userfaultfd without shared memory")
        except OSError:
            found.close()
            raise
        return found

    def register(self, address: int, size_bytes: int) -> None:
        """From now on a touch of a missing page there waits for an answer. Raises OSError."""
        fcntl.ioctl(
            self.fd,
            UFFDIO_REGISTER,
            bytearray(struct.pack("<QQQQ", address, size_bytes, UFFDIO_REGISTER_MODE_MISSING, 0)),
        )

    def unregister(self, address: int, size_bytes: int) -> None:
        """Missing pages are zeroes again, and whoever waits goes on. Raises OSError."""
        fcntl.ioctl(self.fd, UFFDIO_UNREGISTER, bytearray(struct.pack("<QQ", address, size_bytes)))

    def faults(self) -> Iterator[int]:
        """Addresses that somebody waits for, whole pages; nothing where there are none now."""
        try:
            data = os.read(self.fd, MESSAGE.size * MESSAGES_AT_ONCE)
        except BlockingIOError:
            return
        for event, _flags, address in MESSAGE.iter_unpack(data):
            if event == UFFD_EVENT_PAGEFAULT:
                yield address & ~(PAGE_BYTES - 1)

    def copy(self, address: int, source: int, size_bytes: int) -> None:
        """Put pages there from `source`, an address of the caller's; one that is there already stays as it is.

        Raises OSError.
        """
        done = 0
        while done < size_bytes:
            request = bytearray(struct.pack("<QQQQq", address + done, source + done, size_bytes - done, 0, 0))
            done += self._answered(UFFDIO_COPY, request, struct.calcsize("<QQQQ"))

    def zero(self, address: int) -> None:
        """Put a page of zeroes there; one that is there already stays as it is. Raises OSError."""
        self._answered(UFFDIO_ZEROPAGE, bytearray(struct.pack("<QQQq", address, PAGE_BYTES, 0, 0)), 24)

    def _answered(self, number: int, request: bytearray, result_at: int) -> int:
        """Bytes that are settled now."""
        try:
            fcntl.ioctl(self.fd, number, request)
        except OSError as error:
            # What was done before the page that stopped it, or minus the error where that was the first.
            done = int(struct.unpack_from("<q", request, result_at)[0])
            if done > 0:
                return done
            if error.errno == errno.EEXIST:
                return PAGE_BYTES
            if error.errno == errno.EAGAIN:
                return 0
            raise
        return int(struct.unpack_from("<q", request, result_at)[0])

    def close(self) -> None:
        """Whoever still waits goes on with zeroes."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def is_available() -> bool:
    """Whether this host lets this user fill memory on demand."""
    try:
        Userfault.new().close()
    except OSError:
        return False
    return True

"""The table by which the guests of one user agree on their shares: a file that every VM process maps.

    <runtime folder>/shares.table
    header   64 bytes       magic, generation
    slots    256 × 256      a guest each: settings, demand, processor time used so far, when that was written

There is no daemon. A VM process claims a slot by an open-file-description lock on one of its bytes, so that a slot is
free the moment its process is gone, however it went. It writes its own slot only and reads all. Every process does the
same arithmetic on the same numbers (`ostler.sched.policy`).

A slot is read while its owner may be writing it: its sequence number is odd meanwhile. Who cannot read a slot after a
few attempts passes over it this time. The generation is a futex: whoever changes settings counts it up and wakes those
who sleep because nobody has asked for anything.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ostler.errors import HostError
from ostler.sched.policy import DEFAULT_WEIGHT, Claim

NAME = "shares.table"
MAGIC = 0x4F53_4348_4152_4531
SLOTS, SLOT_BYTES, HEADER_BYTES = 256, 256, 64
SIZE_BYTES = HEADER_BYTES + SLOTS * SLOT_BYTES
GENERATION_AT = 8
# sequence, pid, weight, vcpus; cap, reserve, demand in CPUs; used_ns, written_ns; barred, lag_ns; then the CPUs' mask.
_SLOT = struct.Struct("<IIIIdddQQQd")
_BARRED = struct.Struct("<Qd")
_BARRED_AT = _SLOT.size - _BARRED.size
_MASK_AT = _SLOT.size
_MASK_BYTES = 128
MAX_HOST_CPU = _MASK_BYTES * 8 - 1
_ATTEMPTS = 4
# The low byte of `vcpus`, of which a guest has 1 to 255.
_USED_AT = 12

_FLOCK = struct.Struct("hhqqi4x")  # struct flock
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE, _EVERYBODY = 202, 0, 1, 2**31 - 1
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


@dataclass(frozen=True, slots=True)
class Share:
    """What a guest was given, in CPUs: 0.25 is a quarter of one."""

    weight: int = DEFAULT_WEIGHT
    cap: float = math.inf
    reserve: float = 0.0
    cpus: frozenset[int] = frozenset()
    """Host CPUs it is pinned to; empty: none in particular."""

    @property
    def is_default(self) -> bool:
        """Whether nobody has asked for anything; to be pinned binds the guest itself and nobody else."""
        return self.weight == DEFAULT_WEIGHT and math.isinf(self.cap) and not self.reserve


@dataclass(frozen=True, slots=True)
class Entry:
    """One guest as the others see it."""

    slot: int
    pid: int
    share: Share
    vcpus: int
    demand: float
    """CPUs it could use, as its process last measured it."""
    used_ns: int
    """Processor time of its vCPUs since they began."""
    written_ns: int
    """When, by the monotonic clock."""
    is_barred: bool = False
    """Whether it is kept waiting for its turn."""
    lag_ns: float = 0.0
    """What it was due less what it had."""

    def claim(self, *, demand: float | None = None) -> Claim:
        """For the policy."""
        return Claim(
            demand=self.demand if demand is None else demand,
            weight=self.share.weight,
            cap=self.share.cap,
            reserve=self.share.reserve,
            cpus=self.share.cpus,
        )


class Table:
    """A mapped table, and perhaps a slot of one's own in it; a context manager. One thread at a time writes."""

    def __init__(self, path: Path) -> None:
        """Opens the table, and makes it where there is none. Raises HostError."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise HostError(f"table of shares {path}: {error.strerror or error}") from error
        try:
            if os.fstat(self._fd).st_size < SIZE_BYTES:
                # Growing is the same whoever does it first, and new bytes are zero.
                os.ftruncate(self._fd, SIZE_BYTES)
            self._map = mmap.mmap(self._fd, SIZE_BYTES)
        except OSError as error:
            os.close(self._fd)
            raise HostError(f"table of shares {path}: {error.strerror or error}") from error
        self._word = ctypes.c_uint32.from_buffer(self._map, GENERATION_AT)
        self.slot: int | None = None
        magic = int.from_bytes(self._map[:8], "little")
        if magic not in (0, MAGIC):
            self.close()
            raise HostError(f"table of shares {path}: is something else, expected one of Ostler's; remove it")
        self._map[:8] = MAGIC.to_bytes(8, "little")

    # -- one's own slot ---------------------------------------------------------------------

    def claim(self) -> bool:
        """Take a free slot; False where all are taken, and then the guest goes without."""
        for slot in range(SLOTS):
            if self._lock(slot, fcntl.F_WRLCK):
                self.slot = slot
                self._clear(slot)
                return True
        return False

    def write(
        self, share: Share, *, vcpus: int, demand: float, used_ns: int, written_ns: int, is_barred: bool = False,
        lag_ns: float = 0.0,
    ) -> None:  # fmt: skip
        """Say how one's guest is; without a slot, nothing."""
        if self.slot is None:
            return
        at = self._at(self.slot)
        sequence = int.from_bytes(self._map[at : at + 4], "little") | 1
        self._map[at : at + 4] = sequence.to_bytes(4, "little")
        _SLOT.pack_into(
            self._map, at, sequence, os.getpid(), share.weight, vcpus, share.cap, share.reserve, demand, used_ns,
            written_ns, is_barred, lag_ns,
        )  # fmt: skip
        mask = sum(1 << cpu for cpu in share.cpus)
        self._map[at + _MASK_AT : at + _MASK_AT + _MASK_BYTES] = mask.to_bytes(_MASK_BYTES, "little")
        self._map[at : at + 4] = ((sequence + 1) & 0xFFFF_FFFF or 2).to_bytes(4, "little")

    def write_barred(self, *, is_barred: bool, lag_ns: float) -> None:
        """Say that alone: two words, so whoever reads meanwhile sees the one or the other of each."""
        if self.slot is not None:
            _BARRED.pack_into(self._map, self._at(self.slot) + _BARRED_AT, is_barred, lag_ns)

    def release(self) -> None:
        """Give the slot back."""
        if self.slot is not None:
            self._clear(self.slot)
            self._lock(self.slot, fcntl.F_UNLCK)
            self.slot = None

    # -- everybody's ------------------------------------------------------------------------

    def entries(self) -> Iterator[Entry]:
        """Every slot with something in it, those of processes that are gone too; see `forget_gone`."""
        used = self._map[HEADER_BYTES + _USED_AT : SIZE_BYTES : SLOT_BYTES]
        return self.look_at(slot for slot, is_used in enumerate(used) if is_used)

    def look_at(self, slots: Iterable[int]) -> Iterator[Entry]:
        """Those of some slots."""
        return (found for slot in slots if (found := self._read(slot)) is not None)

    def forget_gone(self, entry: Entry) -> bool:
        """Clear the slot of a process that is gone; whether it was."""
        if entry.slot == self.slot or not self._lock(entry.slot, fcntl.F_WRLCK):
            return False
        self._clear(entry.slot)
        self._lock(entry.slot, fcntl.F_UNLCK)
        return True

    def _read(self, slot: int) -> Entry | None:
        at = self._at(slot)
        for _ in range(_ATTEMPTS):
            data = self._map[at : at + SLOT_BYTES]
            sequence, pid, weight, vcpus, cap, reserve, demand, used_ns, written_ns, barred, lag_ns = _SLOT.unpack_from(
                data
            )
            if sequence and not sequence & 1 and self._map[at : at + 4] == data[:4]:
                mask = int.from_bytes(data[_MASK_AT : _MASK_AT + _MASK_BYTES], "little")
                cpus = frozenset(cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1)
                share = Share(max(weight, 1), cap, reserve, cpus)
                return Entry(slot, pid, share, vcpus, demand, used_ns, written_ns, bool(barred), lag_ns)
        return None

    @staticmethod
    def _at(slot: int) -> int:
        return HEADER_BYTES + slot * SLOT_BYTES

    def _clear(self, slot: int) -> None:
        self._map[self._at(slot) : self._at(slot) + SLOT_BYTES] = bytes(SLOT_BYTES)

    def _lock(self, slot: int, kind: int) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, self._at(slot), 1, 0))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        return True

    # -- waking and waiting -----------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Changes with every `announce`."""
        return int(self._word.value)

    def announce(self) -> None:
        """Settings have changed: wake everybody who waits. Two at once may count as one, and both wake."""
        self._word.value = (self._word.value + 1) & 0xFFFF_FFFF
        _libc.syscall(_SYS_FUTEX, ctypes.byref(self._word), _FUTEX_WAKE, _EVERYBODY, None, None, 0)

    def wait(self, generation: int, *, timeout_ns: int | None = None) -> None:
        """Sleep until somebody announces something after that generation, or the time is over."""
        limit = None if timeout_ns is None else ctypes.byref(_Timespec(*divmod(max(timeout_ns, 0), 10**9)))
        _libc.syscall(_SYS_FUTEX, ctypes.byref(self._word), _FUTEX_WAIT, ctypes.c_uint32(generation), limit, None, 0)

    def close(self) -> None:
        """Unmap; the slot is free then."""
        if self._fd >= 0:
            self.release()
            del self._word
            self._map.close()
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

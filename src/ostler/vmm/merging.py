"""Giving up pages whose content the host has already: pages of zeroes, and pages that are equal among guests.

Several guests' equal pages become one page each of a common file, sealed so that nobody can ever write to it, and
mapped privately where they were: a guest that writes gets its own copy again, as after a fork. It needs no privilege
and no kernel thread. Three steps, each a request: digests of all pages go into a file of the client's, who compares
them (`ostler.client.relief`); some guest donates the content; and each guest, held for a slice at a time, compares page
by page and maps only what is equal at that instant.

Memory that KVM backs with huge pages stays whole; the host's own KSM can have it (`advise`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from ostler.errors import BadRequest, HostError
from ostler.host import footprint
from ostler.host.anonymous import PrivateMapping
from ostler.host.copied import private_ranges
from ostler.host.files import data_extents
from ostler.host.memfd import SharedMapping
from ostler.memory.layout import PAGE_SIZE
from ostler.vmm.mapper import held
from ostler.vmm.run import GuestProcess

DIGEST_BYTES = 16
NOT_THERE, ZERO = bytes(DIGEST_BYTES), b"\xff" * DIGEST_BYTES
RUN = struct.Struct("<QQQ")
"""First page of the guest's memory as it lies on the host, first page of the common file, number of pages."""
TO_ZERO = (1 << 64) - 1
# Each run is a mapping of its own and splits another; the kernel allows a process 65,530.
MAX_RUNS = 20_000
MAX_PASSES = 3
SLICE_RUNS, SLICE_PAGES = 512, 4096
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK
_ZERO_PAGE = bytes(PAGE_SIZE)

Work = Callable[[threading.Event], dict[str, Any]]


class Merging:
    """One guest's side of it. Loop thread, but for the work that is returned."""

    def __init__(self, process: GuestProcess, *, is_allowed: bool = True) -> None:
        """Not allowed where memory still arrives from elsewhere."""
        self._process = process
        self._memory = process.machine.memory
        self._is_allowed = is_allowed
        self._passes = 0

    def digests(self, path: str) -> Work:
        """Write a digest for every page into a file: zeroes for what is not this guest's alone, ones for zeroes."""
        self._check()
        pages = len(self._memory.whole) // PAGE_SIZE

        def work(stopping: threading.Event) -> dict[str, Any]:
            found, zero = bytearray(pages * DIGEST_BYTES), 0
            for first, count in self._own_pages():
                if stopping.is_set():
                    break
                for page in range(first, first + count):
                    content = bytes(self._memory.whole[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
                    if content == _ZERO_PAGE:
                        digest, zero = ZERO, zero + 1
                    else:
                        digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
                    found[page * DIGEST_BYTES : (page + 1) * DIGEST_BYTES] = digest
            with _Opened(path, os.O_WRONLY) as file:
                os.ftruncate(file.fd, len(found))
                os.pwrite(file.fd, found, 0)
            return {"pages": pages, "zero_pages": zero, "span_bytes": pages * PAGE_SIZE}

        return work

    def donate(self, path: str, runs_path: str) -> Work:
        """Copy pages into the common file."""
        self._check()
        runs = self._read_runs(runs_path)

        def work(stopping: threading.Event) -> dict[str, Any]:
            with _Opened(path, os.O_WRONLY) as file:
                for page, target, count in runs:
                    if stopping.is_set():
                        break
                    view = self._memory.whole[page * PAGE_SIZE : (page + count) * PAGE_SIZE]
                    os.pwrite(file.fd, view, target * PAGE_SIZE)
                    view.release()
            return {}

        return work

    def merge(self, path: str, runs_path: str) -> Callable[[], dict[str, Any] | None]:
        """What is returned does a slice at each call, and says what came of it after the last."""
        self._check()
        if self._passes >= MAX_PASSES:
            raise BadRequest(f"memory: has been merged {MAX_PASSES} times already, and every mapping is used up")
        runs = self._read_runs(runs_path)
        file = _Opened(path, os.O_RDONLY)
        try:
            _check_common(file.fd, runs)
        except BaseException:
            file.close()
            raise
        self._passes += 1
        return _Pass(self._process, file, runs).step

    def advise(self) -> bool:
        """Offer the memory to KSM; false where it is of the kind that KSM does not merge. Raises HostError."""
        mapping = self._memory.mapping
        if isinstance(mapping, SharedMapping) and mapping.holes is None:
            return False
        try:
            footprint.advise(mapping.address, mapping.size_bytes, footprint.MADV_MERGEABLE)
        except OSError as error:
            raise HostError(f"memory: this host's kernel merges nothing: {error.strerror or error}") from error
        return True

    def _check(self) -> None:
        if not self._is_allowed:
            raise BadRequest("memory: came from another host page by page, and cannot be merged")
        if self._process.machine.shares_memory:
            raise BadRequest("memory: is shared with another program that serves a device, and cannot be merged")
        if isinstance(self._memory.mapping, PrivateMapping):
            raise BadRequest("memory: is in huge pages, which are not taken apart; the host's KSM may merge it")
        if self._memory.writes_are_logged:
            raise BadRequest("memory: is being watched or moved; try again when that is done")

    def _own_pages(self) -> Iterator[tuple[int, int]]:
        """First page and number of pages of what costs the host memory for this guest alone."""
        mapping = self._memory.mapping
        if isinstance(mapping, SharedMapping) and mapping.owns_file:
            for start, size in data_extents(mapping.file):
                yield start // PAGE_SIZE, size // PAGE_SIZE
        if not (isinstance(mapping, SharedMapping) and mapping.holes is None):
            for start, size in private_ranges(mapping.address, mapping.size_bytes):
                yield start // PAGE_SIZE, size // PAGE_SIZE

    def _read_runs(self, path: str) -> list[tuple[int, int, int]]:
        """Judge a file of runs. Raises BadRequest, HostError."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise HostError(f"memory: {path}: {error.strerror}") from error
        if len(data) % RUN.size or len(data) > MAX_RUNS * RUN.size:
            raise BadRequest(f"memory: {path}: {len(data)} bytes, expected at most {MAX_RUNS} runs of {RUN.size}")
        pages = len(self._memory.whole) // PAGE_SIZE
        found = [*RUN.iter_unpack(data)]
        for page, _, count in found:
            if not count or page + count > pages:
                raise BadRequest(f"memory: {count} pages from {page} on: expected pages of the guest's {pages}")
        return found


class _Pass:
    """One merging, slice by slice; the file is closed at its end."""

    def __init__(self, process: GuestProcess, file: _Opened, runs: Sequence[tuple[int, int, int]]) -> None:
        self._process, self._file, self._runs = process, file, runs
        self._at = 0
        self._result = {"merged_bytes": 0, "zero_bytes": 0, "changed_bytes": 0, "slices": 0}

    def step(self) -> dict[str, Any] | None:
        try:
            with held(self._process), self._process.lock:
                # Nothing that a back end has under way may land in a page while it is replaced.
                self._process.machine.board.save()
                self._slice()
        except OSError as error:
            self._file.close()
            raise HostError(f"memory: could not be merged: {error.strerror or error}") from error
        except BaseException:
            self._file.close()
            raise
        if self._at < len(self._runs):
            return None
        self._file.close()
        return self._result

    def _slice(self) -> None:
        self._result["slices"] += 1
        runs = pages = 0
        while self._at < len(self._runs) and runs < SLICE_RUNS and pages < SLICE_PAGES:
            page, source, count = self._runs[self._at]
            taken = min(count, SLICE_PAGES)
            self._run(page, source, taken)
            runs, pages = runs + 1, pages + taken
            if taken == count:
                self._at += 1
            else:
                self._runs = [*self._runs]
                further = source if source == TO_ZERO else source + taken
                self._runs[self._at] = (page + taken, further, count - taken)

    def _run(self, page: int, source: int, count: int) -> None:
        """Map those pages of a run that are equal; one that has changed splits it."""
        memory = self._process.machine.memory
        is_zero = source == TO_ZERO
        wanted = bytes(count * PAGE_SIZE) if is_zero else os.pread(self._file.fd, count * PAGE_SIZE, source * PAGE_SIZE)
        content = bytes(memory.whole[page * PAGE_SIZE : (page + count) * PAGE_SIZE])
        name = "zero_bytes" if is_zero else "merged_bytes"
        for first, end in _equal_runs(content, wanted):
            offset, size = (page + first) * PAGE_SIZE, (end - first) * PAGE_SIZE
            if is_zero:
                memory.mapping.discard(offset, size)
            else:
                memory.merge(offset, size, self._file.fd, (source + first) * PAGE_SIZE)
            self._result[name] += size
            count -= end - first
        self._result["changed_bytes"] += count * PAGE_SIZE


def _equal_runs(content: bytes, wanted: bytes) -> Iterator[tuple[int, int]]:
    """First and end of each run of equal pages."""
    pages = len(content) // PAGE_SIZE
    if content == wanted:
        yield 0, pages
        return
    start = -1
    for page in range(pages + 1):
        part = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
        is_equal = page < pages and content[part] == wanted[part]
        if is_equal and start < 0:
            start = page
        elif not is_equal and start >= 0:
            yield start, page
            start = -1


def _check_common(fd: int, runs: Sequence[tuple[int, int, int]]) -> None:
    """A file somebody could write to, or cut off, would be a hole in the guest. Raises BadRequest."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & SEALS != SEALS:
        raise BadRequest("memory: the common file is not sealed; expected a memfd that nobody can write to")
    pages = os.fstat(fd).st_size // PAGE_SIZE
    for _, source, count in runs:
        if source != TO_ZERO and source + count > pages:
            raise BadRequest(f"memory: {count} pages from {source} on: expected pages of the common file's {pages}")


class _Opened:
    """A file that is closed once; a context manager."""

    def __init__(self, path: str, flags: int) -> None:
        """Raises HostError."""
        try:
            self.fd = os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"memory: {path}: {error.strerror}") from error

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

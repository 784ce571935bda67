"""A guest's memory at one instant, caught in milliseconds and written while the guest runs on.

Three ways, by what holds the memory (`ostler.host.copied` says how each works):

- A memfd nobody else has mapped is frozen in place. The memfd is the image, already whole.
- Memory that is private to this process (frozen before, begun with an image, or KVM's huge pages) is held by a fork(2)
  of this process, which shares its pages copy-on-write, writes them out and ends. It runs a few lines of Python that
  take no lock and start no thread, and what it does to the guest is the time of the fork itself.
- A memfd that another program writes to can be had only while the guest stands still: it is copied then.

Pages of zeroes become holes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ostler.errors import HostError, StateError
from ostler.host.copied import PAGE_BYTES, CopiedMapping, private_ranges
from ostler.host.files import data_extents, punch_hole
from ostler.host.memfd import SharedMapping
from ostler.memory import GuestMemory
from ostler.snapshot.manifest import CHUNK_BYTES

STEP_BYTES = 64 << 10
RANGE = struct.Struct("<QQ")
MAX_RANGES = 1 << 20
# Each range of changes is a mapping of its own in whoever lays them over an image: of these there are about so many.
MAX_CHANGES = 8192
_ZEROES = bytes(STEP_BYTES)
_ZERO_PAGE = bytes(PAGE_BYTES)


@dataclass(slots=True)
class Capture:
    """Memory caught: `finish` it, from any thread, once the guest runs on."""

    target: int
    """Where the image goes; stays the caller's."""
    base: int | None = None
    """A frozen memfd to copy from; owned."""
    holder: int | None = None
    """The process that writes."""

    def finish(self) -> None:
        """Return when the image is whole. Raises HostError."""
        try:
            if self.base is not None:
                copy_data(self.base, self.target)
            if self.holder is not None:
                holder, self.holder = self.holder, None
                _, status = os.waitpid(holder, 0)
                if status:
                    raise HostError("guest memory could not be written: is the disk full?")
        except OSError as error:
            raise HostError(f"guest memory could not be written: {error.strerror or error}") from error
        finally:
            self.close()

    def close(self) -> None:
        """Let go of what is held."""
        if self.base is not None:
            os.close(self.base)
            self.base = None


def can_freeze(memory: GuestMemory, *, shared: bool) -> bool:
    """Whether the memory is a memfd that only this process writes to, and has not been frozen before."""
    return isinstance(memory.mapping, SharedMapping) and memory.mapping.holes is None and not shared


def freeze(memory: GuestMemory) -> int:
    """Freeze such memory; a descriptor of its image, which is the caller's. Raises OSError."""
    mapping = memory.mapping
    if not isinstance(mapping, SharedMapping):
        raise TypeError("only a memfd can be frozen")
    mapping.freeze()
    return os.dup(mapping.file)


def base(memory: GuestMemory, *, shared: bool) -> int | None:
    """The file that such memory is a private copy of, and that nobody changes any more; it stays the mapping's own.

    None for memory that is no copy of one.
    """
    mapping = memory.mapping
    if shared or not isinstance(mapping, SharedMapping | CopiedMapping):
        return None
    return mapping.file if isinstance(mapping, CopiedMapping) or not mapping.owns_file else None


def capture(
    memory: GuestMemory, target: int, *, shared: bool, ranges: int | None = None, holes: int | None = None
) -> Capture:
    """Catch the memory of a guest that stands still, to be written into the empty file `target`. Raises OSError.

    `shared` says that other programs have it mapped. With `ranges`, a descriptor too, only what was written since the
    memory was frozen goes into `target`, and where that is into `ranges`; with `holes` as well these are where the
    memory was given back, and `target` is for `lay_over`: what lies close together is one range.
    """
    os.ftruncate(target, len(memory.whole))
    if can_freeze(memory, shared=shared):
        return Capture(target, base=freeze(memory))
    mapping = memory.mapping
    if shared:
        copy_data(mapping.fd, target)
        return Capture(target)
    with warnings.catch_warnings():
        # From 3.12 on Python warns of forks beside threads, for what children like this one do not do.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return Capture(target, holder=pid)
    status = 1
    try:
        _write_private(memory, target, ranges, holes)
        status = 0
    finally:
        os._exit(status)


def _write_private(memory: GuestMemory, target: int, ranges: int | None, holes: int | None) -> None:
    mapping = memory.mapping
    punched = getattr(mapping, "holes", None)
    empty = [*punched.ranges] if punched is not None else []
    # What is mapped from common files is in no file of the image's: it counts as the guest's own.
    own = [*getattr(mapping, "merged", ()), *private_ranges(mapping.address, mapping.size_bytes)]
    if ranges is not None and holes is not None:
        own = joined(own, gap_bytes=max(STEP_BYTES, mapping.size_bytes // MAX_CHANGES))
        os.write(holes, b"".join(RANGE.pack(*each) for each in empty))
        os.write(ranges, b"".join(RANGE.pack(*each) for each in own))
    elif ranges is not None:
        os.write(ranges, b"".join(RANGE.pack(*each) for each in (*empty, *own)))
    else:
        base = getattr(mapping, "file", None)
        if base is not None:
            copy_data(base, target)
            for start, size in empty:
                punch_hole(target, start, size)
    view = memory.whole
    for start, size in own:
        for at in range(start, start + size, STEP_BYTES):
            write_step(target, at, bytes(view[at : min(at + STEP_BYTES, start + size)]), over=ranges is None)


def joined(ranges: Iterable[tuple[int, int]], *, gap_bytes: int) -> list[tuple[int, int]]:
    """The ranges in order, those that overlap or lie no more than a gap apart as one."""
    found: list[tuple[int, int]] = []
    for start, size in sorted(ranges):
        if found and start <= sum(found[-1]) + gap_bytes:
            first, before = found[-1]
            found[-1] = first, max(before, start + size - first)
        else:
            found.append((start, size))
    return found


def lay_over(
    memory: GuestMemory, changes: Path, *, ranges: list[tuple[int, int]], holes: list[tuple[int, int]]
) -> None:
    """Make memory that began with an image what it was when `changes` was written; nobody uses it yet.

    The file's pages are mapped where the image's are, and so shared by all who do the same. Raises StateError.
    """
    mapping = memory.mapping
    try:
        for start, size in holes:
            mapping.discard(start, size)
        if not isinstance(mapping, CopiedMapping):
            fill(memory, changes, ranges)
            return
        with changes.open("rb", buffering=0) as file:
            # Pages beyond a file's end are SIGBUS.
            if (size_bytes := os.fstat(file.fileno()).st_size) != mapping.size_bytes:
                raise StateError(f"snapshot: {changes}: {size_bytes} bytes, expected {mapping.size_bytes}")
            for start, size in ranges:
                mapping.merge(start, size, file.fileno(), start)
    except OSError as error:
        raise StateError(f"snapshot: {changes}: {error.strerror or error}") from error


def copy_data(source: int, target: int) -> None:
    """Copy a file's data, leaving out pages of zeroes. Raises OSError."""
    for start, size in data_extents(source):
        for at in range(start, start + size, STEP_BYTES):
            write_step(target, at, os.pread(source, min(STEP_BYTES, start + size - at), at))


def write_step(target: int, offset: int, data: bytes, *, over: bool = False) -> None:
    """Write some pages; those of zeroes are left as the holes they are, or made ones where something may be `over`."""
    if data == _ZEROES[: len(data)]:
        if over:
            punch_hole(target, offset, len(data))
        return
    for start, size, empty in _pages(data):
        if not empty:
            os.pwrite(target, data[start : start + size], offset + start)
        elif over:
            punch_hole(target, offset + start, size)


def _pages(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """Runs of pages that are zero, and that are not."""
    start, was = 0, data[:PAGE_BYTES] == _ZERO_PAGE
    for at in range(PAGE_BYTES, len(data), PAGE_BYTES):
        empty = data[at : at + PAGE_BYTES] == _ZERO_PAGE
        if empty is not was:
            yield start, at - start, was
            start, was = at, empty
    yield start, len(data) - start, was


def checksums(fd: int) -> dict[str, str]:
    """SHA-256 of each chunk of a file that has data in it, by the chunk's number. Raises OSError."""
    found: dict[str, str] = {}
    for number in chunks_with_data(fd):
        found[str(number)] = hashlib.sha256(os.pread(fd, CHUNK_BYTES, number * CHUNK_BYTES)).hexdigest()
    return found


def chunks_with_data(fd: int) -> Iterable[int]:
    """Numbers of the chunks that are not holes as a whole, in order."""
    last = -1
    for start, size in data_extents(fd):
        first = max(start // CHUNK_BYTES, last + 1)
        last = (start + size - 1) // CHUNK_BYTES
        yield from range(first, last + 1)


def read_ranges(path: Path, limit_bytes: int) -> list[tuple[int, int]]:
    """The ranges an incremental image has. Raises StateError."""
    try:
        if path.stat().st_size > MAX_RANGES * RANGE.size:
            raise StateError(f"snapshot: {path}: expected at most {MAX_RANGES} ranges")
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"snapshot: {path}: {error.strerror}") from error
    if len(data) % RANGE.size:
        raise StateError(f"snapshot: {path}: {len(data)} bytes, expected a multiple of {RANGE.size}")
    found = [*RANGE.iter_unpack(data)]
    for start, size in found:
        if start % PAGE_BYTES or size % PAGE_BYTES or start + size > limit_bytes:
            raise StateError(f"snapshot: {path}: range {start:#x}+{size:#x} lies outside of the guest's memory")
    return found


def fill(memory: GuestMemory, image: Path, ranges: list[tuple[int, int]]) -> None:
    """Put the ranges of an incremental image over memory that began with its parent's. Raises StateError."""
    view = memory.whole
    try:
        with image.open("rb", buffering=0) as file, contextlib.ExitStack() as stack:
            for start, size in ranges:
                part = stack.enter_context(view[start : start + size])
                if os.preadv(file.fileno(), [part], start) != size:
                    raise StateError(f"snapshot: {image}: ends before {start + size:#x}")
                part.release()
    except OSError as error:
        raise StateError(f"snapshot: {image}: {error.strerror}") from error

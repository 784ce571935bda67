"""Batches of pages as they travel: runs of addresses first, then their content, plain or compressed.

A batch names at most 256 pages. What is decompressed is bounded by the pages it names, whatever the compressed data
claims.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from backports import zstd

from ostler.errors import MigrationError
from ostler.migration.wire import (
    BATCH,
    DISK_PART,
    MAX_BATCH_PAGES,
    MAX_DISK_BYTES,
    MAX_DISK_PART_BYTES,
    MAX_DISKS,
    MAX_GPA,
    PAGE_BYTES,
    RUN,
    Encoding,
    Kind,
    header,
)  # fmt: skip

ZERO_PAGE = bytes(PAGE_BYTES)
_ZERO_HEAD = bytes(64)
# Compressed at the fastest level: the link is what it has to keep up with.
ZLIB_LEVEL, ZSTD_LEVEL = 1, 1
COMPRESSIONS = {"none": Encoding.RAW, "zlib": Encoding.ZLIB, "zstd": Encoding.ZSTD}

Run = tuple[int, int]
"""Guest-physical address and number of pages."""


class Views(Protocol):
    """The part of guest memory that is needed here."""

    def view(self, gpa: int, size_bytes: int) -> memoryview:
        """Writable bytes; raises MemoryFault outside of memory."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Pages as received: the runs, and their content in the same order (empty where all of it is zero)."""

    runs: tuple[Run, ...]
    content: memoryview

    def parts(self) -> Iterator[tuple[int, memoryview]]:
        """Address and content, run by run."""
        at = 0
        for gpa, count in self.runs:
            yield gpa, self.content[at : at + count * PAGE_BYTES]
            at += count * PAGE_BYTES


def batches(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Cut runs into batches of at most 256 pages."""
    batch: list[Run] = []
    room = MAX_BATCH_PAGES
    for gpa, count in runs:
        while count:
            taken = min(count, room)
            batch.append((gpa, taken))
            gpa, count, room = gpa + taken * PAGE_BYTES, count - taken, room - taken
            if not room:
                yield batch
                batch, room = [], MAX_BATCH_PAGES
    if batch:
        yield batch


def split_zero(memory: Views, runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Runs with content, and runs of nothing but zeroes."""
    full: list[Run] = []
    zero: list[Run] = []
    for gpa, count in runs:
        view = memory.view(gpa, count * PAGE_BYTES)
        for page in range(count):
            at = page * PAGE_BYTES
            # Nearly every page with content shows it at its start or costs one comparison.
            is_zero = view[at : at + 64] == _ZERO_HEAD and bytes(view[at : at + PAGE_BYTES]) == ZERO_PAGE
            kept = zero if is_zero else full
            here = gpa + at
            if kept and kept[-1][0] + kept[-1][1] * PAGE_BYTES == here:
                kept[-1] = (kept[-1][0], kept[-1][1] + 1)
            else:
                kept.append((here, 1))
    return full, zero


def pack_batch(memory: Views, runs: Sequence[Run], encoding: Encoding) -> list[bytes | memoryview]:
    """A PAGES frame in parts, of which the content is guest memory itself where it is not compressed."""
    views = [memory.view(gpa, count * PAGE_BYTES) for gpa, count in runs] if encoding is not Encoding.ZERO else []
    content: list[bytes | memoryview] = list(views)
    size = sum(len(view) for view in views)
    if encoding in (Encoding.ZLIB, Encoding.ZSTD):
        packed = compress(b"".join(views), encoding)
        if len(packed) < size:
            content, size = [packed], len(packed)
        else:
            encoding = Encoding.RAW
    head = BATCH.pack(encoding, 0, len(runs), size) + b"".join(RUN.pack(gpa, count) for gpa, count in runs)
    return [header(Kind.PAGES, len(head) + size) + head, *content]


def parse_batch(payload: memoryview, *, allowed: Callable[[int, int], bool]) -> Batch:
    """Judge a PAGES frame; `allowed` says whether a range is memory of the guest. Raises MigrationError."""
    if len(payload) < BATCH.size:
        raise MigrationError(f"migration: PAGES of {len(payload)} bytes")
    number, zero, run_count, size = BATCH.unpack_from(payload)
    start = BATCH.size + run_count * RUN.size
    if zero or run_count > MAX_BATCH_PAGES or len(payload) != start + size:
        raise MigrationError(f"migration: PAGES with {run_count} runs and {size} bytes in {len(payload)}")
    runs = tuple(RUN.iter_unpack(payload[BATCH.size : start]))
    pages = 0
    for gpa, count in runs:
        pages += count
        if gpa % PAGE_BYTES or not 0 < count <= MAX_BATCH_PAGES or gpa >= MAX_GPA or pages > MAX_BATCH_PAGES:
            raise MigrationError(f"migration: PAGES names {count} pages at {gpa:#x}")
        if not allowed(gpa, count * PAGE_BYTES):
            raise MigrationError(f"migration: PAGES names {count} pages at {gpa:#x}, which the guest has not got")
    return Batch(runs, _content(number, payload[start:], pages * PAGE_BYTES))


@dataclass(frozen=True, slots=True)
class DiskPart:
    """A part of a disk: its content, or nothing where it is zero."""

    disk: int
    offset: int
    size_bytes: int
    content: memoryview


def pack_disk_part(disk: int, offset: int, content: bytes | memoryview, encoding: Encoding) -> bytes:
    """A DISK frame."""
    size = len(content)
    packed: bytes | memoryview = content
    if content == bytes(size):
        encoding, packed = Encoding.ZERO, b""
    elif encoding in (Encoding.ZLIB, Encoding.ZSTD):
        packed = compress(bytes(content), encoding)
        if len(packed) >= size:
            encoding, packed = Encoding.RAW, content
    head = DISK_PART.pack(disk, encoding, 0, len(packed), offset, size)
    return header(Kind.DISK, len(head) + len(packed)) + head + bytes(packed)


def parse_disk_part(payload: memoryview) -> DiskPart:
    """Judge a DISK frame; whether there is such a disk, and of that size, is the caller's to see. Raises
    MigrationError."""
    if len(payload) < DISK_PART.size:
        raise MigrationError(f"migration: DISK of {len(payload)} bytes")
    disk, number, zero, packed, offset, size = DISK_PART.unpack_from(payload)
    if zero or len(payload) != DISK_PART.size + packed or disk >= MAX_DISKS:
        raise MigrationError(f"migration: DISK for disk {disk} with {packed} bytes in {len(payload)}")
    if not 0 < size <= MAX_DISK_PART_BYTES or offset + size > MAX_DISK_BYTES:
        raise MigrationError(f"migration: DISK names {size} bytes at {offset}")
    return DiskPart(disk, offset, size, _content(number, payload[DISK_PART.size :], size))


def compress(data: bytes, encoding: Encoding) -> bytes:
    """By the encoding's own way."""
    return zlib.compress(data, ZLIB_LEVEL) if encoding is Encoding.ZLIB else zstd.compress(data, ZSTD_LEVEL)


def _content(number: int, packed: memoryview, size: int) -> memoryview:
    """What `size` bytes were packed as; empty for zeroes."""
    try:
        encoding = Encoding(number)
    except ValueError:
        raise MigrationError(f"migration: content in unknown encoding {number}") from None
    if encoding is Encoding.ZERO and not packed:
        return memoryview(b"")
    if encoding is Encoding.RAW:
        found = packed
    elif encoding is Encoding.ZLIB:
        found = memoryview(_unzlib(packed, size))
    elif encoding is Encoding.ZSTD:
        found = memoryview(_unzstd(packed, size))
    else:
        raise MigrationError(f"migration: zeroes with {len(packed)} bytes of content")
    if len(found) != size:
        raise MigrationError(f"migration: content of {len(found)} bytes, expected {size}")
    return found


def _unzlib(packed: memoryview, size: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(packed, size + 1)
    except zlib.error as error:
        raise MigrationError(f"migration: compressed content is damaged: {error}") from None
    if not unpacker.eof or unpacker.unused_data:
        raise MigrationError(f"migration: compressed content is not {size} bytes")
    return data


def _unzstd(packed: memoryview, size: int) -> bytes:
    # A window is memory that the sender chooses: 8 MiB is the format's own recommendation.
    unpacker = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: 23})
    try:
        data = unpacker.decompress(packed, size + 1)
    except (zstd.ZstdError, ValueError) as error:
        raise MigrationError(f"migration: compressed content is damaged: {error}") from None
    if not unpacker.eof or unpacker.unused_data:
        raise MigrationError(f"migration: compressed content is not {size} bytes")
    return data

"""The bytes of a migration. What a peer sends is bounded before it is allocated, and judged before it is used.

A connection opens with a preamble in the clear, 32 bytes, so that the listener can hand it to the right process:

    0   8   b"OSTLMIG" and the version of the preamble
    8   16  the migration's number, random; it routes, it proves nothing
    24  4   which stream this is: 0 for the one that speaks, 1 and up for those that only carry pages
    28  4   what it wants: 0 to migrate, 1 to ask what has become of that migration

then TLS where it was asked for, then frames of `type, flags, 0, length` (8 bytes, little-endian) and a payload:

    source                         target
    HELLO ------------------------>            versions, capabilities, the guest's specification
                <------------------ WELCOME    or REFUSE, with why
    STREAM (on each further one) ->            the secret that WELCOME gave
    PAGES, DISK, ROUND ----------->            memory round by round; the guest runs on at the source
      ~ the guest stops ~
    PAGES, DISK, STATE ----------->
    FINAL (on every stream) ------>            on stream 0 whether the guest had been paused by somebody
                <------------------ READY      everything is here, and the machine has taken it
    COMMIT ----------------------->            from here on the guest is the target's
                <------------------ RUNNING
    FRAME, DONE ------------------>            what networks still brought to where the guest was
    post-copy: MISSING and ROUND, which is answered by ROUND, before the guest stops, MISSING once more before FINAL;
    on a stream of its own the target WANTs pages, the source sends PAGES, and at last DONE

CANCEL comes from the source at any time before COMMIT, FAILED from the target before READY.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from ostler.errors import MigrationError

MAGIC = b"OSTLMIG\x01"
VERSION, OLDEST_VERSION = 1, 1
SESSION_BYTES, SECRET_BYTES = 16, 32
PAGE_BYTES = 4096
MAX_BATCH_PAGES = 256
MAX_STREAMS = 16
# The stream of post-copy, beside those that carry memory before.
POST_COPY_STREAM = MAX_STREAMS - 1
MAX_STATE_BYTES = 64 << 20
STATE_CHUNK_BYTES = 1 << 20
MAX_GPA = 1 << 46
MAX_DISKS = 64
MAX_DISK_BYTES = 1 << 50
MAX_DISK_PART_BYTES = 1 << 20

PREAMBLE = struct.Struct("<8s16sII")
HEADER = struct.Struct("<BBHI")
BATCH = struct.Struct("<BBHI")
RUN = struct.Struct("<QI")
DISK_PART = struct.Struct("<HBBIQQ")
ROUND_NUMBER = struct.Struct("<I")
CARD = struct.Struct("<H")
# The longest that a TAP interface gives: a header and 64 KiB of one packet.
MAX_FRAME_BYTES = 128 << 10
WANTED = struct.Struct("<Q")


class Purpose(IntEnum):
    """What a connection is for."""

    MIGRATE = 0
    ASK = 1


class Kind(IntEnum):
    """Types of frames."""

    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    STREAM = 4
    ROUND = 5
    PAGES = 6
    DISK = 7
    STATE = 8
    MISSING = 9
    FINAL = 10
    READY = 11
    COMMIT = 12
    RUNNING = 13
    CANCEL = 14
    FAILED = 15
    WANT = 16
    DONE = 17
    ABORT = 18
    FATE = 19
    FRAME = 20


class Encoding(IntEnum):
    """How the content of a batch or of a disk's part is written."""

    RAW = 0
    ZERO = 1
    ZLIB = 2
    ZSTD = 3


# A type's longest payload. Post-copy's list of missing pages is a bitmap of the guest's whole memory, compressed.
LIMITS = {
    Kind.HELLO: 1 << 20, Kind.WELCOME: 4096, Kind.REFUSE: 4096, Kind.STREAM: 4096, Kind.ROUND: ROUND_NUMBER.size,
    Kind.PAGES: BATCH.size + MAX_BATCH_PAGES * (RUN.size + PAGE_BYTES) + 4096,
    Kind.DISK: DISK_PART.size + MAX_DISK_PART_BYTES + 4096, Kind.STATE: STATE_CHUNK_BYTES, Kind.MISSING: 32 << 20,
    Kind.FINAL: 4096, Kind.READY: 0, Kind.COMMIT: 0, Kind.RUNNING: 0, Kind.CANCEL: 4096, Kind.FAILED: 4096,
    Kind.WANT: WANTED.size * 512, Kind.DONE: 0, Kind.ABORT: 4096, Kind.FATE: 4096,
    Kind.FRAME: CARD.size + MAX_FRAME_BYTES,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole frame."""

    kind: Kind
    payload: bytes | bytearray | memoryview = b""


@dataclass(frozen=True, slots=True)
class Preamble:
    """What a connection says of itself."""

    session: bytes
    stream: int
    purpose: Purpose


def pack_preamble(session: bytes, stream: int, purpose: Purpose) -> bytes:
    return PREAMBLE.pack(MAGIC, session, stream, purpose)


def parse_preamble(data: bytes) -> Preamble:
    """Raises MigrationError."""
    if len(data) != PREAMBLE.size:
        raise MigrationError(f"migration: a connection of {len(data)} bytes, expected a preamble of {PREAMBLE.size}")
    magic, session, stream, purpose = PREAMBLE.unpack(data)
    if magic[:7] != MAGIC[:7]:
        raise MigrationError("migration: a connection that does not speak Ostler's migration protocol")
    if magic != MAGIC:
        raise MigrationError(f"migration: preamble of version {magic[7]}, expected {MAGIC[7]}")
    if stream >= MAX_STREAMS or purpose not in Purpose.__members__.values():
        raise MigrationError(f"migration: stream {stream} with purpose {purpose}, expected fewer than {MAX_STREAMS}")
    return Preamble(session, stream, Purpose(purpose))


def header(kind: Kind, size_bytes: int) -> bytes:
    return HEADER.pack(kind, 0, 0, size_bytes)


def pack(kind: Kind, payload: bytes = b"") -> bytes:
    """A whole frame as bytes; for the small ones."""
    return header(kind, len(payload)) + payload


def pack_json(kind: Kind, value: dict[str, Any]) -> bytes:
    return pack(kind, json.dumps(value, separators=(",", ":")).encode())


def parse_header(data: bytes | bytearray | memoryview) -> tuple[Kind, int]:
    """A frame's type and the length of its payload, within its bounds. Raises MigrationError."""
    number, flags, zero, size_bytes = HEADER.unpack(data)
    try:
        kind = Kind(number)
    except ValueError:
        raise MigrationError(f"migration: frame of unknown type {number}") from None
    if flags or zero:
        raise MigrationError(f"migration: {kind.name} with flags {flags:#x} {zero:#x}, expected none")
    if size_bytes > LIMITS[kind]:
        raise MigrationError(f"migration: {kind.name} of {size_bytes} bytes, expected at most {LIMITS[kind]}")
    return kind, size_bytes


def parse_json(frame: Frame) -> dict[str, Any]:
    """The object in a frame. Raises MigrationError."""
    try:
        value = json.loads(bytes(frame.payload))
    except (ValueError, RecursionError) as error:
        raise MigrationError(f"migration: {frame.kind.name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise MigrationError(f"migration: {frame.kind.name} is a JSON {type(value).__name__}, expected an object")
    return value


class Decoder:
    """Cuts a stream of bytes into frames; holds at most one frame that is not whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> None:
        self._buffer += data

    def next(self) -> Frame | None:
        """The next whole frame, or None. Raises MigrationError."""
        if len(self._buffer) < HEADER.size:
            return None
        kind, size_bytes = parse_header(self._buffer[: HEADER.size])
        if len(self._buffer) < HEADER.size + size_bytes:
            return None
        payload = bytes(self._buffer[HEADER.size : HEADER.size + size_bytes])
        del self._buffer[: HEADER.size + size_bytes]
        return Frame(kind, payload)

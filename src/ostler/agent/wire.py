"""Frames of the agent's protocol: docs/agent-protocol.md, "Frames"; the twin of the agent's wire.rs.

A frame is eight bytes of head and at most `MAX_PAYLOAD` bytes. Left out on purpose: what may be sent when, and what
answers mean; that is `protocol.py`.
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ostler.errors import AgentProtocolError, refused

HEADER = struct.Struct("<IBBH")
"""Payload length, kind, stream, zero."""
MAX_PAYLOAD = 64 * 1024

STDIN, STDOUT, STDERR = 0, 1, 2
CONTENT = 1
"""The stream of a copy out of the guest; a copy into it uses STDIN."""


class Kind(enum.IntEnum):
    """What a frame is. The number is on the wire and never reused."""

    HELLO = 1
    REQUEST = 2
    REPLY = 3
    ERROR = 4
    DATA = 5
    WINDOW = 6
    SIGNAL = 7
    RESIZE = 8
    EXIT = 9
    ENTRY = 10
    END = 11


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it is on the wire."""

    kind: Kind
    payload: bytes = b""
    stream: int = 0


def encode(kind: Kind, payload: bytes = b"", stream: int = 0) -> bytes:
    """Return one frame. Raises ValueError beyond MAX_PAYLOAD: the caller splits data, and bounds requests."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"frame of {len(payload)} bytes: expected at most {MAX_PAYLOAD}")
    return HEADER.pack(len(payload), kind, stream, 0) + payload


def encode_json(kind: Kind, value: Mapping[str, Any]) -> bytes:
    """Return a frame whose payload is JSON; names that are no UTF-8 go as the bytes they are."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    payload = text.encode("utf-8", "surrogateescape")
    if len(payload) > MAX_PAYLOAD:
        raise refused("too-long", f"request of {len(payload)} bytes: expected at most {MAX_PAYLOAD}")
    return encode(kind, payload)


def decode_json(payload: bytes) -> dict[str, Any]:
    """Return the JSON object in `payload`. Raises AgentProtocolError."""
    try:
        value = json.loads(payload.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise AgentProtocolError(f"agent sent {payload[:40]!r}: expected a JSON object") from error
    if not isinstance(value, dict):
        raise AgentProtocolError(f"agent sent JSON {str(value)[:40]!r}: expected an object")
    return value


class Decoder:
    """Frames out of a stream of bytes. Holds less than one frame between calls."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield every frame that is whole now. Raises AgentProtocolError."""
        self._buffer += data
        at = 0
        try:
            while len(self._buffer) - at >= HEADER.size:
                length, kind, stream, zero = HEADER.unpack_from(self._buffer, at)
                if length > MAX_PAYLOAD or zero or kind not in _KINDS:
                    head = bytes(self._buffer[at : at + HEADER.size])
                    raise AgentProtocolError(f"agent sent {head.hex(' ')}: expected the head of a frame")
                end = at + HEADER.size + length
                if len(self._buffer) < end:
                    return
                payload = bytes(self._buffer[at + HEADER.size : end])
                at = end
                yield Frame(Kind(kind), payload, stream)
        finally:
            del self._buffer[:at]

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that is not whole yet."""
        return len(self._buffer)


_KINDS = frozenset(int(kind) for kind in Kind)


def content(data: bytes) -> bytes:
    """Return DATA frames towards the guest; no data is the end of the stream or of the file."""
    if not data:
        return encode(Kind.DATA, b"", STDIN)
    step = MAX_PAYLOAD
    return b"".join(encode(Kind.DATA, data[at : at + step], STDIN) for at in range(0, len(data), step))


def entry(value: Mapping[str, Any]) -> bytes:
    """Return the head of a file, folder or link that goes into the guest."""
    return encode_json(Kind.ENTRY, value)


def end() -> bytes:
    """Return the frame after the last entry of a tree."""
    return encode(Kind.END)


def signal(number: int) -> bytes:
    """Return the frame that signals a command's process group."""
    return encode_json(Kind.SIGNAL, {"signal": number})


def resize(rows: int, columns: int) -> bytes:
    """Return the frame that tells a command's terminal its size, in characters."""
    return encode_json(Kind.RESIZE, {"rows": rows, "columns": columns})

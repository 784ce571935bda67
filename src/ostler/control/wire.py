"""The control protocol's bytes: one JSON object per line, both ways. Without I/O; see docs/control-protocol.md.

The first line of every connection is the server's hello with the protocol's version. A line is bounded: whoever sends
a longer one, or something that is no JSON object, is not spoken to any more.
"""

from __future__ import annotations

import json
from typing import Any

from ostler import errors

VERSION = 1
MAX_LINE_BYTES = 1 << 20
Message = dict[str, Any]


class WireError(Exception):
    """The other side does not speak the protocol: the connection is of no use any more."""


def encode(message: Message) -> bytes:
    """One line. JSON escapes line ends, so a message cannot contain one."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Decoder:
    """Cuts a byte stream into messages; keeps what is not whole yet, at most `MAX_LINE_BYTES`."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._buffer += data

    def next(self) -> Message | None:
        """Take the next whole message, or None. Raises WireError."""
        end = self._buffer.find(b"\n", 0, MAX_LINE_BYTES)
        if end < 0:
            if len(self._buffer) >= MAX_LINE_BYTES:
                raise WireError(f"line of more than {MAX_LINE_BYTES} bytes")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise WireError(f"line is not JSON: {error}") from error
        if not isinstance(message, dict):
            raise WireError(f"line is a JSON {type(message).__name__}, expected an object")
        return message

    def rest(self) -> bytes:
        """Take what has come after the last message: where the stream changes from lines to a console's bytes."""
        taken = bytes(self._buffer)
        self._buffer.clear()
        return taken


def pack_error(error: Exception) -> Message:
    """An exception as the protocol carries it: its class by name, its one line, its details."""
    packed: Message = {"kind": type(error).__name__, "message": " ".join(str(error).split())}
    if details := getattr(error, "details", ""):
        packed["details"] = details
    return packed


def unpack_error(packed: Message) -> errors.OstlerError:
    """The exception of the same class again; of one that is unknown here, the nearest known one."""
    kind = getattr(errors, str(packed.get("kind")), None)
    message = str(packed.get("message", "no message"))
    if not (isinstance(kind, type) and issubclass(kind, errors.OstlerError)):
        return errors.HostError(message)
    if issubclass(kind, errors.GuestCrash):
        return kind(message, details=str(packed.get("details", "")))
    return kind(message)

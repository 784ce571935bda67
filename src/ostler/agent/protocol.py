"""The agent's protocol, host side, without I/O: bytes in, events out. docs/agent-protocol.md is the specification.

Two laws hold it together:

1. A connection carries one request at a time: `request`, then whatever that operation exchanges, then exactly one end
   (REPLY, ERROR or, for a command, EXIT). After it the connection is idle and may carry another.
2. The guest is not trusted. A frame that is too long, of a kind this version does not know, out of turn, or beyond the
   room the host announced ends the conversation with AgentProtocolError; nothing the guest sends is kept beyond the
   windows below and one frame.

Left out on purpose: sockets, waiting and time (client.py, aio.py), files (tree.py).
"""

from __future__ import annotations

import enum
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ostler.errors import AgentProtocolError, AgentRefused, refused

PROTOCOL = "ostler-agent"
VERSION = 1
OLDEST_VERSION = 1
VSOCK_PORT = 1024
CONSOLE_PORT = "org.ostler.agent"

HEADER = struct.Struct("<IBBH")
"""Payload length, kind, stream, zero."""
MAX_PAYLOAD = 64 * 1024
WINDOW_BYTES = 256 * 1024
"""How much of one stream may be under way before its reader makes room, at the start of a command."""
MAX_TEXT = 4096
"""Characters of a message of the guest's that are shown to a person."""

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


@dataclass(frozen=True, slots=True)
class Hello:
    """The agent answered; `features` are the operations it knows, `trouble` why the guest has no root file system."""

    version: int
    agent: str
    features: frozenset[str]
    trouble: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The operation succeeded; for a command: it runs, and EXIT will follow."""

    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failed:
    """The agent could not do it."""

    error: AgentRefused


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of a stream; none at all is its end."""

    stream: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Room:
    """The guest takes `size_bytes` more of standard input."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Exited:
    """The command ended: `code`, or `signal` that killed it; `timed_out` where the agent did."""

    code: int | None
    signal: int | None
    timed_out: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """The head of one file, folder or link of a tree under way; a file's content follows as Data."""

    value: dict[str, Any]


Event = Hello | Reply | Failed | Data | Room | Exited | Entry


class Phase(enum.Enum):
    """Whose turn it is."""

    HELLO = "before the agent's greeting"
    IDLE = "between requests"
    WAITING = "waiting for a reply"
    RUNNING = "running a command"
    RECEIVING = "receiving a tree"
    BROKEN = "after an error of the protocol"


_ALLOWED = {
    Phase.HELLO: {Kind.HELLO, Kind.ERROR},
    Phase.IDLE: set[Kind](),
    Phase.WAITING: {Kind.REPLY, Kind.ERROR},
    Phase.RUNNING: {Kind.DATA, Kind.WINDOW, Kind.EXIT, Kind.ERROR},
    Phase.RECEIVING: {Kind.ENTRY, Kind.DATA, Kind.REPLY, Kind.ERROR},
    Phase.BROKEN: set[Kind](),
}


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


class Conversation:
    """The host's end of one connection: what may be sent and received when."""

    def __init__(self) -> None:
        self.phase = Phase.HELLO
        self._decoder = Decoder()
        self._operation = ""
        self._owed = {STDOUT: 0, STDERR: 0}  # bytes the guest may still send, by stream
        self._open: set[int] = set()
        self.stdin_room = 0

    def hello(self) -> bytes:
        """Return the host's greeting, the first bytes of a connection."""
        return encode_json(Kind.HELLO, {"protocol": PROTOCOL, "versions": [OLDEST_VERSION, VERSION]})

    def request(self, operation: str, arguments: Mapping[str, Any] | None = None) -> bytes:
        """Return the frame that asks for `operation`. It may be sent right after `hello`, without an answer."""
        if self.phase not in {Phase.HELLO, Phase.IDLE} or self._operation:
            raise RuntimeError(f"request {operation!r} {self.phase.value}")
        frame = encode_json(Kind.REQUEST, {**(arguments or {}), "op": operation})
        self._operation = operation
        self._owed = {STDOUT: WINDOW_BYTES, STDERR: WINDOW_BYTES}
        self._open = {STDOUT, STDERR}
        self.stdin_room = WINDOW_BYTES
        if self.phase is Phase.IDLE:
            self.phase = self._first_phase()
        return frame

    def stdin(self, data: bytes) -> bytes:
        """Return frames of standard input; no data is its end. The caller sends at most `stdin_room` bytes."""
        if len(data) > self.stdin_room:
            raise ValueError(f"{len(data)} bytes of standard input: the guest has room for {self.stdin_room}")
        self.stdin_room -= len(data)
        return content(data)

    def make_room(self, stream: int, size_bytes: int) -> bytes:
        """Return the frame that lets the guest send `size_bytes` more of `stream`, because they have been consumed."""
        if self.phase is not Phase.RUNNING or not size_bytes:
            return b""
        self._owed[stream] += size_bytes
        return encode(Kind.WINDOW, struct.pack("<I", size_bytes), stream)

    def receive(self, data: bytes) -> Iterator[Event]:
        """Yield what the guest said. Raises AgentProtocolError, after which the connection is of no use."""
        try:
            for frame in self._decoder.feed(data):
                if frame.kind not in _ALLOWED[self.phase]:
                    raise AgentProtocolError(f"agent sent {frame.kind.name} {self.phase.value}")
                yield self._event(frame)
        except AgentProtocolError:
            self.phase = Phase.BROKEN
            raise

    def _event(self, frame: Frame) -> Event:
        match frame.kind:
            case Kind.HELLO:
                return self._hello(decode_json(frame.payload))
            case Kind.ERROR:
                self._finish()
                return Failed(_refusal(decode_json(frame.payload)))
            case Kind.REPLY:
                return self._reply(decode_json(frame.payload))
            case Kind.DATA:
                return self._data(frame)
            case Kind.WINDOW:
                return self._window(frame)
            case Kind.EXIT:
                return self._exit(decode_json(frame.payload))
            case _:  # ENTRY: the table above lets nothing else through
                return Entry(decode_json(frame.payload))

    def _first_phase(self) -> Phase:
        if not self._operation:
            return Phase.IDLE
        return Phase.RECEIVING if self._operation == "get" else Phase.WAITING

    def _finish(self) -> None:
        self._operation = ""
        self.phase = Phase.IDLE

    def _hello(self, value: dict[str, Any]) -> Hello:
        version, agent, features = value.get("version"), value.get("agent"), value.get("features")
        if value.get("protocol") != PROTOCOL or not isinstance(features, list) or not isinstance(agent, str):
            raise AgentProtocolError(f"agent sent {str(value)[:80]!r}: expected the greeting of {PROTOCOL}")
        if not isinstance(version, int) or not OLDEST_VERSION <= version <= VERSION:
            raise AgentProtocolError(f"agent speaks version {version!r}: expected {OLDEST_VERSION} to {VERSION}")
        self.phase = self._first_phase()
        trouble = value.get("trouble")
        shown = _printable(trouble) if isinstance(trouble, str) else None
        return Hello(version, agent[:MAX_TEXT], frozenset(str(name)[:64] for name in features), shown)

    def _reply(self, value: dict[str, Any]) -> Reply:
        if self._operation == "exec":
            self.phase = Phase.RUNNING
        else:
            self._finish()
        return Reply(value)

    def _data(self, frame: Frame) -> Data:
        stream = frame.stream
        if self.phase is Phase.RECEIVING:
            if stream != CONTENT:
                raise AgentProtocolError(f"agent sent stream {stream}: expected {CONTENT}")
            return Data(stream, frame.payload)
        if stream not in self._open:
            raise AgentProtocolError(f"agent sent stream {stream}, which is not open")
        if len(frame.payload) > self._owed[stream]:
            raise AgentProtocolError(f"agent sent {len(frame.payload)} bytes: room was for {self._owed[stream]}")
        self._owed[stream] -= len(frame.payload)
        if not frame.payload:
            self._open.discard(stream)
        return Data(stream, frame.payload)

    def _window(self, frame: Frame) -> Room:
        if frame.stream != STDIN or len(frame.payload) != 4:
            raise AgentProtocolError("agent sent a WINDOW that is not for standard input")
        (size_bytes,) = struct.unpack("<I", frame.payload)
        if self.stdin_room + size_bytes > WINDOW_BYTES:
            raise AgentProtocolError(f"agent announced room for {size_bytes} bytes it did not take")
        self.stdin_room += size_bytes
        return Room(size_bytes)

    def _exit(self, value: dict[str, Any]) -> Exited:
        code, signal = value.get("code"), value.get("signal")
        if not (_is_number(code, 255) and signal is None) and not (_is_number(signal, 64) and code is None):
            raise AgentProtocolError(f"agent sent exit {str(value)[:80]!r}: expected a code or a signal")
        self._finish()
        return Exited(code, signal, value.get("timed_out") is True)


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


def _is_number(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _refusal(value: dict[str, Any]) -> AgentRefused:
    code, message = value.get("code"), value.get("message")
    if not isinstance(code, str) or not isinstance(message, str):
        raise AgentProtocolError(f"agent sent an error {str(value)[:80]!r}: expected code and message")
    return refused(code[:64], _printable(message))


def _printable(text: str) -> str:
    """Return a guest's words as they may be shown on a terminal."""
    return "".join(sign if sign.isprintable() else "?" for sign in text[:MAX_TEXT])

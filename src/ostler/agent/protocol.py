"""The agent's protocol, host side, without I/O: bytes in, events out. docs/agent-protocol.md is the specification.

Two laws hold it together:

1. A connection carries one request at a time: `request`, then whatever that operation exchanges, then exactly one end
   (REPLY, ERROR or, for a command, EXIT). After it the connection is idle and may carry another.
2. The guest is not trusted. A frame that is too long, of a kind this version does not know, out of turn, or beyond the
   room the host announced ends the conversation with AgentProtocolError; nothing the guest sends is kept beyond the
   windows below and one frame.

Left out on purpose: frames as bytes (wire.py); sockets, waiting and time (client.py, aio.py); files (copy_in.py,
copy_out.py).
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ostler.agent.wire import (
    CONTENT,
    STDERR,
    STDIN,
    STDOUT,
    Decoder,
    Frame,
    Kind,
    content,
    decode_json,
    encode,
    encode_json,
)
from ostler.errors import AgentProtocolError, AgentRefused, refused

PROTOCOL = "ostler-agent"
VERSION = 1
OLDEST_VERSION = 1
VSOCK_PORT = 1024
CONSOLE_PORT = "org.ostler.agent"

WINDOW_BYTES = 256 * 1024
"""How much of one stream may be under way before its reader makes room, at the start of a command."""
MAX_TEXT = 4096
"""Characters of a message of the guest's that are shown to a person."""


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


_CONVERSED = frozenset({"exec", "put", "get"})


class Conversation:
    """The host's end of one connection: what may be sent and received when."""

    def __init__(self) -> None:
        self.phase = Phase.HELLO
        self._decoder = Decoder()
        self._operation = ""
        self._following: deque[str] = deque()
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

    def requests(self, wanted: Sequence[tuple[str, Mapping[str, Any]]]) -> bytes:
        """Return frames that ask for one operation after the other, each answered by one `Reply` or `Failed`, in order.

        Commands and trees are not among them: they have more to say.
        """
        if not wanted or not _CONVERSED.isdisjoint(operation for operation, _ in wanted):
            raise ValueError(f"requests {[operation for operation, _ in wanted]}: expected some with one answer each")
        first, *others = wanted
        frames = [self.request(*first)]
        frames += (encode_json(Kind.REQUEST, {**arguments, "op": operation}) for operation, arguments in others)
        self._following += (operation for operation, _ in others)
        return b"".join(frames)

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
        self._operation = self._following.popleft() if self._following else ""
        self.phase = self._first_phase()

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

"""What Ostler's own calls do: handlers with rights and rate limits, and the control protocol's side of them.

A handler runs in the thread of the processor that called, under the board's lock, so it only notes things down. What
takes long becomes a token that the guest asks after (`POLL`): a snapshot of itself, and calls that a client of the
control socket answers (numbers from 0x1000 on).
"""

from __future__ import annotations

import errno
import itertools
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ostler.control.wire import Message
from ostler.devices.calls import MAX_DATA_BYTES, VERSION
from ostler.errors import BadRequest
from ostler.vmm.run import GuestProcess
from ostler.vmm.server import Connection

if TYPE_CHECKING:
    from ostler.vmm.service import GuestService

PING, LOG, GET, PUT, DELETE, READY, SNAPSHOT, POLL = range(8)
FIRST_OWN = 0x1000
MAX_LINE, MAX_PENDING, MAX_SNAPSHOTS = 1024, 64, 16
SNAPSHOT_LIMIT_S = 600
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")

Answer = tuple[int, bytes]
Handler = Callable[[Sequence[int], bytes], Answer]


@dataclass(slots=True)
class Bucket:
    """So many calls a second in the long run, and so many at once."""

    rate_per_s: float
    burst: int
    clock: Callable[[], float] = time.monotonic
    _level: float = field(init=False)
    _at: float = field(init=False)

    def __post_init__(self) -> None:
        self._level, self._at = float(self.burst), self.clock()

    def take(self) -> bool:
        """Whether there is one left."""
        now = self.clock()
        self._level = min(self._level + (now - self._at) * self.rate_per_s, self.burst)
        self._at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


@dataclass(frozen=True, slots=True)
class Call:
    """One entry of the table; without a right everybody may, without a bucket as often as it likes."""

    serve: Handler
    right: str | None = None
    bucket: Bucket | None = None


@dataclass(slots=True)
class Pending:
    """A call whose result is still to come."""

    owner: Connection | None = None
    result: Answer | None = None


class CallService:
    """Adds `calls`, `calls-put`, `calls-serve` and `calls-answer` to the guest's service."""

    def __init__(self, process: GuestProcess, service: GuestService, name: str) -> None:
        self._process, self._service, self._name = process, service, name
        self._device = process.machine.calls
        self._rights = frozenset(process.machine.spec.calls)
        self._tokens = itertools.count(1)
        self._pending: OrderedDict[int, Pending] = OrderedDict()
        self._servers: dict[int, Connection] = {}
        self._snapshots = 0
        self.counts: dict[str, int] = {"served": 0, "refused": 0, "limited": 0}
        self._table: dict[int, Call] = {
            PING: Call(lambda _arguments, data: (VERSION, data)),
            LOG: Call(self._log, "log", Bucket(100, 200)),
            GET: Call(self._get, "keys", Bucket(5000, 5000)),
            PUT: Call(self._put, "keys", Bucket(1000, 1000)),
            DELETE: Call(self._delete, "keys", Bucket(1000, 1000)),
            READY: Call(self._ready, "ready", Bucket(10, 10)),
            SNAPSHOT: Call(self._snapshot, "snapshot", Bucket(0.1, 2)),
            POLL: Call(self._poll),
        }
        self._device.serve = self.serve
        service.add_operations({
            "calls": self._describe, "calls-put": self._put_by_host, "calls-serve": self._serve_by_host,
            "calls-answer": self._answer_by_host,
        })  # fmt: skip

    def register(self, number: int, call: Call) -> None:
        """Add a handler of one's own, in this process. Raises ValueError for a number that is taken."""
        if number in self._table:
            raise ValueError(f"call {number:#x} is taken")
        self._table[number] = call

    def serve(self, number: int, arguments: tuple[int, ...], data: bytes) -> Answer:
        """The device's side: errors are like a system call's."""
        call = self._table.get(number)
        if call is None:
            return -errno.ENOSYS, b""
        if call.right is not None and call.right not in self._rights:
            self.counts["refused"] += 1
            return -errno.EPERM, b""
        if call.bucket is not None and not call.bucket.take():
            self.counts["limited"] += 1
            return -errno.EAGAIN, b""
        self.counts["served"] += 1
        return call.serve(arguments, data)

    # -- what guests call ---------------------------------------------------------------------------

    def _log(self, _arguments: Sequence[int], data: bytes) -> Answer:
        if len(data) > MAX_LINE:
            return -errno.EMSGSIZE, b""
        text = "".join(each if each.isprintable() else "?" for each in data.decode("utf-8", "replace"))
        self._tell("call-log", text=text)
        return 0, b""

    def _get(self, _arguments: Sequence[int], data: bytes) -> Answer:
        value = self._device.keys.get(_text(data))
        if value is None:
            return -errno.ENOENT, b""
        found = value.encode()
        return (len(found), found) if len(found) <= MAX_DATA_BYTES else (-errno.EMSGSIZE, b"")

    def _put(self, _arguments: Sequence[int], data: bytes) -> Answer:
        key, separator, value = data.partition(b"\0")
        if not separator:
            return -errno.EINVAL, b""
        done = self._device.put(_text(key), _text(value))
        if not done:
            self._tell("call-key", key=_text(key), value=_text(value))
        return done, b""

    def _delete(self, _arguments: Sequence[int], data: bytes) -> Answer:
        return (0 if self._device.keys.pop(_text(data), None) is not None else -errno.ENOENT), b""

    def _ready(self, arguments: Sequence[int], _data: bytes) -> Answer:
        self._device.is_ready = arguments[0] == 0
        self._tell("ready", status=arguments[0] & 0xFFFF)
        return 0, b""

    def _snapshot(self, _arguments: Sequence[int], data: bytes) -> Answer:
        """Saved by the same command as for everybody else; the copy finds its token unknown, and so knows itself."""
        wanted = _text(data)
        if not _NAME.fullmatch(wanted):
            return -errno.EINVAL, b""
        if self._snapshots >= MAX_SNAPSHOTS:
            return -errno.ENOSPC, b""
        token = self._new_token(None)
        if token is None:
            return -errno.EBUSY, b""
        self._snapshots += 1
        name = f"{self._name}-{wanted}"
        threading.Thread(target=self._save, args=(token, name), name="own-snapshot", daemon=True).start()
        return token, b""

    def _save(self, token: int, name: str) -> None:
        command = [sys.executable, "-m", "ostler", "snapshot", "create", self._name, name]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=SNAPSHOT_LIMIT_S
            )
            result = 0 if done.returncode == 0 else -errno.EIO
            said = done.stderr.decode(errors="replace").strip()[-200:]
        except (OSError, subprocess.TimeoutExpired) as error:
            result, said = -errno.EIO, str(error)
        with self._process.lock:
            self._finish(token, (result, name.encode() if not result else said.encode()))
        self._tell("call-snapshot", name=name, status=-result, message=said if result else "")

    def _poll(self, arguments: Sequence[int], _data: bytes) -> Answer:
        pending = self._pending.get(arguments[0])
        if pending is None:
            return -errno.ESTALE, b""
        if pending.result is None:
            return -errno.EINPROGRESS, b""
        del self._pending[arguments[0]]
        return pending.result

    def _new_token(self, owner: Connection | None) -> int | None:
        """Results that nobody asks for make room."""
        if len(self._pending) >= MAX_PENDING:
            oldest = next((each for each, its in self._pending.items() if its.result is not None), None)
            if oldest is None:
                return None
            del self._pending[oldest]
        token = next(self._tokens)
        self._pending[token] = Pending(owner)
        return token

    def _finish(self, token: int, result: Answer) -> None:
        if token in self._pending:
            self._pending[token].result = result

    def _tell(self, event: str, **values: object) -> None:
        self._process.loop.call_soon(lambda: self._service.announce(event, **values))

    # -- the host's side ----------------------------------------------------------------------------

    def _describe(self, _connection: Connection, _number: object, _arguments: Message) -> Message:
        with self._process.lock:
            return {"ready": self._device.is_ready, "keys": dict(self._device.keys), "rights": sorted(self._rights),
                    "counts": dict(self.counts)}  # fmt: skip

    def _put_by_host(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        key, value = arguments.get("key"), arguments.get("value")
        if not isinstance(key, str) or not isinstance(value, str | None):
            raise BadRequest(f"key {key!r}: expected text, and a value of text or null")
        with self._process.lock:
            if value is None:
                self._device.keys.pop(key, None)
            elif done := self._device.put(key, value):
                raise BadRequest(f"key {key[:64]!r}: {errno.errorcode[-done]}: expected at most 256 keys and 64 KiB")
        return {}

    def _serve_by_host(self, connection: Connection, _number: object, arguments: Message) -> Message:
        """From now on this connection is told of calls of that number, and answers them."""
        number = arguments.get("call")
        if isinstance(number, bool) or not isinstance(number, int) or not FIRST_OWN <= number < 1 << 32:
            raise BadRequest(f"call {number!r}: expected a number from {FIRST_OWN:#x} on")
        known = self._servers.get(number)
        if known is not None and known.is_open:
            raise BadRequest(f"call {number:#x}: is served already")
        self._servers[number] = connection
        if number not in self._table:
            bucket = Bucket(200, 200)
            self._table[number] = Call(lambda given, data: self._forward(number, given, data), "own", bucket)
        connection.when_gone.append(lambda: self._gone(connection))
        return {}

    def _forward(self, number: int, arguments: Sequence[int], data: bytes) -> Answer:
        server = self._servers.get(number)
        if server is None:
            return -errno.ENOSYS, b""
        token = self._new_token(server)
        if token is None:
            return -errno.EBUSY, b""
        message = {"event": "call", "call": number, "token": token, "arguments": list(arguments), "data": data.hex()}
        self._process.loop.call_soon(lambda: server.send(message) if server.is_open else None)
        return token, b""

    def _answer_by_host(self, connection: Connection, _number: object, arguments: Message) -> Message:
        token, result = arguments.get("token"), arguments.get("result", 0)
        try:
            data = bytes.fromhex(str(arguments.get("data", "")))
        except ValueError as error:
            raise BadRequest(f"data: expected bytes in hexadecimal: {error}") from None
        if isinstance(result, bool) or not isinstance(result, int) or not -4096 < result < 1 << 62:
            raise BadRequest(f"result {result!r}: expected a number, or a negative errno")
        if len(data) > MAX_DATA_BYTES:
            raise BadRequest(f"data: {len(data)} bytes, expected at most {MAX_DATA_BYTES}")
        with self._process.lock:
            pending = self._pending.get(token) if isinstance(token, int) else None
            if pending is None or pending.owner is not connection:
                raise BadRequest(f"token {token!r}: expected one of a call that this connection serves")
            pending.result = (result, data)
        return {}

    def _gone(self, connection: Connection) -> None:
        """Whoever served has gone: what it has not answered fails."""
        with self._process.lock:
            self._servers = {number: each for number, each in self._servers.items() if each is not connection}
            for pending in self._pending.values():
                if pending.owner is connection and pending.result is None:
                    pending.result = (-errno.EPIPE, b"")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")

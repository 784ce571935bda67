"""Messages of vhost-user over a UNIX socket, descriptors beside them; docs/interop/vhost-user.rst of QEMU.

Requests are made one at a time and answered at once; a back end that takes longer than the time-out is lost. What it
answers is checked as anybody's input: version, request, size.
"""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import Sequence

from ostler.abi.virtio.vhost_user import HEADER, MAX_PAYLOAD_BYTES, NEED_REPLY, REPLY, U64, VERSION, Request
from ostler.errors import HostError

TIMEOUT_S = 10.0


class BackEndLost(HostError):
    """The program at the other end is gone, silent, or talks nonsense."""


class Channel:
    """Owns the connected socket."""

    def __init__(self, connected: socket.socket, name: str) -> None:
        self._socket = connected
        self._socket.settimeout(TIMEOUT_S)
        self._name = name
        self.acknowledged = False
        """Whether the back end negotiated to answer every request."""

    def fileno(self) -> int:
        """For watching whether the other end is still there."""
        return self._socket.fileno()

    def send(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request whose success is worth knowing; raises BackEndLost when it was not done."""
        self._send(request, payload, fds, NEED_REPLY if self.acknowledged else 0)
        if self.acknowledged and (status := self._unpack(request, U64)[0]):
            raise BackEndLost(f"{self._name}: {request.name} refused with {status}")

    def ask(self, request: Request, payload: bytes = b"") -> bytes:
        """A request that is answered by itself; returns the answer's payload."""
        self._send(request, payload, (), 0)
        return self._receive(request)

    def ask_u64(self, request: Request) -> int:
        """A request answered by one number."""
        self._send(request, b"", (), 0)
        return int(self._unpack(request, U64)[0])

    def close(self) -> None:
        """Closing twice is harmless."""
        self._socket.close()

    def _send(self, request: Request, payload: bytes, fds: Sequence[int], flags: int) -> None:
        data = HEADER.pack(request, VERSION | flags, len(payload)) + payload
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self._socket.sendmsg([data], beside)
            self._socket.sendall(data[sent:])
        except OSError as error:
            raise BackEndLost(f"{self._name}: {request.name}: {error.strerror or error}") from error

    def _receive(self, request: Request) -> bytes:
        answered, flags, size = HEADER.unpack(self._read(request, HEADER.size))
        if answered != request or flags & 3 != VERSION or not flags & REPLY or size > MAX_PAYLOAD_BYTES:
            raise BackEndLost(f"{self._name}: {request.name} answered by {answered}, flags {flags:#x}, {size} bytes")
        return self._read(request, size)

    def _unpack(self, request: Request, layout: struct.Struct) -> tuple[int, ...]:
        payload = self._receive(request)
        if len(payload) != layout.size:
            raise BackEndLost(f"{self._name}: {request.name} answered by {len(payload)} bytes, expected {layout.size}")
        return layout.unpack(payload)

    def _read(self, request: Request, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = self._socket.recv(size - len(data))
            except OSError as error:
                raise BackEndLost(f"{self._name}: {request.name}: {error.strerror or error}") from error
            if not more:
                raise BackEndLost(f"{self._name}: closed the connection at {request.name}")
            data += more
        return data

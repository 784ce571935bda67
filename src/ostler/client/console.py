"""A guest's serial console for programs: read, write, wait for a text."""

from __future__ import annotations

import re
import time
from types import TracebackType
from typing import Self

from ostler.control.connection import Console
from ostler.errors import GuestGone, HostError

RECEIVE_BYTES = 64 << 10
MAX_KEPT_BYTES = 8 << 20


class GuestConsole:
    """One attachment; a context manager."""

    def __init__(self, attached: Console) -> None:
        self._socket = attached.socket
        self._kept = bytearray(attached.backlog + attached.first)

    def write(self, data: bytes | str) -> None:
        """Type."""
        self._socket.settimeout(None)
        self._socket.sendall(data.encode() if isinstance(data, str) else data)

    def read(self, *, timeout_s: float | None = None) -> bytes:
        """What has been said since the last read, at least a byte; nothing at the guest's end.

        Raises HostError when nothing came within `timeout_s`.
        """
        if not self._kept and not self._receive(None if timeout_s is None else time.monotonic() + timeout_s):
            return b""
        data = bytes(self._kept)
        self._kept.clear()
        return data

    def expect(self, pattern: str | bytes, *, timeout_s: float = 60.0) -> re.Match[bytes]:
        """Wait for what the regular expression describes; everything up to its end counts as read.

        Raises HostError when it did not come within `timeout_s`, GuestGone when the guest ended without it.
        """
        compiled = re.compile(pattern.encode() if isinstance(pattern, str) else pattern)
        deadline = time.monotonic() + timeout_s
        while (found := compiled.search(bytes(self._kept))) is None:
            tail = bytes(self._kept[-200:]).decode(errors="replace")
            try:
                more = self._receive(deadline)
            except HostError as error:
                raise HostError(
                    f"console: {compiled.pattern!r} did not come within {timeout_s:g} s; last was {tail!r}"
                ) from error
            if not more:
                raise GuestGone(f"console: the guest ended before {compiled.pattern!r} came; last was {tail!r}")
        del self._kept[: found.end()]
        return found

    def _receive(self, deadline: float | None) -> bool:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.001)
        self._socket.settimeout(left)
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except TimeoutError as error:
            raise HostError("console: nothing came in time") from error
        except ConnectionResetError:
            data = b""
        self._kept += data
        del self._kept[:-MAX_KEPT_BYTES]
        return bool(data)

    def close(self) -> None:
        """Leave the console; the guest goes on."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""How a guest ended, for someone who was busy with something else when it did."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any, Self

from ostler.control.connection import Connection, ConnectionLost
from ostler.control.runtime import Entry
from ostler.control.wire import unpack_error
from ostler.errors import GuestCrash, GuestGone, OstlerError

LAST_WORD_S = 5.0


class Watch:
    """Asked for from the start, so that the answer is there even when the guest's folder has gone with it."""

    def __init__(self, entry: Entry) -> None:
        self._name = entry.name
        self._connection = Connection.to(entry)
        self._number = self._connection.post("wait")
        self._end: dict[str, Any] | None = None

    def end(self, *, timeout_s: float | None = LAST_WORD_S) -> dict[str, Any] | None:
        """The end, or None if the guest still runs after the time-out."""
        if self._end is None:
            try:
                self._end = self._connection.collect(self._number, timeout_s=timeout_s)
            except TimeoutError:
                return None
            except ConnectionLost:
                self._end = {"status": 1, "reason": "died", "message": "its VM process was killed"}
        return self._end

    def explain(self, error: OstlerError) -> OstlerError:
        """What to tell the user of `error`: the guest's end if that is behind it, else the error itself."""
        end = self.end()
        if end is None:
            return error
        message = str(end.get("message") or "")
        found = unpack_error({"kind": end.get("reason"), "message": message, "details": end.get("details", "")})
        if isinstance(found, GuestCrash):
            return found
        because = f"{end.get('reason')}{': ' if message else ''}{message}"
        return GuestGone(f"guest {self._name!r}: ended before the command did ({because})")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

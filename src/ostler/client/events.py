"""What happens to a guest, as it happens."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from ostler.control.connection import Connection
from ostler.control.runtime import Entry


class Events:
    """An iterator from its making to the guest's end; a context manager, for whoever stops before."""

    def __init__(self, entry: Entry, *, timeout_s: float | None = None) -> None:
        self._connection = Connection.to(entry)
        try:
            self._events = self._connection.events(timeout_s=timeout_s)
        except BaseException:
            self._connection.close()
            raise

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, Any]:
        """The next event. Raises StopIteration at the guest's end, TimeoutError when nothing happens for so long."""
        try:
            return next(self._events)
        except StopIteration:
            self.close()
            raise

    def close(self) -> None:
        """Listen no more."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

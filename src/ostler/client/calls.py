"""`vm.calls`: what a guest says by Ostler's own calls, and answering calls of one's own. docs/hypercalls.md."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ostler.client import guests
from ostler.control.connection import Connection, ConnectionLost
from ostler.errors import OstlerError

if TYPE_CHECKING:
    from ostler.control.runtime import Entry

Handler = Callable[[Sequence[int], bytes], bytes | int]
"""The call's six arguments and its data; what is returned is the answer's data, or its result. OSError is an errno."""


class CallsOf:
    """One guest's calls."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    @property
    def is_ready(self) -> bool:
        """Whether the guest has called itself ready."""
        return bool(self._facts()["ready"])

    @property
    def keys(self) -> dict[str, str]:
        """What guest and host have told each other so far."""
        found: dict[str, str] = self._facts()["keys"]
        return found

    def put(self, key: str, value: str | None) -> None:
        """Set a key for the guest to read; None takes it away. Raises BadRequest for more than there is room for."""
        guests.request(self._entry, "calls-put", key=key, value=value)

    @contextlib.contextmanager
    def serving(self, number: int, handler: Handler) -> Iterator[None]:
        """Answer calls of a number of one's own (0x1000 and up) for the length of a block, in a thread.

        with vm.calls.serving(0x1000, lambda arguments, data: data.upper()): …
        """
        with Connection.to(self._entry) as connection:
            connection.request("calls-serve", call=number)
            thread = threading.Thread(target=_serve, args=(connection, handler), name=f"call {number:#x}", daemon=True)
            thread.start()
            try:
                yield
            finally:
                connection.interrupt()
                thread.join()

    def _facts(self) -> dict[str, Any]:
        return guests.request(self._entry, "calls")


def _serve(connection: Connection, handler: Handler) -> None:
    with contextlib.suppress(OstlerError, ConnectionLost, OSError):
        for event in connection.messages():
            if event.get("event") == "call":
                connection.post("calls-answer", token=event["token"], **_answer(handler, event))


def _answer(handler: Handler, event: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = handler(event["arguments"], bytes.fromhex(event["data"]))
    except OSError as error:
        return {"result": -(error.errno or errno.EIO)}
    except Exception:
        import traceback

        traceback.print_exc()
        return {"result": -errno.EIO}
    if isinstance(answer, int):
        return {"result": answer}
    return {"result": len(answer), "data": answer.hex()}

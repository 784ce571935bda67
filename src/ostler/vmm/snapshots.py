"""The control protocol's operations on a running guest's state: `snapshot`, `fork`, `fork-done`.

The guest stands still only while it is caught, on the loop's thread; a thread writes, and the reply comes when it has.
One at a time: another request meanwhile is refused.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ostler.control.runtime import Entry
from ostler.control.wire import Message, pack_error
from ostler.errors import BadRequest, HostError, OstlerError
from ostler.vmm.run import GuestProcess
from ostler.vmm.server import Connection
from ostler.vmm.service import GuestService

if TYPE_CHECKING:
    from ostler.vmm.capture import Capturer, Seed

MAX_SEEDS = 16


class SnapshotService:
    """Adds its operations to the guest's service; a context manager."""

    def __init__(self, process: GuestProcess, service: GuestService, entry: Entry, *, base: str | None = None) -> None:
        """`base` names the snapshot whose memory the guest began with."""
        self._process = process
        self._service = service
        self._entry = entry
        self._base = base
        self._made: Capturer | None = None
        self._writer: threading.Thread | None = None
        self._seeds: dict[str, Seed] = {}
        service.add_operations({"snapshot": self._snapshot, "fork": self._fork, "fork-done": self._fork_done})

    @property
    def _capturer(self) -> Capturer:
        """Made when it is needed: most guests are never caught."""
        if self._made is None:
            from ostler.vmm.capture import Capturer

            self._made = Capturer(self._process, self._entry.name, base=self._base)
        return self._made

    def _snapshot(self, connection: Connection, number: object, arguments: Message) -> None:
        folder = Path(_text(arguments, "folder"))
        given = _mapping(arguments, "manifest")
        self._check_idle()
        write = self._capturer.to_folder(
            folder, given, incremental=arguments.get("incremental") is True, sync=arguments.get("sync", True) is True
        )
        # Whoever asked may go on with the guest: what happens to it from here on is not in the snapshot.
        connection.send({"event": "caught"})

        def done(result: Message) -> None:
            self._service.announce("snapshot", name=given.get("name"), pause_ms=result["pause_ms"])

        self._in_thread(connection, number, write, done)

    def _fork(self, connection: Connection, number: object, arguments: Message) -> None:
        self._check_idle()
        if len(self._seeds) >= MAX_SEEDS:
            raise BadRequest(f"fork: {MAX_SEEDS} forks of this guest are under way already")
        name = f"fork-{secrets.token_hex(4)}"
        folder = self._entry.path / name
        folder.mkdir(mode=0o700)
        try:
            seed = self._capturer.to_seed(folder, {**_mapping(arguments, "manifest"), "name": name})
        except BaseException:
            for each in folder.iterdir():
                each.unlink()
            folder.rmdir()
            raise
        self._seeds[name] = seed
        # Whoever asked for it may be killed: nobody will say then that the children have begun.
        connection.when_gone.append(lambda: self._release(name))

        def finish() -> Message:
            seed.finish()
            return {"seed": name, "folder": str(folder), "pause_ms": seed.pause_ms}

        def done(result: Message) -> None:
            self._service.announce("forked", pause_ms=result["pause_ms"])

        self._in_thread(connection, number, finish, done)

    def _fork_done(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        self._release(_text(arguments, "seed"))
        return {}

    def _release(self, name: str) -> None:
        seed = self._seeds.pop(name, None)
        if seed is not None:
            if self._writer is not None:
                self._writer.join()
            with contextlib.suppress(OSError):
                seed.close()

    def _check_idle(self) -> None:
        if self._writer is not None and self._writer.is_alive():
            raise BadRequest(f"guest {self._entry.name!r}: is being saved already; try again when that is done")

    def _in_thread(
        self, connection: Connection, number: object, work: Callable[[], Message], done: Callable[[Message], None]
    ) -> None:
        def answer(reply: Message) -> None:
            self._writer = None
            if connection.is_open:
                connection.send({"id": number, **reply})
            if "ok" in reply:
                done(reply["ok"])

        def run() -> None:
            try:
                reply: Message = {"ok": work()}
            except OstlerError as error:
                reply = {"error": pack_error(error)}
            except OSError as error:
                reply = {"error": pack_error(HostError(f"snapshot: {error.strerror or error}"))}
            except Exception as error:
                reply = {"error": pack_error(HostError(f"internal error: {type(error).__name__}: {error}"))}
            self._service.on_loop(lambda: answer(reply))

        self._writer = threading.Thread(target=run, name="snapshot", daemon=True)
        self._writer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._writer is not None:
            self._writer.join()
        for name in [*self._seeds]:
            self._release(name)


def _text(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{name} {value!r}: expected text")
    return value


def _mapping(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = arguments.get(name)
    if not isinstance(value, dict):
        raise BadRequest(f"{name} {value!r}: expected an object")
    return value

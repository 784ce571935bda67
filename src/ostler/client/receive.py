"""Receiving guests: a listener that gives each one that comes a VM process of its own.

Connections say in a preamble which migration they belong to (`ostler.migration.wire`). The first of one starts the
process, the others are handed to it as they are: TLS is the VM process's business, which is the one to be trusted with
the guest's memory. The listener only routes, and tells what has become of each guest.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ostler.control.wire import unpack_error
from ostler.errors import HostError, MigrationError
from ostler.migration.address import Address, TlsFiles, check_privacy, listen
from ostler.migration.link import read_preamble
from ostler.migration.wire import MAX_STREAMS, Purpose

PREAMBLE_TIMEOUT_S = 5.0
MAX_ARRIVING = 64
SLICE_S = 0.2

Report = Callable[[str, dict[str, Any]], None]
"""Told `receiving`, `running` or `failed`, and the particulars: `name`, `error`."""


@dataclass(slots=True)
class _Arriving:
    """A migration under way: the VM process and the socket to it."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    lines: bytes = b""


class Receiver:
    """Listens until closed; a context manager. `serve` in one thread; `stop` from any."""

    def __init__(
        self, address: Address, report: Report, *, tls: TlsFiles | None = None, insecure: bool = False,
        accel: str | None = None, streams: int = MAX_STREAMS, once: bool = False,
    ) -> None:  # fmt: skip
        """Raises BadRequest, HostError."""
        check_privacy(address, tls, insecure=insecure)
        if tls is not None:
            tls.context(server=True)
        self._report, self._tls, self._accel, self._streams, self._once = report, tls, accel, streams, once
        try:
            self._listener = listen(address)
        except OSError as error:
            raise HostError(f"{address}: {error.strerror or error}") from error
        self._listener.settimeout(PREAMBLE_TIMEOUT_S)
        self.address = address if address.path else Address(address.host, self._listener.getsockname()[1])
        self._arriving: dict[bytes, _Arriving] = {}
        # VM processes that say no more: they are collected when they end.
        self._started: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._stopping = False
        self._done = False

    def serve(self) -> None:
        """Route until `stop`; with `once` until a guest has arrived or failed to."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._stopping and not self._done:
                for arriving in [*self._arriving.values()]:
                    if arriving.control not in selector.get_map():
                        selector.register(arriving.control, selectors.EVENT_READ, arriving)
                self._started = [each for each in self._started if each.poll() is None]
                for key, _ in selector.select(SLICE_S):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif not self._hear(key.data):
                        selector.unregister(key.fileobj)
                        self._forget(key.data)

    def stop(self) -> None:
        """Listen no more. Guests that are on their way lose nothing but further streams."""
        self._stopping = True

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connected, _ = self._listener.accept()
            connected.settimeout(PREAMBLE_TIMEOUT_S)
            # A connection that says nothing keeps nobody waiting but itself.
            threading.Thread(target=self._route, args=(connected,), name="route", daemon=True).start()

    def _route(self, connected: socket.socket) -> None:
        with connected:
            try:
                preamble = read_preamble(connected)
                with self._lock:
                    arriving = self._arriving.get(preamble.session)
                    if preamble.purpose is Purpose.MIGRATE and preamble.stream == 0 and arriving is None:
                        self._arriving[preamble.session] = self._start(preamble.session, connected)
                        return
                if arriving is None or preamble.stream == 0:
                    raise MigrationError("migration: a further stream of a migration that is not known here")
                socket.send_fds(arriving.control, [str(preamble.stream).encode()], [connected.fileno()])
            except (MigrationError, OSError) as error:
                self._report("refused", {"error": str(error)})

    def _start(self, session: bytes, connected: socket.socket) -> _Arriving:
        if len(self._arriving) >= MAX_ARRIVING:
            raise MigrationError(f"migration: {MAX_ARRIVING} guests are on their way here already")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "ostler.vmm.migrate_in", str(theirs.fileno())],
                stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        tls = [str(each) for each in (self._tls.cert, self._tls.key, self._tls.ca)] if self._tls else [""] * 3
        options = {"tls": tls, "accel": self._accel, "streams": self._streams, "session": session.hex()}
        connected.settimeout(None)
        socket.send_fds(ours, [json.dumps(options).encode()], [connected.fileno()])
        return _Arriving(process, ours)

    def _hear(self, arriving: _Arriving) -> bool:
        """One line of a VM process's; whether there may be more."""
        try:
            data = arriving.control.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return False
        with contextlib.suppress(ValueError):
            said = json.loads(data)
            state = str(said.pop("state"))
            if isinstance(said.get("error"), dict):
                said["error"] = str(unpack_error(said["error"]))
            self._report(state, said)
            if state in ("running", "failed") and self._once:
                self._done = True
        return True

    def _forget(self, arriving: _Arriving) -> None:
        arriving.control.close()
        with self._lock:
            self._arriving = {key: each for key, each in self._arriving.items() if each is not arriving}
        self._started.append(arriving.process)

    def close(self) -> None:
        self._listener.close()
        if self.address.path:
            with contextlib.suppress(OSError):
                Path(self.address.path).unlink()
        for arriving in self._arriving.values():
            arriving.control.close()
            self._started.append(arriving.process)
        self._arriving.clear()
        for process in self._started:
            # It outlives this process on purpose.
            if process.poll() is None:
                process.returncode = 0
        self._started.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

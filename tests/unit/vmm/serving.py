"""A guest of scripted processors that serves its control socket in a thread, for tests of what serves there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from ostler.config import parse_guest
from ostler.control.connection import Connection
from ostler.control.logfile import RotatedLog
from ostler.errors import OstlerError
from ostler.testing import kernels
from ostler.testing.fake_accel import FakeAccel
from ostler.testing.fake_script import Halt, Script
from ostler.vmm.hub import HubConsole
from ostler.vmm.run import GuestProcess
from ostler.vmm.server import ControlServer
from ostler.vmm.service import GuestService, describe


def idle() -> Script:
    while True:
        yield Halt()


Extra = Callable[[GuestProcess, GuestService], contextlib.AbstractContextManager[Any]]


class Served:
    """Serves from construction to the end of its block."""

    def __init__(
        self, folder: Path, script: Callable[[], Script], *, extra: Extra | None = None, paused: bool = False,
        **options: object,
    ) -> None:  # fmt: skip
        """`extra` adds operations; `paused` waits for `resume`; `options` are the specification's."""
        kernel = folder / "kernel"
        kernel.write_bytes(kernels.elf64(b"\xf4", note=kernels.xen_note(0x10_0000)))
        self.path = folder / "control.sock"
        self.log = folder / "console.log"
        self.end: dict[str, object] = {}
        self.stopping = threading.Event()
        self.process: GuestProcess
        self.service: GuestService
        self._ready = threading.Event()
        self._spec = parse_guest(kernel=kernel, **{"memory": "16M", **options})
        self._script, self._extra, self._paused = script, extra, paused
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(30)

    def connect(self) -> Connection:
        return Connection(self.path)

    def join(self) -> dict[str, object]:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        # A guest that is just ending may take the connection and close it, or not take it any more.
        with contextlib.suppress(OstlerError):
            if self._thread.is_alive():
                with self.connect() as connection:
                    connection.request("kill")
        self.join()

    def _run(self) -> None:
        log = RotatedLog(self.log)
        with contextlib.ExitStack() as stack:
            process = self.process = stack.enter_context(
                GuestProcess(self._spec, FakeAccel(self._script), lambda *given: HubConsole(log, *given))
            )
            assert isinstance(process.console, HubConsole)
            server = stack.enter_context(ControlServer(self.path, process.loop, "fake"))
            facts = {"name": "fake", "accelerator": "fake", "spec": {"cpus": 1}}
            service = self.service = server.service = GuestService(process, server, process.console, facts)
            if self._extra is not None:
                stack.enter_context(self._extra(process, service))
            process.loop.call_soon(self._ready.set)
            end = process.run(paused=self._paused)
            self.end = describe(end, killed=service.killed)
            service.ended(self.end)

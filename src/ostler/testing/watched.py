"""A guest in this process whose console is watched: something is done once a line has appeared."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ostler.accel.api import Accel
from ostler.config import GuestSpec
from ostler.vmm.console import on_descriptors
from ostler.vmm.processors import End
from ostler.vmm.run import Beginning, GuestProcess

# No guest says this on its console.
MARK = b"\0"


class Watched:
    """A guest's process and what its console has said so far, `console`."""

    def __init__(self, spec: GuestSpec, opened: Accel, beginning: Beginning | None = None) -> None:
        self.console = bytearray()
        self._out, self._inward = os.pipe()
        self.process = GuestProcess(spec, opened, on_descriptors(None, self._inward), beginning=beginning)
        self._waiting: list[tuple[bytes, float]] = []
        self._then: Callable[[], None] = self.process.quit
        self._heard = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(self, stops: Sequence[tuple[bytes, float]] = (), then: Callable[[], None] | None = None) -> End:
        """Run to the guest's end, calling `then` at each stop: so many seconds after that line, in the loop's thread.

        Without `then` the first stop ends the run.
        """
        self._waiting, self._then = list(stops), then or self.process.quit
        return self.process.run()

    def heard(self) -> bytes:
        """The console so far, with what is still on its way: it is the guest's past, too. Loop's thread."""
        self.process.console.finish()
        self._heard.clear()
        os.write(self._inward, MARK)
        self._heard.wait()
        return bytes(self.console)

    def close(self) -> None:
        """End the process and hear out its console."""
        self.process.__exit__(None, None, None)
        os.close(self._inward)
        self._reader.join()
        os.close(self._out)

    def _read(self) -> None:
        while chunk := os.read(self._out, 4096):
            self.console += chunk.replace(MARK, b"")
            if MARK in chunk:
                self._heard.set()
            while self._waiting and self._waiting[0][0] in self.console:
                _, delay_s = self._waiting.pop(0)
                threading.Timer(delay_s, self.process.loop.call_soon, (self._then,)).start()


@contextmanager
def watched(spec: GuestSpec, opened: Accel, *, beginning: Beginning | None = None) -> Iterator[Watched]:
    """A Watched, closed at the end; one with a beginning is still to be given its state."""
    guest = Watched(spec, opened, beginning)
    try:
        yield guest
    finally:
        guest.close()

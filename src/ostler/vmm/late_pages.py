"""Pages that come after their guest: a userfaultfd over guest memory, and the process that answers it.

That process (`ostler.migration.pager`) is started when the post-copy stream comes in, while memory is still on its way;
`begin` is called when the guest has stopped at the source. If it fails, the guest is lost: half of its memory is
somewhere else.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Self

from ostler.errors import MigrationError
from ostler.host.userfault import Userfault
from ostler.memory import GuestMemory

UP_TIMEOUT_S = 30.0


class LatePages:
    """Owns the userfaultfd and the pager; a context manager."""

    def __init__(self, memory: GuestMemory) -> None:
        """Raises MigrationError."""
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._began = False
        try:
            self._faults = Userfault.new()
        except OSError as error:
            raise MigrationError(f"userfaultfd: {error.strerror or error}") from error

    def start(self, stream: socket.socket, tls: Sequence[str], secret: str) -> None:
        """Give the post-copy stream to a pager. Any thread; a second stream is nobody's."""
        if self._process is not None:
            return
        regions = [
            (region.start, self._memory.host_address(region.start, region.size_bytes), region.size_bytes)
            for region in self._memory.regions
        ]
        given = {
            "userfault": self._faults.fd, "stream": stream.fileno(), "tls": list(tls), "secret": secret,
            "regions": regions,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "ostler.migration.pager"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[self._faults.fd, stream.fileno()],
        )  # fmt: skip
        self._process = process
        self._tell(json.dumps(given))

    def begin(self) -> None:
        """From now on every page that memory has not got is the pager's to bring. Raises MigrationError."""
        if self._said(UP_TIMEOUT_S) != "up":
            raise MigrationError("post-copy: its process has not come up")
        try:
            for region in self._memory.regions:
                self._faults.register(self._memory.host_address(region.start, region.size_bytes), region.size_bytes)
        except OSError as error:
            raise MigrationError(f"userfaultfd: {error.strerror or error}") from error
        self._began = True
        self._tell("go")
        threading.Thread(target=self._watch, name="late-pages", daemon=True).start()

    def _tell(self, line: str) -> None:
        """Raises MigrationError."""
        if self._process is not None and self._process.stdin is not None:
            try:
                self._process.stdin.write(line.encode() + b"\n")
                self._process.stdin.flush()
            except OSError as error:
                raise MigrationError(f"post-copy: {error.strerror or error}") from error

    def _watch(self) -> None:
        """The pager's last word; without it every processor may stand still for ever."""
        word = self._said(None)
        if word == "done" or not self._began:
            return
        print(f"post-copy: {word or 'its process died'}; the guest is lost", file=sys.stderr, flush=True)  # noqa: T201
        # Threads may be inside a touch that nobody answers any more: there is no orderly way out.
        os._exit(1)

    def _said(self, timeout_s: float | None) -> str:
        if self._process is None or self._process.stdout is None:
            return ""
        fd = self._process.stdout.fileno()
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([fd], [], [], timeout_s)[0]:
                return ""
            if not (more := os.read(fd, 1)):
                break
            line += more
        return line.decode(errors="replace").strip()

    def close(self) -> None:
        self._began = False
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        self._faults.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

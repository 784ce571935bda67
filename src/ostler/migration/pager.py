"""`python -m ostler.migration.pager`: answers a migrated guest's touches of pages that are still at the source.

A process of its own beside the guest's (`ostler.host.userfault` says why). It is given, as one line of JSON on standard
input, where guest memory lies in that process, and by number two descriptors: the userfaultfd and the post-copy stream,
whose TLS it does itself. It says `up` on standard output when the stream is the right one, waits for the line `go`, and
says `done` when every page has come; anything else that it says, or its end, means that the guest is lost.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import sys
from pathlib import Path
from typing import Any

from ostler.errors import MigrationError
from ostler.host.userfault import Userfault
from ostler.migration import wire
from ostler.migration.address import tls_files
from ostler.migration.link import Link, accept_link, expect
from ostler.migration.pages import parse_batch
from ostler.migration.wire import LIMITS, MAX_BATCH_PAGES, PAGE_BYTES, WANTED, Frame, Kind

FIRST_TIMEOUT_S, TIMEOUT_S = 120.0, 30.0


class Pager:
    """Faults to the source, pages to the guest."""

    def __init__(self, faults: Userfault, link: Link, regions: list[tuple[int, int, int]]) -> None:
        """`regions` are (guest-physical address, address in the guest's process, bytes)."""
        self._faults, self._link, self._regions = faults, link, regions
        self._placed: set[int] = set()
        self._asked: set[int] = set()
        self._buffer = bytearray(LIMITS[Kind.PAGES])
        self._content = (ctypes.c_char * (MAX_BATCH_PAGES * PAGE_BYTES))()

    def serve(self) -> None:
        """Until the source has nothing more. Raises MigrationError, OSError."""
        poll = select.poll()
        for fd in (self._faults.fd, self._link.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(0 if self._link.pending() else None)}
            if self._faults.fd in ready:
                self._ask()
            # TLS may hold a whole frame that the socket no longer shows.
            while self._link.pending():
                frame = self._link.receive(self._buffer)
                if frame.kind is Kind.DONE:
                    for _, address, size in self._regions:
                        self._faults.unregister(address, size)
                    self._link.send(wire.pack(Kind.DONE))
                    return
                self._place(frame)
                if self._faults.fd in ready:
                    self._ask()

    def _ask(self) -> None:
        wanted = []
        for address in self._faults.faults():
            gpa = self._gpa(address)
            if gpa in self._placed:
                # It was here and was given back since: zeroes, like any new page.
                self._faults.zero(address)
            elif gpa not in self._asked:
                self._asked.add(gpa)
                wanted.append(gpa)
        if wanted:
            self._link.send(wire.pack(Kind.WANT, b"".join(WANTED.pack(gpa) for gpa in wanted)))

    def _place(self, frame: Frame) -> None:
        if frame.kind is not Kind.PAGES:
            raise MigrationError(f"source: unexpected {frame.kind.name} on the post-copy stream")
        batch = parse_batch(memoryview(frame.payload), allowed=self._has)
        if not batch.content:
            for gpa, count in batch.runs:
                for page in range(gpa, gpa + count * PAGE_BYTES, PAGE_BYTES):
                    self._faults.zero(self._address(page))
                    self._placed.add(page)
            return
        for gpa, content in batch.parts():
            ctypes.memmove(self._content, bytes(content), len(content))
            self._faults.copy(self._address(gpa), ctypes.addressof(self._content), len(content))
            self._placed.update(range(gpa, gpa + len(content), PAGE_BYTES))

    def _has(self, gpa: int, size_bytes: int) -> bool:
        return any(start <= gpa and gpa + size_bytes <= start + size for start, _, size in self._regions)

    def _address(self, gpa: int) -> int:
        return next(address + gpa - start for start, address, size in self._regions if start <= gpa < start + size)

    def _gpa(self, address: int) -> int:
        return next(start + address - at for start, at, size in self._regions if at <= address < at + size)


def main() -> int:
    given: dict[str, Any] = json.loads(sys.stdin.readline())
    tls = tls_files(*[Path(each) if each else None for each in given["tls"]])
    try:
        with (
            Userfault(given["userfault"]) as faults,
            accept_link(socket.socket(fileno=given["stream"]), tls, timeout_s=FIRST_TIMEOUT_S) as link,
        ):
            link.narrow()
            hello = wire.parse_json(expect(link, Kind.STREAM))
            if hello.get("secret") != given["secret"]:
                raise MigrationError("migration: a stream without the secret of its migration")
            link.set_timeout(TIMEOUT_S)
            link.send(wire.pack(Kind.READY))
            _say("up")
            # Pages have no place before the guest's process has said which are missing.
            if sys.stdin.readline() != "go\n":
                return 0
            Pager(faults, link, [(start, address, size) for start, address, size in given["regions"]]).serve()
            _say("done")
    except (MigrationError, OSError) as error:
        _say(f"failed: {error}")
        return 1
    return 0


def _say(word: str) -> None:
    os.write(1, word.encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())

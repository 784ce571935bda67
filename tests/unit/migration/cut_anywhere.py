"""`python cut_anywhere.py`: a whole migration between two processes, many times; each time one act is the last.

Everything is real but the guest: processes, sockets, witnesses, the protocol. An act is anything that the other side
could notice: a message sent or received, a word of the witness written. `source` and `target` are ended by SIGKILL
before their n-th act, `link` is cut there by either side. One line of JSON for each run; `test_cut_anywhere` judges.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ostler.errors import MigrationError
from ostler.memory import GuestMemory
from ostler.migration.address import Address
from ostler.migration.dirty import DirtyTracker
from ostler.migration.disks import Mirror
from ostler.migration.incoming import Incoming
from ostler.migration.link import Link, accept_link, read_preamble
from ostler.migration.outgoing import Outgoing
from ostler.migration.target import Target
from ostler.migration.terms import Options
from ostler.migration.witness import RECEIVING, Witness, boot_id

T = TypeVar("T")
MEMORY_BYTES = 1 << 20
STATE = b"processors and devices"
MARK_GPA, MARK = 0x3000, b"what the guest had written"
# Exit statuses: the guest lives in this process, or it does not.
LIVES, GONE = 10, 11


class QuietVm:
    """No page is ever written."""

    def get_dirty_log(self, slot: int) -> bytes:  # noqa: ARG002
        return bytes(MEMORY_BYTES // 4096 // 8)

    def set_user_memory_region(self, *_arguments: int) -> None:
        """Logging is switched on and off."""


class StillGuest:
    """Implements `migration.terms.Guest` for a guest that does nothing."""

    def __init__(self) -> None:
        self.memory = GuestMemory.of_size(MEMORY_BYTES)
        self.memory.write(MARK_GPA, MARK)
        self.tracker = DirtyTracker(self.memory, QuietVm())  # type: ignore[arg-type]
        self.mirrors: Sequence[tuple[int, Mirror]] = ()
        self.runs = True

    def offer(self) -> dict[str, Any]:
        return {"name": "still", "spec": {}, "facts": {}, "disks": []}

    def begin(self) -> None:
        self.tracker.start()

    def stop(self) -> bool:
        self.runs = False
        return False

    def save(self) -> bytes:
        return STATE

    def go_on(self) -> None:
        self.runs = True

    def give_away(self) -> None:
        """It has no disks."""

    def take_back(self) -> None:
        self.runs = True

    def strays(self) -> Sequence[tuple[int, bytes]]:
        return ()

    def on_loop(self, call: Callable[[], T]) -> T:
        return call()


class Acts:
    """Counts this process's acts and puts an end to something before the chosen one."""

    links: ClassVar[list[Link]] = []

    def __init__(self, last: int, *, dies: bool) -> None:
        self._left, self._dies = last, dies
        for owner, name in ((Witness, "write"), (Link, "send"), (Link, "send_parts"), (Link, "receive")):
            setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, act: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(act)
        def counted(of: Any, *arguments: Any, **more: Any) -> T:
            if isinstance(of, Link) and of not in self.links:
                self.links.append(of)
            if self._left == 0:
                self._end()
            self._left -= 1
            return act(of, *arguments, **more)

        return counted

    def _end(self) -> None:
        if self._dies:
            os.kill(os.getpid(), signal.SIGKILL)
        for link in self.links:
            link.shutdown()

    @property
    def is_over(self) -> bool:
        """Whether it came to the chosen act."""
        return self._left < 0


def source(folder: Path, acts: Acts) -> tuple[bool, bool]:
    """Move the guest away; whether it lives here in the end, and whether the chosen act came."""
    guest = StillGuest()
    options = Options(address=Address(path=str(folder / "in")), witness_folder=folder)
    outgoing = Outgoing(guest, options, lambda _progress: None)
    moved = False
    with contextlib.suppress(MigrationError):
        outgoing.run()
        moved = True
    if outgoing.is_in_doubt:
        raise RuntimeError("the source does not know where its guest is")
    return guest.runs and not moved, acts.is_over


def target(folder: Path, listener: socket.socket, leash: int, acts: Acts) -> tuple[bool, bool]:
    """Take it in; the same. The leash's other end is the source's: it may die before it comes here."""
    if listener.fileno() not in select.select([listener.fileno(), leash], [], [])[0]:
        return False, acts.is_over
    connected, _ = listener.accept()
    listener.close()
    with contextlib.suppress(MigrationError):
        preamble = read_preamble(connected)
        memory = GuestMemory.of_size(MEMORY_BYTES)
        half = Target()
        path = folder / f"{preamble.session.hex()}.target"
        with accept_link(connected, None) as link, Witness(path, RECEIVING) as witnessed:
            half.hello(link.receive())
            incoming = Incoming(half, link, memory, {}, witnessed)
            link.send(half.welcome(streams=1, post_copy=False, boot=boot_id(), witness=str(path)))
            incoming.receive()
            taken: list[bytes] = []
            incoming.take_over(taken.append, lambda: None)
            incoming.say_running()
            incoming.strays(lambda _card, _frame: None)
            if taken != [STATE] or memory.read(MARK_GPA, len(MARK)) != MARK:
                raise RuntimeError("the guest has not come whole")
            # Its witness stays until the guest ends, which it does not here.
            witnessed.leave()
            return True, acts.is_over
    return False, acts.is_over


def child(work: Callable[[], tuple[bool, bool]]) -> int:
    """A process that does it; its status says what came of it."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        lives, is_over = work()
        status = (LIVES if lives else GONE) + (0 if is_over else 10)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(status)


def run(folder: Path, what: str, side: str, last: int) -> dict[str, Any]:
    """One migration; what came of it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "in"))
    listener.listen()

    def acts(mine: str) -> Acts:
        return Acts(last if mine == side else -1, dies=what != "link")

    leash, held = os.pipe()

    def take() -> tuple[bool, bool]:
        os.close(held)
        return target(folder, listener, leash, acts("target"))

    def give() -> tuple[bool, bool]:
        listener.close()
        return source(folder, acts("source"))

    pids = {"target": child(take), "source": child(give)}
    listener.close()
    os.close(leash)
    os.close(held)
    statuses = {name: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for name, pid in pids.items()}
    (folder / "in").unlink()
    words = {}
    for path in (*folder.glob("*.source"), *folder.glob("*.target")):
        words[path.suffix[1:]] = path.read_text().strip()
        path.unlink()
    return {"what": what, "side": side, "last": last, "statuses": statuses, "words": words}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for what, side in (("source", "source"), ("target", "target"), ("link", "source"), ("link", "target")):
            for last in range(200):
                found = run(Path(scratch), what, side, last)
                os.write(1, json.dumps(found).encode() + b"\n")
                status = found["statuses"][side]
                if status in (LIVES + 10, GONE + 10):  # it never came so far: that was all of them
                    break


if __name__ == "__main__":
    main()

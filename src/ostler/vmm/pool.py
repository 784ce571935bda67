"""`python -m ostler.vmm.pool SOCKET`: forks VM processes that have nothing left to import. See `ostler.control.pool`.

Of what guests went on from last it has one each made already (`ostler.vmm.pool_ahead`). Else children know nothing yet.

One thread, no event loop: children are forked ahead, so that one waits already when a request comes, and each gets its
request by a socket pair of its own, with the descriptors that `python -m ostler.vmm` inherits otherwise. The
garbage collector is told not to touch what is there before the fork, so that children keep sharing it.

It ends when nobody has asked for so long, when its socket has gone from the file system, or on request. Children that
run a guest go on: they are sessions of their own, and the kernel's to reap.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ostler.accel import soft
from ostler.control.pool import MAX_REQUEST_BYTES
from ostler.errors import OstlerError
from ostler.vmm.pool_ahead import Ahead, Task

if TYPE_CHECKING:
    from ostler.vmm.prepared import Prepared

IDLE_S = 300.0
FILL_DELAY_S = 0.1
LOOK_S = 5.0
SPARE = 2
MAX_FDS = 4
CLIENT_TIMEOUT_S = 5.0
# All that a guest of an image needs, or one that goes on.
MODULES = (
    "ostler.vmm.served", "ostler.vmm.prepared", "ostler.vmm.origin", "ostler.vmm.capture", "ostler.vmm.snapshots",
    "ostler.machine.saved",
    "ostler.machine.peripherals", "ostler.machine.networks", "ostler.accel.soft", "ostler.accel.kvm",
    "ostler.accel.probe", "ostler.backends.disk_layers", "ostler.devices.virtio.rng", "zlib", "select",
)  # fmt: skip


class Spare:
    """A child that waits for its request."""

    def __init__(self, others: Iterable[socket.socket], fds: Iterable[int] = (), task: Task | None = None) -> None:
        """`others` and `fds` are the parent's and none of the child's business: a pipe's end that stays open in a child
        is one whose reader waits for ever. With a `task` it makes a guest first, and says when that is done."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.pid = os.fork()
        if not self.pid:
            for each in (ours, *others):
                each.close()
            for fd in fds:
                os.close(fd)
            _serve_one(theirs, task)
        theirs.close()
        self.socket = ours
        self.is_ready = task is None

    def hear(self) -> bool:
        """Take the word that it is ready, which its socket has; false where it has ended instead."""
        with contextlib.suppress(OSError):
            self.is_ready = bool(self.socket.recv(1))
            return self.is_ready
        return False

    def give(self, request: bytes, fds: list[int]) -> int:
        """Hand the request over; a descriptor of the process. Raises OSError where the child has gone."""
        pidfd = os.pidfd_open(self.pid)
        try:
            with self.socket as waiting:
                socket.send_fds(waiting, [request], fds)
        except OSError:
            os.close(pidfd)
            raise
        return pidfd

    def dismiss(self) -> None:
        """It ends when its socket does."""
        self.socket.close()


def _serve_one(asked: socket.socket, task: Task | None) -> NoReturn:
    """The child's life: a request, a guest, its end."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        prepared = None
        if task is not None:
            prepared = _prepare(task)
            asked.send(b"!")
        data, fds, _, _ = socket.recv_fds(asked, MAX_REQUEST_BYTES, MAX_FDS)
        if not data:
            if prepared is not None:
                prepared.__exit__()
            os._exit(0)
        asked.close()
        request = json.loads(data)
        os.setsid()
        os.environ.clear()
        os.environ.update(request["environment"])
        named = dict(zip(request["descriptors"], fds, strict=True))
        log = named.pop("log")
        sys.stdout.flush()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        from ostler.vmm.served import serve

        status = serve(Path(request["folder"]), prepared=prepared, **named)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _prepare(task: Task) -> Prepared:
    """Make the guest. Where it cannot be made the child ends: whoever asks for it has another to say why."""
    from ostler.vmm.prepared import Prepared

    os.environ.clear()
    os.environ.update(task.environment)
    try:
        return Prepared(task.spec, task.origin, task.place)
    except OstlerError as error:
        print(f"not prepared: {error}", file=sys.stderr)  # noqa: T201 - the pool's log
        os._exit(1)


class Pool:
    """The parent."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, also where another pool listens there."""
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(64)
        self._place = path.with_suffix(".guests")
        # Of children that were killed under a pool before this one.
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir(mode=0o700)
        self._spare: list[Spare] = []
        self._ahead = Ahead()
        self._served = -FILL_DELAY_S
        self._stopping = False

    def run(self) -> None:
        """Serve until the end."""
        used = time.monotonic()
        while not self._stopping and time.monotonic() - used < IDLE_S and self._path.exists():
            ready = select.select([self._listener, *self._ahead.sockets], [], [], self._patience())[0]
            if self._listener in ready:
                used = time.monotonic()
                client, _ = self._listener.accept()
                with client, contextlib.suppress(OSError, ValueError):
                    client.settimeout(CLIENT_TIMEOUT_S)
                    self._serve(client)
            self._ahead.hear(ready)
            if not ready or self._is_at_leisure:
                self._fill_up()
            self._ahead.forget_old(time.monotonic())

    def close(self) -> None:
        """Nobody waits any more."""
        self._path.unlink(missing_ok=True)
        self._listener.close()
        for each in (*self._spare, *self._ahead.spares):
            each.dismiss()
        shutil.rmtree(self._place, ignore_errors=True)

    @property
    def _is_at_leisure(self) -> bool:
        """Whoever has just been served has better use for the host's processors than what is done for the next one."""
        return time.monotonic() - self._served >= FILL_DELAY_S

    def _patience(self) -> float:
        """How long to wait for somebody who asks: what is missing is made when nobody does."""
        if not self._spare:
            return 0
        if len(self._spare) >= SPARE and self._ahead.missing() is None:
            return LOOK_S
        return max(self._served + FILL_DELAY_S - time.monotonic(), 0)

    def _fill_up(self) -> None:
        if len(self._spare) < SPARE:
            self._spare.append(self._new())
        elif self._is_at_leisure and (task := self._ahead.missing()) is not None:
            self._ahead.add(task, self._new(task=task))

    def _new(self, client: socket.socket | None = None, fds: Iterable[int] = (), task: Task | None = None) -> Spare:
        held = [self._listener, *(each.socket for each in (*self._spare, *self._ahead.spares))]
        return Spare(held if client is None else [*held, client], fds, task)

    def _serve(self, client: socket.socket) -> None:
        data, fds, _, _ = socket.recv_fds(client, MAX_REQUEST_BYTES, MAX_FDS)
        try:
            while data and not data.endswith(b"\n") and len(data) < MAX_REQUEST_BYTES:
                more = client.recv(MAX_REQUEST_BYTES)
                if not more:
                    return
                data += more
            request = json.loads(data)
            if request.get("ping") or request.get("stop"):
                self._stopping = bool(request.get("stop"))
                client.sendall(json.dumps({"pool": True, "ready": self._ahead.ready}).encode() + b"\n")
                return
            self._served = time.monotonic()
            pid, pidfd = self._hand_over(request, data, client, fds)
            try:
                socket.send_fds(client, [json.dumps({"pid": pid}).encode()], [pidfd])
            finally:
                os.close(pidfd)
        finally:
            for fd in fds:
                os.close(fd)

    def _hand_over(
        self, request: dict[str, Any], data: bytes, client: socket.socket, fds: list[int]
    ) -> tuple[int, int]:
        """Have a child do it: the process and a descriptor of it."""
        task = Task.of(request, self._place)
        ahead = self._ahead.take(task, time.monotonic()) if task is not None else None
        while ahead is not None or self._spare:
            child, ahead = ahead or self._spare.pop(), None
            # It may have been killed while it waited.
            with contextlib.suppress(OSError):
                return child.pid, child.give(data, fds)
        new = self._new(client, fds)
        return new.pid, new.give(data, fds)


def main() -> int:
    """Become nobody's child, import, serve."""
    path = Path(sys.argv[1])
    if os.fork():
        os._exit(0)
    # Whoever started it may remove the folder it stood in.
    sys.path[:] = [os.path.abspath(each) for each in sys.path]  # noqa: PTH100 - "" is the working directory here
    os.chdir("/")
    # Children are the kernel's to reap.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for each in (signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(OstlerError):
        soft.prepare()
    gc.collect()
    gc.freeze()
    try:
        pool = Pool(path)
    except OSError:
        return 0  # another one was faster
    try:
        pool.run()
    finally:
        pool.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

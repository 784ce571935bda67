"""Helper programs of one guest (passt, qemu-storage-daemon, virtiofsd): started, watched, stopped, never left behind.

A helper must not outlive the process that started it, however that one ends. Three ways, each covering what the
others miss: `stop` at an orderly end; a death signal that the kernel sends (PR_SET_PDEATHSIG, by setpriv(1), because
setting it between fork and exec in Python is not safe beside threads); and a socket that the helper itself gives up on,
for those that change their credentials at start, which clears the death signal. The kernel sends it when the *thread*
that started the helper ends, so start helpers in the main thread.

What a helper says on standard error is kept up to a limit and quoted when it dies. Its end of that pipe does not block:
a helper that says more than anyone reads loses words, not time.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import IO, Protocol, Self

from ostler.errors import HostError

TAIL_BYTES = 4096
STOP_TIMEOUT_S = 3.0
READY_TIMEOUT_S = 20.0
# Where administrators' programs are, which an ordinary user's PATH leaves out.
SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/libexec", "/usr/lib/qemu")


class Watcher(Protocol):
    """The part of an event loop that watching a helper needs."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back while `fd` is readable."""

    def remove_reader(self, fd: int) -> None:
        """Undo `add_reader`."""


def find_program(name: str, *, package: str, instead: str = "") -> str:
    """The path of a helper. Raises HostError that names the package, and what to do `instead`."""
    path = os.environ.get("PATH", os.defpath)
    found = shutil.which(name, path=os.pathsep.join([path, *SYSTEM_FOLDERS]))
    if found is None:
        advice = f", or {instead}" if instead else ""
        raise HostError(f"{name}: not found on this host: install the package {package}{advice}")
    return found


class Helper:
    """One running helper program; a context manager that stops it.

    `start` it, `watch` it on the event loop, `stop` it. Not safe to use from several threads at once.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        pass_fds: Collection[int] = (),
        stdout: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start `argv` in a session of its own. `stdout` is a descriptor, or nothing reads what it prints.

        Raises HostError when it cannot be started.
        """
        self.name = name
        self._tail = bytearray()
        self._watcher: Watcher | None = None
        self._errors, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [*_death_signal(), *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL if stdout is None else stdout,
                stderr=writing,
                pass_fds=tuple(pass_fds),
                env=None if environment is None else dict(environment),
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._errors)
            raise HostError(f"{name}: cannot be started: {error.strerror or error}") from error
        finally:
            os.close(writing)
        self._pidfd = os.pidfd_open(self._process.pid)

    @property
    def pid(self) -> int:
        """Its process, also after its end."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def ended(self, *, within_s: float) -> bool:
        """Wait up to `within_s` for its end; whether it came."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        return not self.alive

    def said(self) -> str:
        """The last things it said on standard error, as one line."""
        with contextlib.suppress(BlockingIOError, OSError):
            while chunk := os.read(self._errors, 65536):
                self._tail += chunk
                del self._tail[:-TAIL_BYTES]
        lines = [line.strip() for line in self._tail.decode(errors="replace").splitlines()]
        return "; ".join(line for line in lines if line)[-TAIL_BYTES:]

    def obituary(self) -> str:
        """One line on how it ended and what it said last. Only after its end."""
        status = self._process.wait()
        how = f"killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        said = self.said()
        return f"{self.name}: {how}" + (f": {said}" if said else "")

    def wait_for(self, pipe: IO[bytes] | int, *, timeout_s: float = READY_TIMEOUT_S) -> bytes:
        """What it writes into `pipe` first: how many helpers say that they are ready.

        Raises HostError when it dies instead, or says nothing in time; it is stopped then.
        """
        fd = pipe if isinstance(pipe, int) else pipe.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(self._pidfd, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            ready = [found for found, _ in poll.poll(left * 1000)]
            if fd in ready and (data := os.read(fd, 4096)):
                return data
            if self._pidfd in ready:
                raise HostError(self.obituary())
            if fd in ready:
                # Closed without a word: the end of the process is what is waited for now.
                poll.unregister(fd)
        self.stop()
        raise HostError(f"{self.name}: not ready after {timeout_s:g} s" + (f": {self.said()}" if self.said() else ""))

    def watch(self, watcher: Watcher, on_death: Callable[[Helper], None]) -> None:
        """Call `on_death` in the loop's thread when it ends by itself. Loop thread, or before the loop runs."""

        def ended() -> None:
            self.unwatch()
            on_death(self)

        self._watcher = watcher
        watcher.add_reader(self._pidfd, ended)

    def unwatch(self) -> None:
        """Its end interests nobody any more."""
        if self._watcher is not None:
            self._watcher.remove_reader(self._pidfd)
            self._watcher = None

    def stop(self, *, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End it: asked first, killed when it takes too long. Afterwards it is reaped; more calls do nothing."""
        if self._pidfd < 0:
            return
        self.unwatch()
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self.said()
        for fd in (self._pidfd, self._errors):
            os.close(fd)
        self._pidfd = self._errors = -1

    def kill(self) -> None:
        """End it at once; `watch` tells of it as of any other death."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        """To its whole session: some helpers fork. A process that has been reaped gets nothing."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()


def _death_signal() -> list[str]:
    """The command prefix that ties a program's life to ours, where the host has setpriv (Debian always has)."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return []
    # The signal is of no use to one whose parent died before it was set: then its parent is another one already.
    check = 'test "$PPID" = "$0" && exec "$@"'
    return [setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", check, str(os.getpid())]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

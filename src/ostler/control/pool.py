"""A pool of VM processes that have all they need but a guest: the client's side. `ostler.vmm.pool` is the other.

Half of what starting a VM process takes is Python's reading of modules. The pool is one process that has read them and
forks: a request is answered by a process that waits already, and all of them share the interpreter's pages.

It is started by whoever could have used it and did without, ends by itself when nobody has used it for a while, and
belongs to one installation: another Python, another version or a changed source file is another pool. Whoever cannot
reach it starts a VM process in the ordinary way. OSTLER_POOL=off does without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ostler.control import runtime

SOCKET_SUFFIX, LOG = ".sock", "pool.log"
ANSWER_TIMEOUT_S = 5.0
MAX_REQUEST_BYTES = 256 << 10
# A process of the pool is not its client's child: nobody can know its status.
UNKNOWN_STATUS = 1


class VmProcess(Protocol):
    """A VM process as its launcher sees it."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Its exit status, None while it lives."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""

    def terminate(self) -> None:
        """Ask it to end, by SIGTERM; one that has ended already is fine."""

    def kill(self) -> None:
        """End it; one that has ended already is fine."""


class PooledProcess:
    """One that the pool has forked, by a descriptor: its number alone might be another's by now."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """Takes over `pidfd`."""
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = pidfd

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._pidfd], [], [], 0)[0]:
            self.returncode = UNKNOWN_STATUS
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("VM process", timeout or 0)
            self.returncode = UNKNOWN_STATUS
        return self.returncode

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._pidfd)


def is_wanted() -> bool:
    """Whether the user has not switched pools off."""
    return os.environ.get("OSTLER_POOL", "on") != "off"


def folder() -> Path:
    """Where pools' sockets are."""
    found = runtime.root() / "pool"
    found.mkdir(mode=0o700, exist_ok=True)
    return found


def socket_path() -> Path:
    """This installation's pool."""
    identity = f"{sys.executable} {installation_stamp()}"
    return folder() / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}{SOCKET_SUFFIX}"


def installation_stamp() -> str:
    """What differs between two installations, or when a file of one changes."""
    package = str(Path(__file__).parents[1])
    return f"{package} {_newest(package)}"


def _newest(package: str) -> int:
    """When a module or the engine changed last, in nanoseconds; a millisecond's work."""
    newest, folders = 0, [package]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for each in entries:
                if each.name.endswith((".py", ".so")):
                    newest = max(newest, each.stat().st_mtime_ns)
                elif each.name != "__pycache__" and each.is_dir(follow_symlinks=False):
                    folders.append(each.path)
    return newest


def request(arguments: dict[str, object], fds: Sequence[int]) -> PooledProcess | None:
    """Have a process of the pool run a guest; None where there is no pool. The pool gets copies of the descriptors."""
    if not is_wanted():
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
        try:
            asked.settimeout(ANSWER_TIMEOUT_S)
            asked.connect(str(socket_path()))
            socket.send_fds(asked, [json.dumps(arguments).encode() + b"\n"], fds)
            data, found, _, _ = socket.recv_fds(asked, 4096, 1)
        except OSError:
            return None
    try:
        return PooledProcess(int(json.loads(data)["pid"]), found[0])
    except (ValueError, KeyError, IndexError):
        for fd in found:
            os.close(fd)
        return None


def start() -> None:
    """Start the pool, if there is none, without waiting for it."""
    if not is_wanted() or socket_path().exists():
        return
    with (folder() / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ostler.vmm.pool", str(socket_path())], stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip
    # It forks itself away at once and is nobody's child.
    process.wait()


def wait_until_warm(timeout_s: float, *, ready: int = 0) -> bool:
    """Whether the pool answers within the time, and has so many guests made ahead."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked, contextlib.suppress(OSError):
            asked.settimeout(max(deadline - time.monotonic(), 0.1))
            asked.connect(str(socket_path()))
            asked.sendall(b'{"ping": true}\n')
            if (said := asked.recv(4096)) and json.loads(said)["ready"] >= ready:
                return True
        time.sleep(0.01)
    return False


def stop() -> bool:
    """Have the pool end; guests it started go on. Whether there was one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked, contextlib.suppress(OSError):
        asked.settimeout(ANSWER_TIMEOUT_S)
        asked.connect(str(socket_path()))
        asked.sendall(b'{"stop": true}\n')
        return bool(asked.recv(4096))
    return False

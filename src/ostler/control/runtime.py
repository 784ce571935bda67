"""The runtime folder: which guests this user has, and where their sockets are.

    <root>/guests/.lock            held while the registry changes
    <root>/guests/<name>/          mode 0700
        lock                       flock held by the VM process as long as it lives, by nobody else
        entry.json                 what started it: image, command, remove, created
        spec.json  pid             its specification; its process
        origin.json                of a guest that goes on from somewhere: the folder of the snapshot
        control.sock  vsock.sock   management; the host side of virtio-vsock (vsock.sock_N: host port N)
        console.log  output.log    what the console said, what a detached guest's command said; each with a `.1`
        vmm.log                    the VM process's own complaints
        end.json                   how it ended; not there while it runs, nor when it was killed by the kernel

An entry appears by a rename, with its lock already held, so nobody sees half of one. A lock that is not held says that
the VM process is gone whatever the files say: no process identifier is ever trusted. Whoever looks heals: entries whose
guest is gone and that nobody wanted kept are removed, as are folders that a killed launcher left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ostler.errors import BadRequest, GuestNotFound, HostError

CONTROL_SOCKET, VSOCK_SOCKET = "control.sock", "vsock.sock"
# The virtio console's: the guest's /dev/hvc0, and its port org.ostler.agent.
HVC_SOCKET, AGENT_SOCKET = "hvc0.sock", "agent.sock"
CONSOLE_LOG, OUTPUT_LOG, VMM_LOG = "console.log", "output.log", "vmm.log"
LOCK, ENTRY, SPEC, PID, END = "lock", "entry.json", "spec.json", "pid", "end.json"
ORIGIN = "origin.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}", re.ASCII)
# sockaddr_un has 108 bytes with the closing zero; vsock.sock_<u32> is the longest name beside a socket.
MAX_SOCKET_PATH = 107
LONGEST_SUFFIX = len(f"/{VSOCK_SOCKET}_{2**32 - 1}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A guest's folder."""

    name: str
    path: Path

    @property
    def control_socket(self) -> Path:
        return self.path / CONTROL_SOCKET

    @property
    def vsock_socket(self) -> Path:
        return self.path / VSOCK_SOCKET

    @property
    def console_log(self) -> Path:
        return self.path / CONSOLE_LOG

    @property
    def output_log(self) -> Path:
        return self.path / OUTPUT_LOG

    @property
    def facts(self) -> dict[str, Any]:
        """What the launcher recorded; empty where it cannot be read."""
        return read_json(self.path / ENTRY)

    @property
    def end(self) -> dict[str, Any]:
        """How the guest ended: status, reason, message; empty while it runs and where nobody could say."""
        return read_json(self.path / END)

    def is_running(self) -> bool:
        """Whether the VM process lives."""
        return _is_held(self.path / LOCK)


def root() -> Path:
    """The user's folder, made where it is missing: OSTLER_RUNTIME, else in XDG_RUNTIME_DIR, else in /tmp.

    Raises HostError where it is not this user's alone.
    """
    if chosen := os.environ.get("OSTLER_RUNTIME"):
        folder = Path(chosen)
    elif (session := os.environ.get("XDG_RUNTIME_DIR")) and os.access(session, os.W_OK | os.X_OK):
        folder = Path(session) / "ostler"
    else:
        folder = Path(tempfile.gettempdir()) / f"ostler-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=bool(chosen), exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise HostError(f"runtime folder {folder}: {error.strerror or error}; OSTLER_RUNTIME names another") from error
    # /tmp is everybody's: someone else may have put a folder, or a link, in this place.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise HostError(f"runtime folder {folder}: expected a folder of user {os.getuid()} with mode 0700")
    return folder


def check_name(name: str) -> str:
    """The name again. Raises BadRequest for one that no guest may have."""
    if not NAME.fullmatch(name):
        raise BadRequest(f"name {name!r}: expected up to 40 letters, digits, '_', '.' and '-'")
    return name


def new_name(stem: str) -> str:
    """A name nobody has yet, in all likelihood, from what the guest is made of."""
    cleaned = re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-")[:24] or "guest"
    return f"{cleaned}-{secrets.token_hex(2)}"


@dataclass(slots=True)
class Claim:
    """A new entry and its held lock, which the VM process inherits; a context manager for the launcher's copy."""

    entry: Entry
    lock_fd: int

    def close(self) -> None:
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def claim(name: str, facts: dict[str, Any], spec: str, origin: dict[str, Any] | None = None) -> Claim:
    """Register a guest. An entry of that name whose guest has ended gives way.

    Raises BadRequest for a name that is taken, HostError where the folder cannot be made.
    """
    place = _guests() / check_name(name)
    if len(os.fsencode(place)) + LONGEST_SUFFIX > MAX_SOCKET_PATH:
        raise HostError(f"runtime folder {place}: too long for sockets in it; OSTLER_RUNTIME names a shorter one")
    try:
        with _registry():
            if place.exists():
                if _is_held(place / LOCK):
                    raise BadRequest(f"name {name!r}: a guest of that name is running; expected another")
                _discard(place)
            part = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
            lock_fd = os.open(part / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (part / ENTRY).write_text(json.dumps({"name": name, "created": time.time(), **facts}))
            (part / SPEC).write_text(spec)
            if origin is not None:
                (part / ORIGIN).write_text(json.dumps(origin))
            part.rename(place)
    except OSError as error:
        raise HostError(f"runtime folder {place}: {error.strerror or error}") from error
    return Claim(Entry(name, place), lock_fd)


def origin_of(entry: Entry) -> dict[str, Any]:
    """Where the guest goes on from, empty for one that boots."""
    return read_json(entry.path / ORIGIN)


def entries() -> list[Entry]:
    """All guests, running or kept, oldest first; heals on the way."""
    with _registry():
        found = []
        for path in _guests().iterdir():
            if path.name.startswith((".new-", ".dead-")):
                # Made and removed under the registry's lock, which is ours: whoever made it was killed.
                _discard(path)
            elif NAME.fullmatch(path.name) and path.is_dir():
                entry = Entry(path.name, path)
                if entry.is_running() or not entry.facts.get("remove", True):
                    found.append(entry)
                else:
                    _discard(path)
    return sorted(found, key=lambda entry: entry.facts.get("created", 0))


def find(name: str) -> Entry:
    """The guest of that name. Raises GuestNotFound."""
    check_name(name)
    found = {entry.name: entry for entry in entries()}
    if name in found:
        return found[name]
    having = f"; there are {', '.join(sorted(found)[:8])}" if found else "; there are none"
    raise GuestNotFound(f"guest {name!r}: not known{having}")


def remove(entry: Entry) -> None:
    """Forget a guest that has ended; one that is gone already is fine. Raises BadRequest for one that runs."""
    with _registry():
        if entry.is_running():
            raise BadRequest(f"guest {entry.name!r}: is running; stop it first")
        _discard(entry.path)


def forget_own(entry: Entry) -> None:
    """Remove the caller's own entry, whose lock the caller still holds."""
    with _registry():
        _discard(entry.path)


def write_end(entry: Entry, end: dict[str, Any]) -> None:
    """Record how the guest ended; whole or not at all."""
    part = entry.path / f".{END}"
    part.write_text(json.dumps(end))
    part.rename(entry.path / END)


def _guests() -> Path:
    folder = root() / "guests"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def _registry() -> Iterator[None]:
    with (_guests() / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_held(path: Path) -> bool:
    """Whether someone holds the lock. A visible entry's lock was taken before it appeared, so a look takes it from
    nobody."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _discard(path: Path) -> None:
    """Out of sight first, by one rename, then away."""
    dead = path.with_name(f".dead-{secrets.token_hex(8)}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(dead)
    shutil.rmtree(dead, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in one of an entry's files; empty where it cannot be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}

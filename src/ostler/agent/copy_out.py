"""Files and trees of a guest's on their way to the host.

Copies out of a guest are hostile input. `Unpacker` never leaves the folder it was given: it reaches each parent by
descriptors that follow no link, creates nothing but files, folders and links, drops set-user-id bits and owners, and
counts entries and bytes against limits. A link it creates may point anywhere, but the copy itself goes through none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from ostler.errors import AgentError, AgentProtocolError, BadRequest, HostError

GIB = 1 << 30
MAX_PATH = 4096
MAX_DEPTH = 256
MAX_NAME = 255
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Limits:
    """What a copy out of a guest may amount to."""

    entries: int = 1_000_000
    bytes: int = 64 * GIB


class Taker(Protocol):
    """Receives a copy out of a guest."""

    def entry(self, value: dict[str, Any]) -> None: ...
    def data(self, data: bytes) -> None: ...
    def finish(self) -> None: ...


class Collector:
    """One file of a guest's, in memory."""

    def __init__(self, source: str, limit_bytes: int) -> None:
        self._source, self._limit = source, limit_bytes
        self._entries = 0
        self._ended = False
        self.content = bytearray()

    def entry(self, value: dict[str, Any]) -> None:
        self._entries += 1
        if self._entries > 1 or value.get("type") != "file":
            raise BadRequest(f"{self._source}: expected a file of the guest's, not a folder")

    def data(self, data: bytes) -> None:
        if not self._entries or self._ended:
            raise AgentProtocolError("agent sent content without a file")
        if len(self.content) + len(data) > self._limit:
            raise AgentError(f"{self._source}: more than {self._limit} bytes")
        self.content += data
        self._ended = not data

    def finish(self) -> None:
        if not self._ended:
            raise AgentProtocolError("agent ended a copy in the middle")


class Unpacker:
    """Creates what a guest sends below one place of the host; a context manager.

    `target` is where the file or folder goes; if it is a folder already, `name` is the entry's name in it.
    """

    def __init__(self, target: Path, name: str, limits: Limits | None = None) -> None:
        inside = target.is_dir()
        self._place = target / _checked_name(name) if inside else target
        self._limits = limits or Limits()
        self._root: int | None = None
        self._file: _File | None = None
        self._folders: list[_Folder] = []
        self.entries = 0
        self.bytes = 0

    def entry(self, value: dict[str, Any]) -> None:
        """Create one file, folder or link. Raises AgentProtocolError, AgentError (limit), HostError."""
        if self._file is not None:
            raise AgentProtocolError("agent sent an entry in the middle of a file")
        self.entries += 1
        if self.entries > self._limits.entries:
            raise AgentError(f"copy from the guest: more than {self._limits.entries} entries")
        head = _Head.of(value)
        if (self.entries == 1) != (not head.parts) or (head.parts and self._root is None):
            shown = "/".join(head.parts)
            raise AgentProtocolError(f"agent sent entry {shown!r}: expected it below a folder sent first")
        with _host_errors(self._place):
            self._create(head)

    def data(self, data: bytes) -> None:
        """Write to the file under way; no data ends it."""
        if self._file is None:
            raise AgentProtocolError("agent sent content without a file")
        self.bytes += len(data)
        if self.bytes > self._limits.bytes:
            raise AgentError(f"copy from the guest: more than {self._limits.bytes} bytes")
        with _host_errors(self._place):
            if data:
                self._file.write(data)
            else:
                self._file.finish()
                self._file = None

    def finish(self) -> None:
        """Complete the copy after the agent's last word. Raises AgentProtocolError where something is missing."""
        if self._file is not None or not self.entries:
            raise AgentProtocolError("agent ended a copy in the middle")
        with _host_errors(self._place):
            self._leave(())

    def _create(self, head: _Head) -> None:
        self._leave(head.parts)
        parent, name = self._parent(head.parts)
        try:
            if head.kind == "folder":
                self._folder(parent, name, head)
            elif head.kind == "link":
                _link(parent, name, head)
            else:
                self._file = _File(parent, name, head)
                parent = -1  # the file owns it now
        finally:
            if parent >= 0:
                os.close(parent)

    def _parent(self, parts: tuple[str, ...]) -> tuple[int, str]:
        """Return a new descriptor of the folder an entry goes into, and the entry's name there."""
        if not parts:
            self._place.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self._place.parent, _FOLDER), self._place.name or "."
        assert self._root is not None
        return _descend(self._root, parts[:-1]), parts[-1]

    def _folder(self, parent: int, name: str, head: _Head) -> None:
        follow = os.O_NOFOLLOW if head.parts else 0  # the user may have named a link
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
            self._folders.append(_Folder(head.parts, head))
        opened = os.open(name, _FOLDER | follow, dir_fd=parent)
        if head.parts:
            os.close(opened)
        else:
            self._root = opened

    def _leave(self, parts: tuple[str, ...]) -> None:
        """Give folders that the copy has left their modes and times; what remains open lies above `parts`."""
        while self._folders and (not parts or parts[: len(self._folders[-1].parts)] != self._folders[-1].parts):
            folder = self._folders.pop()
            assert self._root is not None
            opened = _descend(self._root, folder.parts)
            try:
                os.fchmod(opened, folder.head.mode)
                os.utime(opened, ns=(folder.head.mtime_ns, folder.head.mtime_ns))
            finally:
                os.close(opened)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.discard()
            self._file = None
        if self._root is not None:
            os.close(self._root)
            self._root = None


@dataclass(frozen=True, slots=True)
class _Head:
    """An entry whose every field has been judged."""

    parts: tuple[str, ...]
    kind: str
    mode: int
    mtime_ns: int
    target: str

    @classmethod
    def of(cls, value: dict[str, Any]) -> _Head:
        path, kind, mode, mtime_ns = (value.get(name) for name in ("path", "type", "mode", "mtime_ns"))
        target = value.get("target", "")
        if not isinstance(path, str) or len(path) > MAX_PATH or kind not in {"file", "folder", "link"}:
            raise AgentProtocolError(f"agent sent entry {str(value)[:80]!r}: expected a path and a type")
        if not isinstance(mode, int) or not isinstance(mtime_ns, int) or abs(mtime_ns) >= 1 << 62:
            raise AgentProtocolError(f"agent sent entry {path[:80]!r}: expected a mode and a time")
        if not isinstance(target, str) or "\0" in target or len(target) > MAX_PATH or (kind == "link" and not target):
            raise AgentProtocolError(f"agent sent link {path[:80]!r}: expected a target")
        parts = tuple(_checked_name(name) for name in path.split("/")) if path else ()
        if len(parts) > MAX_DEPTH:
            raise AgentProtocolError(f"agent sent a path {len(parts)} folders deep: expected at most {MAX_DEPTH}")
        return cls(parts, kind, mode & 0o777, mtime_ns, target)


@dataclass(frozen=True, slots=True)
class _Folder:
    parts: tuple[str, ...]
    head: _Head


class _File:
    """A file that appears under its name when it is whole."""

    def __init__(self, parent: int, name: str, head: _Head) -> None:
        self._parent, self._name, self._head = parent, name, head
        self._beside = f".ostler-{os.getpid()}-{name}"[: MAX_NAME // 4]
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._beside, dir_fd=parent)
            self._fd = os.open(self._beside, flags, 0o600, dir_fd=parent)
        except OSError:
            os.close(parent)
            raise

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def finish(self) -> None:
        try:
            os.fchmod(self._fd, self._head.mode)
            os.utime(self._fd, ns=(self._head.mtime_ns, self._head.mtime_ns))
            os.rename(self._beside, self._name, src_dir_fd=self._parent, dst_dir_fd=self._parent)
        except OSError:
            self.discard()
            raise
        self._close()

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._beside, dir_fd=self._parent)
        self._close()

    def _close(self) -> None:
        for fd in (self._fd, self._parent):
            if fd >= 0:
                os.close(fd)
        self._fd = self._parent = -1


def _link(parent: int, name: str, head: _Head) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)
    os.symlink(head.target, name, dir_fd=parent)
    os.utime(name, ns=(head.mtime_ns, head.mtime_ns), dir_fd=parent, follow_symlinks=False)


def _descend(root: int, parts: tuple[str, ...]) -> int:
    """Return a new descriptor of a folder below `root`, reached without following any link."""
    current = os.dup(root)
    for name in parts:
        try:
            below = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=current)
        finally:
            os.close(current)
        current = below
    return current


def _checked_name(name: str) -> str:
    if name in {"", ".", ".."} or "/" in name or "\0" in name or len(os.fsencode(name)) > MAX_NAME:
        raise AgentProtocolError(f"agent sent name {name[:80]!r}: expected a file's name")
    return name


@contextlib.contextmanager
def _host_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(f"{place}: {error.strerror}") from error

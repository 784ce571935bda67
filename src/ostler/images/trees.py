"""Root trees on their way into a disk: unpacked from a tar stream without any privilege.

A plain user cannot give files to root or to groups of the guest, nor read what its mode forbids. So files are laid out
as this user's, readable to it, and what they should be is kept in a table that `rootdisk` writes into the file system
afterwards. Archives may be hostile: nothing is written outside of the folder, whatever names and links say.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ostler.errors import ImageError
from ostler.images.schema import OsRelease

_KINDS = {tarfile.DIRTYPE: stat.S_IFDIR, tarfile.SYMTYPE: stat.S_IFLNK, tarfile.FIFOTYPE: stat.S_IFIFO}


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the guest sees of a file: owner, group and the whole i_mode."""

    uid: int
    gid: int
    mode: int


@dataclass(slots=True)
class Tree:
    """A folder with a root tree, and the attributes of those paths (relative to it) that have their own.

    `owner` is what becomes root in the guest where the table says nothing: the user whose files these are.
    """

    path: Path
    attributes: dict[str, Attributes] = field(default_factory=dict)
    owner: tuple[int, int] = field(default_factory=lambda: (os.geteuid(), os.getegid()))

    def has(self, *names: str) -> bool:
        """Whether one of the paths is there, links looked up as the guest would."""
        return any(self.inside(name) is not None for name in names)

    def inside(self, name: str) -> Path | None:
        """Return the path on the host of what the guest calls `name`, or None; never leaves the tree."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        at, hops = self.path, 0
        while parts:
            part = parts.pop(0)
            if part == "..":
                at = at.parent if at != self.path else at
                continue
            at = at / part
            if at.is_symlink():
                hops += 1
                target = str(at.readlink())
                parts = [each for each in target.split("/") if each not in ("", ".")] + parts
                at = self.path if target.startswith("/") else at.parent
                if hops > 40:
                    return None
        return at if at.exists() else None

    def os_release(self) -> OsRelease:
        """Read /etc/os-release, as far as it can be read."""
        found = self.inside("etc/os-release")
        if found is None or not found.is_file():
            return OsRelease()
        return parse_os_release(found.read_text(errors="replace")[: 64 << 10])


def parse_os_release(text: str) -> OsRelease:
    """Take what the image's configuration keeps out of an os-release file."""
    values = {}
    for line in text.splitlines():
        name, found, value = line.partition("=")
        if found:
            values[name.strip()] = value.strip().strip("\"'")[:200]
    return OsRelease(
        id=values.get("ID", ""), version=values.get("VERSION_ID", ""), pretty_name=values.get("PRETTY_NAME", "")
    )


def unpack(stream: IO[bytes], folder: Path) -> Tree:
    """Lay the tar `stream` out in the empty folder `folder`. Device nodes are left out: the guest's kernel makes them.

    Raises:
        ImageError: the stream is no tar archive, is cut short, or names a place outside of it.
        OSError: the host's disk is full.
    """
    tree = Tree(folder)
    try:
        with tarfile.open(fileobj=stream, mode="r|*", errorlevel=1) as archive:
            archive.extractall(folder, members=_members(archive, tree), filter=_readable)
    except tarfile.FilterError as error:
        raise ImageError(f"archive: {error}") from error
    except (tarfile.TarError, EOFError) as error:
        raise ImageError(f"archive: not a whole tar archive ({error})") from error
    return tree


def _members(archive: tarfile.TarFile, tree: Tree) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        name = os.path.normpath(member.name.lstrip("/"))
        if member.isdev() and not member.isfifo():
            continue
        if not member.islnk():
            kind = _KINDS.get(member.type, stat.S_IFREG)
            tree.attributes[name] = Attributes(member.uid, member.gid, kind | stat.S_IMODE(member.mode))
        yield member


def _readable(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    kept = tarfile.tar_filter(member, folder)
    if member.islnk():  # the filter looks at where a file goes, not at what a hard link would bring in
        target = os.path.realpath(Path(folder) / member.linkname)
        if os.path.commonpath([target, os.path.realpath(folder)]) != os.path.realpath(folder):
            raise tarfile.LinkOutsideDestinationError(member, target)
    mode = (kept.mode or 0) | (0o700 if member.isdir() else 0o600)
    return kept.replace(mode=mode, uid=None, gid=None, uname=None, gname=None, deep=False)  # type: ignore[arg-type]

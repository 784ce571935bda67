"""Root trees on their way into a disk: unpacked from a tar stream without any privilege.

A plain user cannot give files to root or to groups of the guest, nor read what its mode forbids. So files are laid out
as this user's, readable to it, and what they should be is kept in a table that `rootdisk` writes into the file system
afterwards. Archives may be hostile: nothing is written outside of the folder, whatever names and links say.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import tarfile
import zlib
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

    tarfile reads; writing is done here, because its own filters are missing in Python 3.11 as Debian 12 has it.

    Raises:
        ImageError: the stream is no tar archive, is cut short, or names a place outside of it.
        OSError: the host's disk is full.
    """
    tree = Tree(folder)
    writer = _Writer(folder)
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                name = writer.write(archive, member)
                if name is None:
                    continue
                if member.islnk():
                    # One inode, and rootdisk meets whichever of its names comes first.
                    target = tree.attributes.get(os.path.normpath(member.linkname.lstrip("/")))
                    tree.attributes.update({name: target} if target else {})
                else:
                    kind = _KINDS.get(member.type, stat.S_IFREG)
                    tree.attributes[name] = Attributes(member.uid, member.gid, kind | stat.S_IMODE(member.mode))
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ImageError(f"archive: not a whole tar archive ({error})") from error
    return tree


class _Writer:
    """Writes members below one folder, and never through a link, whatever order an archive comes in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Folders that were seen to be real ones. They stay so: nothing here removes a folder.
        self._real = {folder}

    def write(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
        """Write one member; return its path relative to the folder, None for what is left out."""
        if member.isdev() and not member.isfifo():
            return None
        path = self._place(member.name)
        if member.isdir():
            self._make_folder(path)
            path.chmod(stat.S_IMODE(member.mode) | 0o700)
        else:
            self._make_folder(path.parent)
            if path.is_symlink() or path.exists():
                path.unlink()
            self._make(archive, member, path)
        if not member.issym() and not member.islnk():
            os.utime(path, (member.mtime, member.mtime))
        return str(path.relative_to(self._folder))

    def _make(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        if member.issym():
            path.symlink_to(member.linkname)
        elif member.islnk():
            target = self._place(member.linkname)
            self._make_folder(target.parent)
            if not target.is_symlink() and not target.is_file():
                raise ImageError(f"archive: {member.name!r} is a link to {member.linkname!r}, which is not there")
            os.link(target, path, follow_symlinks=False)
        elif member.isfifo():
            os.mkfifo(path, 0o600)
        else:
            content = archive.extractfile(member)
            with path.open("xb") as file:
                if content is not None:
                    shutil.copyfileobj(content, file, 1 << 20)
            if path.stat().st_size != member.size:
                raise tarfile.ReadError("unexpected end of data")
            path.chmod(stat.S_IMODE(member.mode) & 0o777 | 0o600)

    def _place(self, name: str) -> Path:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or "\0" in name:
            raise ImageError(f"archive: {name!r} leads outside of the tree")
        return self._folder.joinpath(*parts)

    def _make_folder(self, path: Path) -> None:
        if path in self._real:
            return
        self._make_folder(path.parent)
        try:
            path.mkdir(mode=0o755)
        except FileExistsError:
            if path.is_symlink() or not path.is_dir():
                name = path.relative_to(self._folder)
                raise ImageError(
                    f"archive: {str(name)!r} is a folder and a link or file, which may lead outside"
                ) from None
        self._real.add(path)

"""The peer: QEMU's TCG, the one on PATH, the one that `QEMU=` names, or a later Debian release's in a folder.

A QEMU from another release runs in a chroot of its own tree, which needs root and no installation.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostler.errors import BadRequest, ImageError
from ostler.images import apt, cache

PROGRAM = "qemu-system-x86_64"
FROM_RELEASE = {"debian-13": "trixie"}


@dataclass(frozen=True, slots=True)
class Peer:
    """How to call a QEMU, and how files get where it sees them."""

    name: str
    program: tuple[str, ...]
    tree: Path | None = None

    def file(self, path: Path) -> str:
        """The path under which this QEMU finds the file; in a tree it is copied there once."""
        if self.tree is None:
            return str(path)
        inside = self.tree / "files" / f"{path.parent.name}-{path.name}"
        if not inside.exists():
            inside.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, inside)
        return f"/files/{inside.name}"


def find(wanted: str | None, until: ExitStack) -> Peer | None:
    """The QEMU wanted: a program, `debian-13`, or None for `QEMU` in the environment and then PATH.

    A tree that it needs goes when `until` ends.

    Raises:
        BadRequest: no such program.
        ImageError: mmdebstrap failed.
    """
    wanted = wanted or os.environ.get("QEMU")
    if wanted in FROM_RELEASE:
        return _from_release(FROM_RELEASE[wanted], until)
    program = shutil.which(wanted or PROGRAM)
    if program is None:
        if wanted:
            raise BadRequest(f"QEMU {wanted!r}: no such program, expected one or {', '.join(FROM_RELEASE)}")
        return None
    return Peer(_version((program,)), (program,))


def _from_release(release: str, until: ExitStack) -> Peer:
    def build(folder: Path) -> dict[str, Any]:
        command = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=qemu-system-x86,seabios", release]
        sources = "\n".join(apt.host_sources(release)) + "\n"
        done = subprocess.run(
            [*command, str(folder / "tree.tar"), "-"], input=sources, text=True, capture_output=True, check=False
        )
        if done.returncode != 0:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ImageError(f"mmdebstrap {release}: status {done.returncode}: {why}")
        return {"release": release}

    archive = cache.obtain(f"peer/{release}", build).path / "tree.tar"
    tree = Path(until.enter_context(tempfile.TemporaryDirectory(dir=cache.root(), ignore_cleanup_errors=True)))
    subprocess.run(["tar", "-C", str(tree), "-xf", str(archive)], check=True)
    program = ("chroot", str(tree), f"/usr/bin/{PROGRAM}")
    return Peer(_version(program), program, tree)


def _version(program: tuple[str, ...]) -> str:
    text = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version ([\d.]+)", text)
    return f"QEMU {found[1] if found else 'of unknown version'} TCG"

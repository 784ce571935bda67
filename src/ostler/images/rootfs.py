"""A Debian tree as an initrd: `mmdebstrap` makes the tree, busybox's cpio packs it.

For guests that want a real user land before Ostler has disks. Everything in it belongs to root and there are no device
nodes (devtmpfs brings them), so building needs no root. The archive is not compressed: a guest on the software CPU
copies it much faster than it unpacks it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ostler.errors import ImageError
from ostler.images import apt, cache, initrd
from ostler.images.progress import Progress, silent

_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*")


def debian(
    packages: Sequence[str],
    files: Mapping[str, bytes],
    *,
    checksums: int = 0,
    release: str = "bookworm",
    progress: Progress = silent,
) -> Path:
    """Return an initrd with Debian's minimal system, `packages`, and `files` (path in the guest → content).

    `files` are executable; one of them should be `init`. Static busybox lies in the guest as `bin/busybox`, and
    `sums` holds what `sha256sum` says on the host of `checksums` of the tree's files, spread over all of it.

    Raises:
        ImageError: mmdebstrap is missing or failed.
    """
    if shutil.which("mmdebstrap") is None:
        raise ImageError("mmdebstrap: not on this host, and Debian trees are made with it (apt-get install mmdebstrap)")
    program = initrd.busybox_program(progress)
    contents = {**files, "bin/busybox": program.read_bytes()}
    wanted = [
        release,
        sorted(packages),
        checksums,
        {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    ]
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]

    def build(folder: Path) -> dict[str, Any]:
        progress(f"building a Debian {release} tree with {', '.join(packages)}")
        with tempfile.TemporaryDirectory(dir=cache.root(), ignore_cleanup_errors=True) as scratch:
            tree = Path(scratch) / "tree"
            tree.mkdir()
            _bootstrap(release, packages, tree)
            for name, data in contents.items():
                path = tree / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                path.chmod(0o755)
            (tree / "sums").write_text(_checksums(tree, checksums))
            progress("packing the tree")
            (folder / "initrd.img").write_bytes(initrd.pack(tree, program))
        return {"release": release, "packages": list(packages)}

    return cache.obtain(f"rootfs/{key}", build, progress).path / "initrd.img"


def _bootstrap(release: str, packages: Sequence[str], tree: Path) -> None:
    command = ["mmdebstrap", "--quiet", "--variant=minbase", "--architectures=amd64", "--format=tar"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    # Java's packages put links among the manual pages and fail where there is no folder for them.
    command += ['--essential-hook=mkdir -p "$1/usr/share/man/man1"']
    command += [f"--include={','.join(packages)}", release, "-", "-"]
    sources = "\n".join(apt.host_sources(release)) + "\n"
    with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as given:
        given.write(sources.encode())
        given.seek(0)
        with subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=log) as process:
            assert process.stdout is not None
            # Nothing comes where mmdebstrap fails, and its status says so better than an empty archive.
            with (
                contextlib.suppress(tarfile.ReadError),
                tarfile.open(fileobj=process.stdout, mode="r|") as archive,
            ):
                archive.extractall(tree, filter=_without_nodes)
            process.stdout.read()
        if process.returncode != 0:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise ImageError(f"mmdebstrap {release}: status {process.returncode}: {lines[-1]}")


def _checksums(tree: Path, count: int) -> str:
    files = sorted(path for path in (tree / "usr").rglob("*") if path.is_file() and not path.is_symlink())
    chosen = files[:: max(1, len(files) // count)][:count] if count else []
    return "".join(f"{cache.sha256(path)}  {path.relative_to(tree)}\n" for path in chosen)


def _without_nodes(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    if member.isdev():
        return None
    # The tree is Debian's own and links may be absolute in it; nothing follows them here.
    kept = tarfile.fully_trusted_filter(member, path)
    return kept.replace(uid=None, gid=None, uname=None, gname=None, deep=False)  # type: ignore[arg-type]

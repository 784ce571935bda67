"""The busybox initrd: something for a kernel to run, a megabyte in all.

Debian's static busybox, `data/init` as the first process, and the kernel's panic-notification modules where the kernel
is one of Ostler's. The archive is written by busybox's own `cpio`, so the host needs none; device nodes are left out
because the kernel brings `/dev/console` itself and devtmpfs the rest, and so nothing here needs root.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ostler.errors import ImageError
from ostler.images import cache
from ostler.images.apt import Apt
from ostler.images.kernels import Kernel
from ostler.images.progress import Progress, silent

BUSYBOX_RELEASE = "bookworm"
_LINKS = ("sh", "mount", "cat", "awk", "uname", "stty", "setsid", "cttyhack", "insmod", "poweroff", "sync")


def busybox_program(progress: Progress = silent) -> Path:
    """Return Debian's static busybox, fetching it where the cache has none."""

    def build(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
            package, fields = Apt(BUSYBOX_RELEASE).download("busybox-static", Path(scratch), progress)
            subprocess.run(["dpkg-deb", "--extract", package, Path(scratch) / "tree"], check=True)
            # Releases differ in whether /bin is a folder of its own.
            found = next(p for p in (Path(scratch) / "tree").rglob("busybox") if p.is_file() and p.parent.name == "bin")
            shutil.copy2(found, folder / "busybox")
            return {"version": fields["Version"], "package_sha256": cache.sha256(package)}

    return cache.obtain("busybox", build, progress).path / "busybox"


def busybox(kernel: Kernel | None = None, progress: Progress = silent) -> Path:
    """Return the initrd for `kernel`, or, without one, an initrd that suits every kernel.

    Raises:
        ImageError: busybox cannot be fetched, or the archive cannot be written.
    """
    program = busybox_program(progress)
    files = {"init": resources.files("ostler.images").joinpath("data/init").read_bytes()}
    if kernel:  # below the release's name, so that another kernel never meets modules that are not its own
        files |= {f"modules/{kernel.release}/{module.name}": module.read_bytes() for module in kernel.modules}
    return build({**files, "bin/busybox": program.read_bytes()}, program=program, progress=progress)


def build(files: Mapping[str, bytes], *, program: Path | None = None, progress: Progress = silent) -> Path:
    """Return a gzipped newc archive of `files` (path in the guest → content), all executable and root's.

    The cache keys it by its content, so the same files are packed once.
    """
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    packer = program or busybox_program(progress)

    def write(folder: Path) -> dict[str, Any]:
        progress("packing the initrd")
        with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
            _lay_out(Path(scratch), files)
            (folder / "initrd.img").write_bytes(gzip.compress(pack(Path(scratch), packer), mtime=0))
        return {"files": sorted(files)}

    return cache.obtain(f"initrd/{digest.hexdigest()[:16]}", write, progress).path / "initrd.img"


def pack(tree: Path, program: Path) -> bytes:
    """Return the folder `tree` as a newc archive whose files all belong to root.

    Raises:
        ImageError: busybox's cpio failed.
    """
    names = "\0".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*"))) + "\0"
    done = subprocess.run(
        [program, "cpio", "-o", "-0", "-H", "newc", "-R", "0:0"],
        cwd=tree, input=names.encode(), capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise ImageError(f"cpio: {done.stderr.decode(errors='replace').strip() or 'failed'}")
    return done.stdout


def _lay_out(tree: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o755)
    for link in _LINKS:
        if not (tree / "bin" / link).exists():
            (tree / "bin").mkdir(exist_ok=True)
            (tree / "bin" / link).symlink_to("busybox")

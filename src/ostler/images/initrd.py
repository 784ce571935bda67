"""Initrds. The busybox one: something for a kernel to run. The agent's: the way to a root disk and to the host.

The busybox initrd is a megabyte in all: Debian's static busybox, `data/init` as the first process, and the kernel's
panic-notification modules where the kernel is one of Ostler's. The archives are written by busybox's own `cpio`, so the
host needs none; device nodes are left out because the kernel brings `/dev/console` itself and devtmpfs the rest, and so
nothing here needs root.

The agent's initrd is the agent as `/init`, modules in `/modules` and their dependencies in `/modules/dep`. It is not
compressed: unpacking would cost the guest's processor more than the host's memory is worth.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ostler.errors import BadRequest, ImageError
from ostler.images import cache, kernels, modules
from ostler.images.apt import Apt
from ostler.images.kernels import Kernel
from ostler.images.progress import Progress, silent

BUSYBOX_RELEASE = "bookworm"
# What a virtual machine's devices need; the agent loads those whose device is there.
AGENT_MODULES = (
    "virtio_pci", "virtio_blk", "vmw_vsock_virtio_transport", "virtio_net", "virtio_console", "virtio_rng",
    "virtio_balloon", "virtio_scsi", "sd_mod", "virtiofs", "9pnet_virtio", "9p", "overlay", "pvpanic", "pvpanic_mmio",
    "button", "evdev",
)  # fmt: skip
# File systems a root may have. The large ones (btrfs, xfs) are megabytes that every guest would unpack at its start.
ROOT_FILE_SYSTEMS = ("ext4", "squashfs", "erofs")
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


def agent_program() -> Path:
    """Return the agent, the static program that runs inside guests; `OSTLER_AGENT` names another.

    Raises:
        BadRequest: this installation has none.
    """
    chosen = os.environ.get("OSTLER_AGENT")
    program = Path(chosen) if chosen else Path(str(resources.files("ostler"))) / "agent" / "data" / "ostler-agent"
    if not program.is_file():
        raise BadRequest(
            f"agent {program}: not there; guests with an image need it. Install Rust and install Ostler again, "
            "or name one by OSTLER_AGENT"
        )
    return program


def agent_initrd(
    kernel: Kernel | Path,
    progress: Progress = silent,
    *,
    file_systems: Sequence[str] = ROOT_FILE_SYSTEMS,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Return the initrd that brings a guest to its root disk and its agent to the host.

    `kernel` is one of Ostler's, or a `lib/modules/<release>` folder with depmod's `modules.dep`.
    `file_systems` are those the root may have. `files` (path in the guest → content) go in as well, for guests that
    stay in their initrd.

    Raises:
        BadRequest: this installation has no agent.
        ImageError: the modules cannot be read, or the archive cannot be written.
    """
    tree = kernel
    if isinstance(kernel, Kernel):
        tree = kernels.module_tree(kernel, progress) / "lib" / "modules" / kernel.release
    assert isinstance(tree, Path)
    program = agent_program()
    found = modules.closure(tree, (*AGENT_MODULES, *file_systems))
    # What the archive is made of, without reading it all: a start may not cost more than a look.
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path, _ in found.values()]
    extra = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in (files or {}).items())
    key = hashlib.sha256(repr((str(tree), cache.sha256(program), stamps, extra)).encode()).hexdigest()[:16]

    def write(folder: Path) -> dict[str, Any]:
        progress("packing the agent's initrd")
        packed = {"init": program.read_bytes(), **(files or {})}
        packed |= {f"modules/{name}.ko": modules.content(path) for name, (path, _) in found.items()}
        packed["modules/dep"] = "".join(f"{name}: {' '.join(needs)}\n" for name, (_, needs) in found.items()).encode()
        with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
            _lay_out(Path(scratch), packed, links=())
            (folder / "initrd.img").write_bytes(pack(Path(scratch), busybox_program(progress)))
        return {"modules": list(found)}

    return cache.obtain(f"initrd/agent-{key}", write, progress).path / "initrd.img"


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


def _lay_out(tree: Path, files: Mapping[str, bytes], links: Iterable[str] = _LINKS) -> None:
    for name, content in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o755)
    for link in links:
        if not (tree / "bin" / link).exists():
            (tree / "bin").mkdir(exist_ok=True)
            (tree / "bin" / link).symlink_to("busybox")

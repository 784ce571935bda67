"""Debian's kernels: which there are, how to fetch one, what a fetched one consists of.

A kernel is taken out of its package as it is: `vmlinuz`, the build's `config`, and the few modules the default initrd
loads. The package is kept beside them, because the module tree (hundreds of MiB for the generic kernel) stays in it
until something needs it, and by then the archive may have only a newer one. The order of modules is depmod's.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ostler.errors import BadRequest, ImageError
from ostler.images import cache, tools
from ostler.images.apt import Apt
from ostler.images.progress import Progress, silent

# In loading order. Debian builds panic notification as modules; without it a panicking guest just stands still.
GUEST_MODULES = ("pvpanic", "pvpanic-mmio")
_PACKAGE = "package.deb"
_MODULE_FILE = re.compile(rf"/({'|'.join(GUEST_MODULES)})\.ko(\.xz)?$")


@dataclass(frozen=True, slots=True)
class KernelSource:
    """Where a kernel comes from: a package of a Debian release that depends on the newest real one."""

    name: str
    release: str
    package: str
    summary: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """A fetched kernel. `release` is what `uname -r` says in the guest."""

    name: str
    release: str
    package_version: str
    image: Path
    config: Path
    modules: tuple[Path, ...]
    package: Path
    package_sha256: str


KERNELS = {
    source.name: source
    for source in (
        KernelSource("debian-12-cloud", "bookworm", "linux-image-cloud-amd64", "Debian 12, 6.1, for virtual machines"),
        KernelSource("debian-12", "bookworm", "linux-image-amd64", "Debian 12, 6.1, for any machine"),
        KernelSource("debian-13-cloud", "trixie", "linux-image-cloud-amd64", "Debian 13, 6.12, for virtual machines"),
        KernelSource("debian-13", "trixie", "linux-image-amd64", "Debian 13, 6.12, for any machine"),
    )
}
DEFAULT_KERNEL = "debian-12-cloud"


def fetch(name: str = DEFAULT_KERNEL, progress: Progress = silent) -> Kernel:
    """Return the kernel `name`, fetching it where the cache has none.

    Raises:
        BadRequest: there is no kernel of that name.
        ImageError: it cannot be fetched or unpacked.
    """
    source = KERNELS.get(name)
    if source is None:
        raise BadRequest(f"kernel {name!r}: not known; expected one of {', '.join(KERNELS)}")

    def build(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
            package, fields = _fetch_package(source, Path(scratch), progress)
            progress(f"unpacking {package.name}")
            release = _unpack(package, folder)
            facts = {"release": release, "package": fields["Package"], "version": fields["Version"]}
            package.rename(folder / _PACKAGE)
            return {**facts, "package_sha256": cache.sha256(folder / _PACKAGE)}

    def accept(entry: cache.Entry) -> bool:
        return (entry.path / _PACKAGE).exists()

    return _kernel(source, cache.obtain(f"kernels/{name}", build, progress, accept=accept))


def module_tree(kernel: Kernel, progress: Progress = silent) -> Path:
    """Return a folder with all modules of `kernel` in `lib/modules/<release>`, with depmod's `modules.dep`.

    Modules are as their package has them: some releases compress them (`.ko.xz`).

    Raises:
        ImageError: depmod is missing, or the package cannot be unpacked.
    """

    def build(folder: Path) -> dict[str, Any]:
        progress(f"unpacking the modules of {kernel.release}")
        _unpack_modules(kernel, folder)
        tools.run(["depmod", "-b", folder, kernel.release], package="kmod")
        return {"release": kernel.release, "package_sha256": kernel.package_sha256}

    name = f"modules/{kernel.release}-{kernel.package_sha256[:12]}"
    return cache.obtain(name, build, progress).path


def cached() -> Iterator[Kernel]:
    """Yield the kernels that are in the cache, whole."""
    for source in KERNELS.values():
        if entry := cache.find(f"kernels/{source.name}"):
            yield _kernel(source, entry)


def _kernel(source: KernelSource, entry: cache.Entry) -> Kernel:
    modules = tuple(entry.path / "modules" / f"{module}.ko" for module in GUEST_MODULES)
    return Kernel(
        name=source.name,
        release=entry.facts["release"],
        package_version=entry.facts["version"],
        image=entry.path / "vmlinuz",
        config=entry.path / "config",
        modules=tuple(module for module in modules if module.exists()),
        package=entry.path / _PACKAGE,
        package_sha256=entry.facts.get("package_sha256", ""),
    )


def _fetch_package(source: KernelSource, into: Path, progress: Progress) -> tuple[Path, dict[str, str]]:
    apt = Apt(source.release)
    dependencies = apt.show(source.package, progress).get("Depends", "")
    real = re.match(r"linux-image-[0-9]\S*", dependencies)
    if real is None:
        raise ImageError(f"apt: {source.package} of {source.release} depends on {dependencies!r}, not on a kernel")
    return apt.download(real[0], into, progress)


def _unpack(package: Path, folder: Path) -> str:
    """Take the wanted files out of a kernel's package; return the kernel's release."""
    release = None
    (folder / "modules").mkdir()
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is None:
                    continue
                if member.name.startswith("./boot/vmlinuz-"):
                    release = member.name.removeprefix("./boot/vmlinuz-")
                    _write(folder / "vmlinuz", content)
                elif member.name.startswith("./boot/config-"):
                    _write(folder / "config", content)
                elif found := _MODULE_FILE.search(member.name):
                    _write(folder / "modules" / f"{found[1]}.ko", content, packed=bool(found[2]))
        process.stdout.read()  # dpkg-deb pads the archive; closing early would end it by a signal
    if process.returncode != 0 or release is None:
        raise ImageError(f"{package.name}: dpkg-deb gave status {process.returncode}; no whole kernel in the package")
    return release


def _unpack_modules(kernel: Kernel, folder: Path) -> None:
    place = f"lib/modules/{kernel.release}/"  # below /usr in newer releases
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", kernel.package], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                _, found, name = member.name.partition(place)
                content = archive.extractfile(member) if found and member.isfile() else None
                if content is not None:
                    path = folder / place / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("wb") as file:
                        shutil.copyfileobj(content, file)
        process.stdout.read()
    if process.returncode != 0 or not (folder / place).is_dir():
        raise ImageError(f"{kernel.package}: dpkg-deb gave status {process.returncode}; no modules in the package")


def _write(path: Path, content: IO[bytes], *, packed: bool = False) -> None:
    path.write_bytes(lzma.decompress(content.read()) if packed else content.read())

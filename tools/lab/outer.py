"""What the lab's outer guest is made of: an initrd, and a Debian disk with Python, what Ostler needs and a guest image.

Both come from Debian's and Python's archives once and then from the cache. The disk holds Python's files compiled, by
its own Python: under an emulated processor compiling takes longer than running.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from ostler.images import bootstrap, cache, initrd, kernels, modules, rootdisk, store, trees

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
KERNEL, RELEASE = "debian-12", "bookworm"
PYTHON = "3.11"
PACKAGES = ("python3", "binutils", "passt")
TEST_PACKAGES = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "pip", "hatchling", "setuptools")
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "ext4", "crc32c_generic", "9pnet_virtio", "9p", "kvm_amd")
DISK_BYTES = 3 << 30
# The guest image that is in the lab's cache.
IMAGE = "debian"
VERSION = 2


def say(step: str, fraction: float | None = None) -> None:  # noqa: ARG001 - a listener of images' progress
    """Progress on standard error."""
    print(f"lab: {step}", file=sys.stderr, flush=True)


def dependencies() -> list[str]:
    """Return what pip must put into the lab: the package's own requirements and the tests' tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *TEST_PACKAGES]


def disk() -> Path:
    """Return the outer guest's root disk, an ext4 file system."""
    image = store.ensure(IMAGE, say)
    wanted = {"version": VERSION, "packages": PACKAGES, "python": dependencies(), "image": image.digest}
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]

    def build(folder: Path) -> dict[str, Any]:
        say("building the lab's disk")
        (folder / "tree").mkdir()
        tree = bootstrap.debian(RELEASE, PACKAGES, lambda stream: trees.unpack(stream, folder / "tree"), progress=say)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        install += ["--target", str(tree.path / "lab/site"), "--python-version", PYTHON, "--only-binary", ":all:"]
        subprocess.run([*install, *dependencies()], check=True)
        compile_python(tree)
        put_image(image, tree.path / "lab/cache/images")
        rootdisk.build(tree, folder / "disk.ext4", size_bytes=DISK_BYTES, progress=say)
        subprocess.run(["rm", "-rf", tree.path], check=True)
        return {"packages": list(PACKAGES), "python": dependencies()}

    return cache.obtain(f"lab/disk-{key}", build, say).path / "disk.ext4"


def put_image(image: store.Image, images: Path) -> None:
    """Copy an image into another store, its disk's holes as holes."""
    (images / "names").mkdir(parents=True)
    (images / "sha256").mkdir()
    subprocess.run(["cp", "-r", "--sparse=always", str(image.path), str(images / "sha256")], check=True)
    shutil.copy(store.root() / "names" / f"{image.name}.json", images / "names")


def compile_python(tree: trees.Tree) -> None:
    """Compile every Python file of the tree by the tree's own Python, which needs neither root nor a chroot."""
    loader, program = tree.inside("lib64/ld-linux-x86-64.so.2"), tree.inside("usr/bin/python3")
    libraries = [str(found) for name in ("lib", "usr/lib") if (found := tree.inside(f"{name}/x86_64-linux-gnu"))]
    assert loader, "no loader in the tree"
    assert program, "no Python in the tree"
    folders = [str(tree.path / name) for name in ("lab/site", f"usr/lib/python{PYTHON}", "usr/lib/python3")]
    say("compiling the lab's Python files")
    subprocess.run(
        [
            str(loader),
            "--library-path",
            ":".join(libraries),
            str(program),
            "-m",
            "compileall",
            "-q",
            "-j2",
            "--invalidation-mode",
            "unchecked-hash",
            "-s",
            str(tree.path),
            "-p",
            "/",
            *(folder for folder in folders if Path(folder).is_dir()),
        ],
        env={"PYTHONHOME": str(tree.path / "usr")},
        check=False,
        capture_output=True,
    )  # fmt: skip - some packages carry files that are no Python of this version


def boot_image() -> Path:
    """Return the initrd: busybox, `first`, and the modules in loading order."""
    kernel = kernels.fetch(KERNEL, say)
    files = modules.in_order(kernels.module_tree(kernel, say) / "lib/modules" / kernel.release, MODULES)
    files |= {"init": (HERE / "first").read_bytes(), "bin/busybox": initrd.busybox_program(say).read_bytes()}
    return initrd.build(files, progress=say)

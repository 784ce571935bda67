"""`make test-kvm`: Ostler on a real KVM where the host has none, by nesting.

QEMU's TCG emulates AMD's SVM with nested paging, so a Debian guest under it loads kvm-amd and has a /dev/kvm with real
KVM semantics. The lab's outer guest runs from one initrd in three parts: a Debian tree and the Python packages Ostler
needs (cached), and this tree's sources with the kernels to boot (made anew each time). It installs Ostler without any
cargo, runs tests/accel and boots guests; `lab/steps` says it in order. Its console is the protocol: `LAB step status
seconds` lines.

Exit status 0 when every step passed, 1 when one failed, 77 (a visible skip) where this host lacks QEMU.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

from ostler.images import cache, initrd, kernels, rootfs
from ostler.images.apt import Apt

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent / "lab"
QEMU = "qemu-system-x86_64"
OUTER_KERNEL = "debian-12"
INNER_KERNELS = ("debian-12-cloud", "debian-13-cloud")
TOP_MODULE = "kvm-amd"
PACKAGES = ("python3", "binutils", "kmod", "iproute2")
TEST_PACKAGES = ("pytest", "pytest-timeout", "hypothesis", "pip", "hatchling", "setuptools")
SOURCES = ("src", "tests", "tools", "pyproject.toml", "README.md", "LICENSE", "rust/Cargo.toml")
LINE = re.compile(r"^LAB (\S+) (\d+) ([\d.]+)\s*$")
TIME_LIMIT_S = 1500
SKIPPED = 77


def say(step: str, fraction: float | None = None) -> None:  # noqa: ARG001 - a listener of images' progress
    """Progress on standard error."""
    print(f"lab: {step}", file=sys.stderr, flush=True)


def dependencies() -> list[str]:
    """Return what pip must put into the lab: the package's own requirements and the tests' tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *TEST_PACKAGES]


def site_packages() -> Path:
    """Return an archive with the Python packages of the lab below /lab/site, from the cache."""
    wanted = dependencies()
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]

    def build(folder: Path) -> dict[str, Any]:
        say("fetching the lab's Python packages")
        with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            command += ["--target", f"{scratch}/lab/site", "--python-version", "3.11", "--only-binary", ":all:"]
            subprocess.run([*command, *wanted], check=True)
            (folder / "site.cpio").write_bytes(initrd.pack(Path(scratch), initrd.busybox_program()))
        return {"packages": wanted}

    return cache.obtain(f"lab/site-{key}", build, say).path / "site.cpio"


def modules() -> Path:
    """Return a folder with the KVM modules of the outer kernel and their order, from the cache."""
    outer = kernels.fetch(OUTER_KERNEL, say)

    def build(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
            package, _ = Apt("bookworm").download(f"linux-image-{outer.release}", Path(scratch), say)
            subprocess.run(["dpkg-deb", "--extract", package, f"{scratch}/tree"], check=True)
            found = {path.name.split(".")[0]: path for path in Path(scratch, "tree").rglob("*.ko*")}
            order = list(dict.fromkeys(ordered(TOP_MODULE, found)))
            for name in order:
                (folder / f"{name}.ko").write_bytes(unpacked(found[name]))
            (folder / "order").write_text("".join(f"{name}.ko\n" for name in order))
        return {"release": outer.release, "modules": order}

    return cache.obtain(f"lab/modules-{outer.release}", build, say).path


def unpacked(module: Path) -> bytes:
    """Return a module's ELF file; some releases keep them packed."""
    content = module.read_bytes()
    return lzma.decompress(content) if module.suffix == ".xz" else content


def ordered(name: str, found: dict[str, Path]) -> Iterator[str]:
    """Yield the modules `name` needs, each after what it needs itself, by the ELF files' `.modinfo`."""
    section = ELFFile(io.BytesIO(unpacked(found[name]))).get_section_by_name(".modinfo")
    assert section is not None, f"{name}: no .modinfo, so not a kernel module"
    fields = dict(entry.partition("=")[::2] for entry in section.data().decode(errors="replace").split("\0"))
    for needed in filter(None, fields.get("depends", "").split(",")):
        match = next(known for known in found if known.replace("_", "-") == needed.replace("_", "-"))
        yield from ordered(match, found)
    yield name


def payload(turns: int) -> bytes:
    """Return the archive of this tree's sources, the steps, the modules and the kernels to boot."""
    with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
        lab = Path(scratch) / "lab"
        for name in SOURCES:
            target = lab / "src" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            else:
                shutil.copy2(ROOT / name, target)
        shutil.copy2(HERE / "steps", lab / "steps")
        shutil.copytree(modules(), lab / "modules")
        (lab / "kernels").mkdir()
        for name in INNER_KERNELS:
            shutil.copy2(kernels.fetch(name, say).image, lab / "kernels" / name)
        shutil.copy2(initrd.busybox(progress=say), lab / "kernels" / "initrd.img")
        (lab / "kernels" / "list").write_text("\n".join(INNER_KERNELS) + "\n")
        (lab / "turns").write_text(f"{turns}\n")
        return initrd.pack(Path(scratch), initrd.busybox_program(say))


def command(image: Path) -> list[str]:
    """Return QEMU's command line."""
    outer = kernels.fetch(OUTER_KERNEL, say)
    return [
        QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "6144", "-nographic", "-no-reboot",
        "-nodefaults", "-serial", "stdio", "-kernel", str(outer.image), "-initrd", str(image),
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=unstable",
    ]  # fmt: skip


def run(image: Path) -> dict[str, tuple[int, float]]:
    """Run the lab, showing its console; return status and seconds by step."""
    steps: dict[str, tuple[int, float]] = {}
    deadline = time.monotonic() + TIME_LIMIT_S
    with subprocess.Popen(command(image), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                          errors="replace") as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line.rstrip(), flush=True)
                if found := LINE.match(line):
                    steps[found[1]] = (int(found[2]), float(found[3]))
                if time.monotonic() > deadline:
                    say(f"not finished after {TIME_LIMIT_S} s: stopped")
                    break
        finally:
            process.kill()
    return steps


def main() -> int:
    """Build what is missing, run the lab, sum it up."""
    arguments = argparse.ArgumentParser(prog="make test-kvm", description=__doc__.partition("\n")[0])
    arguments.add_argument("--turns", type=int, default=1, help="boots of each kernel and number of vCPUs (default 1)")
    turns = arguments.parse_args().turns
    for tool in (QEMU, "mmdebstrap"):
        if shutil.which(tool) is None:
            say(f"SKIPPED: {tool} is not on this host (apt-get install qemu-system-x86 mmdebstrap)")
            return SKIPPED
    started = time.monotonic()
    base = rootfs.debian(PACKAGES, {"init": (HERE / "guest-init").read_bytes()}, progress=say)
    with tempfile.TemporaryDirectory(dir=cache.root()) as scratch:
        image = Path(scratch) / "lab.img"
        with image.open("wb") as out:
            for part in (base.read_bytes(), site_packages().read_bytes(), payload(turns)):
                out.write(part)
                out.write(bytes(-len(part) % 4))
        say(f"booting the lab ({image.stat().st_size >> 20} MiB)")
        steps = run(image)
    failed = [name for name, (status, _) in steps.items() if status != 0]
    expected = {"kvm", "install", "conformance"} | {
        f"boot:{kernel}:{cpus}:{turn + 1}" for kernel in INNER_KERNELS for cpus in (1, 2) for turn in range(turns)
    }
    failed += [f"{name} (never ran)" for name in sorted(expected - steps.keys())]
    for name, (status, seconds) in steps.items():
        print(f"  {'ok  ' if status == 0 else 'FAIL'} {name} {seconds} s")
    say(f"{time.monotonic() - started:.0f} s in all" + (f"; failed: {', '.join(failed)}" if failed else "; all passed"))
    print(f"lab: {len(expected) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

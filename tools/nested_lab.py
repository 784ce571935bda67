"""`make test-kvm`: Ostler on a real KVM where the host has none, by nesting.

QEMU's TCG emulates AMD's SVM with nested paging, so a Debian guest under it loads kvm-amd and has a /dev/kvm with real
KVM semantics. The lab's outer guest (`lab/outer.py`) has a disk with Debian, Python and the packages Ostler needs; this
tree's sources, the kernels to boot and saved guests reach it by a folder of the host's. It installs Ostler without any
cargo, runs tests/accel, boots guests, and takes over guests that the host's software CPU began; those it began itself
go on here afterwards. `lab/steps` says it in order. Its console is the protocol: `LAB step status seconds` lines.

Now and then the emulated machine stands still as a whole, clocks, consoles and limits of time included. Its `steps` say
every ten seconds that it lives; one that is silent is ended, and another one does what is left, which is said loudly.

Exit status 0 when every step passed, 1 when one failed, and with one line also 0 where this host cannot have a lab.
"""

from __future__ import annotations

import argparse
import queue
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

from lab import carry, outer
from lab.outer import HERE, ROOT, say
from ostler.errors import OstlerError
from ostler.host.folders import cache_root
from ostler.images import initrd, kernels

QEMU = "qemu-system-x86_64"
QEMU_DATA = (Path("/usr/share/qemu"), Path("/usr/share/seabios"))
QEMU_FILES = ("bios-256k.bin", "bios-microvm.bin", "kvmvapic.bin", "linuxboot_dma.bin", "multiboot_dma.bin")
NEEDED = {QEMU: "qemu-system-x86", "mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs"}
INNER_KERNELS = ("debian-12-cloud", "debian-13-cloud")
SOURCES = ("src", "tests", "tools", "benches", "pyproject.toml", "README.md", "LICENSE", "rust/Cargo.toml")
LINE = re.compile(r"LAB (\S+) (\d+) ([\d.]+)\s*$")
TIME_LIMIT_S = 1500
SILENCE_LIMIT_S = 120
LABS_AT_MOST = 3
# What another lab must do again: its disk is as the first one's was at the beginning.
ALWAYS = {"kvm", "install"}
MEMORY_MIB = 4096
# What the processor that QEMU 7.2 emulates lacks of Ostler's default model: a guest to be carried does without.
WITHOUT = (
    "3dnowprefetch,bhi_ctrl,bhi_no,fbsdp_no,fsrm,ibrs_all,invpcid,nonstop_tsc,pbrsb_no,pcid,psdp_no,rdseed,"
    "sbdr_ssdp_no,sha_ni,spec_ctrl,taa_no,xsavec,xsaves"
)

Steps = dict[str, tuple[int, float]]


def prepare(share: Path, arguments: argparse.Namespace) -> None:
    """Fill the folder that the lab sees as /share."""
    for name in SOURCES:
        target = share / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy2(ROOT / name, target)
    shutil.copy2(HERE / "steps", share / "steps")
    (share / "kernels").mkdir()
    for name in INNER_KERNELS:
        shutil.copy2(kernels.fetch(name, say).image, share / "kernels" / name)
    shutil.copy2(initrd.busybox(progress=say), share / "kernels" / "initrd.img")
    # What Ostler would fetch where it is missing; the lab has no network.
    shutil.copytree(initrd.busybox_program(say).parent, share / "cache" / "busybox")
    programs = cache_root() / "programs"
    if programs.is_dir():
        shutil.copytree(programs, share / "programs")
    (share / "carry").mkdir()
    image = initrd.build({"init": carry.WORKLOAD, "bin/busybox": initrd.busybox_program(say).read_bytes()})
    shutil.copy2(image, share / "carry" / "initrd.img")
    if arguments.peer:
        copy_qemu(share / "qemu")
    settings = {
        "TESTS": "" if arguments.no_tests else "1", "TURNS": arguments.turns, "CARRIES": arguments.carries,
        "AT_ONCE": arguments.at_once, "KERNELS": " ".join(INNER_KERNELS), "WITHOUT": WITHOUT,
        "PEER": "1" if arguments.peer else "",
    }  # fmt: skip
    (share / "settings").write_text("".join(f"{name}='{value}'\n" for name, value in settings.items()))


def copy_qemu(folder: Path) -> None:
    """Put this host's QEMU into the lab, with its libraries but for the C library, which the lab has."""
    (folder / "lib").mkdir(parents=True)
    program = shutil.which(QEMU)
    assert program
    shutil.copy2(program, folder / f"{QEMU}.bin")
    found = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for path in re.findall(r"=> (/\S+)", found):
        if not re.match(r"(libc|libm|libpthread|libdl|ld-linux\S*)\.so", Path(path).name):
            shutil.copy2(path, folder / "lib")
    for name in QEMU_FILES:
        source = next((where / name for where in QEMU_DATA if (where / name).exists()), None)
        if source:
            shutil.copy2(source, folder / name)
    wrapper = folder / QEMU
    wrapper.write_text('#!/bin/sh\nLD_LIBRARY_PATH=/share/qemu/lib exec "$0.bin" -L /share/qemu "$@"\n')
    wrapper.chmod(0o755)


def command(share: Path, disk: Path, image: Path) -> list[str]:
    """Return QEMU's command line."""
    return [
        QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", str(MEMORY_MIB), "-nographic",
        "-no-reboot", "-nodefaults", "-serial", "stdio", "-kernel", str(kernels.fetch(outer.KERNEL, say).image),
        "-initrd", str(image), "-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable",
        "-drive", f"file={disk},if=virtio,format=raw,snapshot=on",
        "-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile=",
        "-virtfs", f"local,path={share},mount_tag=share,security_model=none",
    ]  # fmt: skip


def run(line: list[str], steps: Steps) -> bool:
    """Run the lab, showing its console; add status and seconds by step. Whether it came to its end by itself."""
    console: queue.Queue[str | None] = queue.Queue()
    with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace") as lab:
        reader = threading.Thread(target=listen, args=(lab.stdout, console), daemon=True)
        reader.start()
        limit = time.monotonic() + TIME_LIMIT_S
        try:
            while time.monotonic() < limit and (text := console.get(timeout=SILENCE_LIMIT_S)) is not None:
                if not text.startswith("LAB-ALIVE"):
                    print(text.rstrip(), flush=True)
                if found := LINE.search(text):
                    steps[found[1]] = (int(found[2]), float(found[3]))
        except queue.Empty:
            say(f"the emulated machine stands still: not a word for {SILENCE_LIMIT_S} s")
            return False
        finally:
            lab.kill()
    return time.monotonic() < limit


def listen(stream: IO[str] | None, console: queue.Queue[str | None]) -> None:
    """Hand on every line, and None at the end."""
    for text in stream or ():
        console.put(text)
    console.put(None)


def run_to_the_end(line: list[str], share: Path, steps: Steps) -> None:
    """Run the lab; where it stands still, have another one do what is left."""
    settings = (share / "settings").read_text()
    for turn in range(LABS_AT_MOST):
        done = " ".join(sorted(steps.keys() - ALWAYS))
        (share / "settings").write_text(f"{settings}DONE='{done}'\n")
        say("booting the lab" + (" again for what is left" if turn else ""))
        if run(line, steps):
            break


def carry_here(steps: Steps, name: str, words: list[str]) -> None:
    """A step on the host: run `lab/carry.py` on its software CPU."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(HERE / "carry.py"), *words, "--accel", "soft"], check=False)
    steps[name] = (done.returncode, round(time.monotonic() - began, 1))


def expected_steps(arguments: argparse.Namespace) -> set[str]:
    """Every step there should be a result of."""
    names = {"kvm", "install", "doctor", "image", "forwarded"} | (set() if arguments.no_tests else {"conformance"})
    names |= {
        f"boot:{kernel}:{cpus}:{turn + 1}" for kernel in INNER_KERNELS for cpus in (1, 2)
        for turn in range(arguments.turns)
    }  # fmt: skip
    names |= {"save-here", "carry-out"} if arguments.carries else set()
    names |= {f"{name}:{turn + 1}" for name in ("carry-in", "continue-here") for turn in range(arguments.carries)}
    return names | ({"peer"} if arguments.peer else set())


def lab(arguments: argparse.Namespace) -> int:
    """Build what is missing, run the lab, sum it up."""
    started = time.monotonic()
    disk, image = outer.disk(), outer.boot_image()
    steps: Steps = {}
    with tempfile.TemporaryDirectory(dir=cache_root()) as scratch:
        share = Path(scratch)
        prepare(share, arguments)
        kernel = ("--kernel", str(share / "kernels" / INNER_KERNELS[0]), "--initrd", str(share / "carry/initrd.img"))
        if arguments.carries:
            words = ["save", f"{share}/carry/soft", "--count", str(arguments.carries), "--without", WITHOUT, *kernel]
            carry_here(steps, "save-here", words)
        run_to_the_end(command(share, disk, image), share, steps)
        for turn in range(1, arguments.carries + 1):
            name, state = f"continue-here:{turn}", share / "carry" / f"kvm-{turn}"
            if not state.exists():
                continue
            carry_here(steps, name, ["continue", str(state)])
            if steps[name][0]:
                kept = shutil.copytree(state, cache_root() / "lab" / f"failed-{time.time():.0f}-{turn}")
                say(f"kept what failed: carry.py continue --accel soft {kept}")
    failed = sorted(name for name, (status, _) in steps.items() if status != 0)
    expected = expected_steps(arguments)
    failed += [f"{name} (never ran)" for name in sorted(expected - steps.keys())]
    for name, (status, seconds) in steps.items():
        print(f"  {'ok  ' if status == 0 else 'FAIL'} {name} {seconds} s")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{time.monotonic() - started:.0f} s in all, {used.ru_utime + used.ru_stime:.0f} s of CPU time"
    say(took + (f"; failed: {', '.join(failed)}" if failed else "; all passed"))
    print(f"lab: {len(expected) - len(failed)} passed, {len(failed)} failed")
    return 1 if failed else 0


def main() -> int:
    """Run the lab, or say in one line why not."""
    parser = argparse.ArgumentParser(prog="make test-kvm", description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=1, help="boots of each kernel and number of vCPUs (default 1)")
    parser.add_argument("--carries", type=int, default=1, help="guests carried each way (default 1)")
    parser.add_argument("--at-once", type=int, default=1, choices=(1, 2), help="guests at a time (default 1)")
    parser.add_argument("--no-tests", action="store_true", help="leave tests/accel out")
    parser.add_argument("--peer", action="store_true", help="also compare with QEMU under the same KVM")
    arguments = parser.parse_args()
    lacking = [package for tool, package in NEEDED.items() if shutil.which(tool) is None]
    if lacking:
        print(f"lab: 0 passed, 0 failed, SKIPPED: this host lacks {' '.join(lacking)} (apt-get install)")
        return 0
    try:
        return lab(arguments)
    except OstlerError as error:
        print(f"lab: 0 passed, 1 failed: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())

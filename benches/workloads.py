"""`make bench` for what people do in guests: the same programs on Ostler, on QEMU's TCG and natively, side by side.

One Debian tree serves as initrd of both guests and as chroot. The sides alternate, medians count, the ratio comes
first. `--json FILE` keeps every figure, `--picture FILE` draws the ratios (PNG or SVG; needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from benches import peer, report

from ostler.errors import OstlerError
from ostler.images import cache, initrd, kernels, rootfs

GUEST = Path(__file__).resolve().parent.parent / "guest" / "bench"
PACKAGES = (
    "python3", "openssl", "bzip2", "gzip", "sysbench", "sqlite3", "gcc", "libc6-dev", "nodejs",
    "openjdk-17-jdk-headless",
)  # fmt: skip
MEMORY = "3072"
HUNG_S = 3600
TWO_CPUS = ("sysbench-cpu-2",)
RATES = {
    "aes-128-cbc": "MB/s", "sha-256": "MB/s", "chacha20": "MB/s", "rsa-2048-sign": "/s", "sysbench-cpu": "/s",
    "sysbench-cpu-2": "/s", "sysbench-memory": "MiB/s",
}  # fmt: skip
# How many times quicker than TCG Ostler promises to be; None where the promise is only not to be slower.
BARS = {
    "python-loop": 3, "python-dict": 3, "python-float": 4, "bzip2": 2.5, "gzip": 1.8, "aes-128-cbc": 8, "sha-256": 10,
    "chacha20": 20, "rsa-2048-sign": 5, "fork-exec-500": 2.5, "read-write-300k": 1.5, "sysbench-cpu": 3,
    "sysbench-memory": 2, "nodejs": 2, "openjdk": 2, "gcc-5000-lines": 2, "sqlite3-200k": 2, "sha256sum-64M": None,
    "sysbench-cpu-2": None,
}  # fmt: skip
# Not anchored: firmware leaves an escape sequence before the first line.
LINE = re.compile(r"WORK (\S+) (?:([\d.]+)|failed: (.*?))\r?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Side:
    """One of those compared: a function from workload names and a number of processors to a console's text."""

    name: str
    run: Callable[[Sequence[str], int], str]


def console(command: Sequence[str], limit_s: float = HUNG_S) -> str:
    """All a command prints; its own end is not judged, a workload that is missing from the text failed."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit_s,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode(errors="replace")
    return done.stdout.decode(errors="replace")


def cmdline(names: Sequence[str]) -> str:
    """The guest's kernel command line."""
    return f"console=ttyS0 quiet panic=-1 work={','.join(names)}"


def ostler_side(kernel: Path, image: Path, *, accel: str) -> Side:
    """Ostler's own command."""

    def run(names: Sequence[str], cpus: int) -> str:
        return console([
            sys.executable, "-m", "ostler", "run", "--accel", accel, "--memory", f"{MEMORY}M", "--cpus", str(cpus),
            "--kernel", str(kernel), "--initrd", str(image), "--append", cmdline(names),
        ])  # fmt: skip

    return Side("ostler", run)


def qemu_side(qemu: peer.Peer, kernel: Path, image: Path) -> Side:
    """QEMU's pc board, every boot of which ends, and all that its TCG can do."""

    def run(names: Sequence[str], cpus: int) -> str:
        return console([
            *qemu.program, "-M", "pc", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", MEMORY, "-smp", str(cpus),
            "-nographic", "-no-reboot", "-net", "none", "-kernel", qemu.file(kernel), "-initrd", qemu.file(image),
            "-append", cmdline(names),
        ])  # fmt: skip

    return Side(qemu.name, run)


def native_side(tree: Path) -> Side:
    """The same tree in a chroot on as many host processors as the guests have."""
    enter = (
        'mount -t proc proc "$1/proc" && mount -t tmpfs tmpfs "$1/tmp" && mount --rbind /dev "$1/dev" && shift'
        ' && exec chroot "$@"'
    )

    def run(names: Sequence[str], cpus: int) -> str:
        pinned = ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:cpus]))]
        inside = [str(tree), str(tree), "python3", "/work.py", *names]
        return console([*pinned, "unshare", "--mount", "sh", "-c", enter, "sh", *inside])

    return Side("native", run)


def unpack(image: Path, into: Path) -> None:
    """The initrd as a folder."""
    program = initrd.busybox_program()
    with image.open("rb") as archive:
        subprocess.run([program, "cpio", "-idm"], cwd=into, stdin=archive, check=True, stderr=subprocess.DEVNULL)


def measure(sides: Sequence[Side], names: Sequence[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Figures by workload and side. Failures are said and left out."""
    figures: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    single = [name for name in names if name not in TWO_CPUS]
    groups = [(single, 1), ([name for name in names if name in TWO_CPUS], 2)]
    for turn in range(rounds):
        for side in sides:
            for group, cpus in groups:
                if group:
                    report.note(f"round {turn + 1} of {rounds}: {side.name}, {cpus} CPU, {len(group)} workloads")
                    collect(side, group, cpus, figures)
    return figures


def collect(side: Side, group: Sequence[str], cpus: int, figures: dict[str, dict[str, list[float]]]) -> None:
    """One run of a side."""
    text = side.run(group, cpus)
    found = {name: (figure, why) for name, figure, why in LINE.findall(text)}
    for name in group:
        figure, why = found.get(name, ("", "no result"))
        if figure:
            figures[name][side.name].append(float(figure))
        else:
            report.note(f"{side.name}: {name} failed: {why}")
    if not found:
        report.note(f"{side.name} said last: {text.strip().splitlines()[-3:]}")


def summary(figures: dict[str, dict[str, list[float]]]) -> list[report.Row]:
    """Medians and ratios."""
    rows = []
    for name, sides in figures.items():
        medians = {side: statistics.median(taken) for side, taken in sides.items() if taken}
        rows.append(report.Row(name, RATES.get(name, "s"), medians, name in RATES, BARS.get(name)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="WORKLOAD", help=f"all by default: {', '.join(BARS)}")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument("--accel", default="soft", help="Ostler's accelerator (default: soft)")
    parser.add_argument("--qemu", help="a QEMU, or debian-13 for that release's (default: $QEMU, then PATH)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the ratios")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(BARS):
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(BARS)}")
    with ExitStack() as stack:
        try:
            sides = prepare(options.accel, options.qemu, stack)
        except OstlerError as error:
            parser.error(str(error))
        figures = measure(sides, options.names or list(BARS), options.rounds)
    rows = summary(figures)
    names = [side.name for side in sides]
    report.table(rows, names)
    if options.json:
        facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "sides": names}
        options.json.write_text(json.dumps({**facts, "figures": figures}, indent=2) + "\n")
    if options.picture:
        report.picture(rows, names, options.picture)
    return 0


def prepare(accel: str, wanted: str | None, stack: ExitStack) -> list[Side]:
    """Tree, kernel and the sides that this host has."""
    files = {"init": (GUEST / "init").read_bytes(), "work.py": (GUEST / "work.py").read_bytes()}
    image = rootfs.debian(PACKAGES, files, progress=lambda step, _=None: report.note(step))
    kernel = kernels.fetch().image
    sides = [ostler_side(kernel, image, accel=accel)]
    if qemu := peer.find(wanted, stack):
        sides.append(qemu_side(qemu, kernel, image))
    else:
        report.note("no QEMU on this host: no peer")
    if os.geteuid() == 0 and shutil.which("unshare"):
        tree = Path(stack.enter_context(TemporaryDirectory(dir=cache.root(), ignore_cleanup_errors=True)))
        unpack(image, tree)
        sides.append(native_side(tree))
    else:
        report.note("native figures need root and unshare(1): left out")
    return sides


def machine() -> str:
    """The processor's own name, and how many of them."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{os.cpu_count()} x {found[1] if found else platform.machine()}"


if __name__ == "__main__":
    sys.exit(main())

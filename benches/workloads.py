"""`make bench` for what people do in guests: the same programs on Ostler, on QEMU's TCG and natively, side by side.

One Debian tree serves as initrd of both guests and as chroot. The sides alternate, medians count, the ratio comes
first. On a machine with other work a side gets a part of a processor only: figures are corrected for that part, by the
CPU time that its processes took (`watched.py`); the ratio by the clock stands beside. `--json FILE` keeps every
figure, `--picture FILE` draws the ratios (PNG or SVG; needs matplotlib).
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
from benches.watched import Line, console

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
NATIVE = "native"
# Natively these count their own CPU time; in a guest that is the clock.
OPENSSL = ("aes-128-cbc", "sha-256", "chacha20", "rsa-2048-sign")
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
LINE = re.compile(r"WORK (\S+) (?:([\d.]+)|failed: (.*?))$")


@dataclass(frozen=True, slots=True)
class Side:
    """One of those compared: a function from workload names and a number of processors to a console's lines."""

    name: str
    run: Callable[[Sequence[str], int], list[Line]]


def cmdline(names: Sequence[str]) -> str:
    """The guest's kernel command line."""
    return f"console=ttyS0 quiet panic=-1 work={','.join(names)}"


def ostler_side(kernel: Path, image: Path, *, accel: str) -> Side:
    """Ostler's own command."""

    def run(names: Sequence[str], cpus: int) -> list[Line]:
        return console([
            sys.executable, "-m", "ostler", "run", "--accel", accel, "--memory", f"{MEMORY}M", "--cpus", str(cpus),
            "--kernel", str(kernel), "--initrd", str(image), "--append", cmdline(names),
        ], HUNG_S)  # fmt: skip

    return Side("ostler", run)


def qemu_side(qemu: peer.Peer, kernel: Path, image: Path) -> Side:
    """QEMU's pc board, every boot of which ends, and all that its TCG can do."""

    def run(names: Sequence[str], cpus: int) -> list[Line]:
        return console([
            *qemu.program, "-M", "pc", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", MEMORY, "-smp", str(cpus),
            "-nographic", "-no-reboot", "-net", "none", "-kernel", qemu.file(kernel), "-initrd", qemu.file(image),
            "-append", cmdline(names),
        ], HUNG_S)  # fmt: skip

    return Side(qemu.name, run)


def native_side(tree: Path) -> Side:
    """The same tree in a chroot on as many host processors as the guests have."""
    enter = (
        'mount -t proc proc "$1/proc" && mount -t tmpfs tmpfs "$1/tmp" && mount --rbind /dev "$1/dev" && shift'
        ' && exec chroot "$@"'
    )

    def run(names: Sequence[str], cpus: int) -> list[Line]:
        pinned = ["taskset", "-c", ",".join(map(str, sorted(os.sched_getaffinity(0))[:cpus]))]
        inside = [str(tree), str(tree), "python3", "/work.py", *names]
        return console([*pinned, "unshare", "--mount", "sh", "-c", enter, "sh", *inside], HUNG_S)

    return Side(NATIVE, run)


def unpack(image: Path, into: Path) -> None:
    """The initrd as a folder."""
    program = initrd.busybox_program()
    with image.open("rb") as archive:
        subprocess.run([program, "cpio", "-idm"], cwd=into, stdin=archive, check=True, stderr=subprocess.DEVNULL)


@dataclass(slots=True)
class Figures:
    """What was measured, by workload and side: as the guest's clock had it, and corrected for the share of a
    processor that the side got meanwhile."""

    clock: dict[str, dict[str, list[float]]]
    alone: dict[str, dict[str, list[float]]]

    def add(self, name: str, side: str, figure: float, share: float) -> None:
        """Keep a figure; with half a processor a time is twice what it should be, and a rate is half of it."""
        self.clock[name][side].append(figure)
        self.alone[name][side].append(figure / share if name in RATES else figure * share)


def measure(sides: Sequence[Side], names: Sequence[str], rounds: int) -> Figures:
    """Run everything, the sides alternating. Failures are said and left out."""
    figures = Figures({name: defaultdict(list) for name in names}, {name: defaultdict(list) for name in names})
    single = [name for name in names if name not in TWO_CPUS]
    groups = [(single, 1), ([name for name in names if name in TWO_CPUS], 2)]
    for turn in range(rounds):
        for side in sides:
            for group, cpus in groups:
                if group:
                    report.note(f"round {turn + 1} of {rounds}: {side.name}, {cpus} CPU, {len(group)} workloads")
                    collect(side, group, cpus, figures)
    return figures


def collect(side: Side, group: Sequence[str], cpus: int, figures: Figures) -> None:
    """One run of a side."""
    lines = side.run(group, cpus)
    before: Line | None = None
    failed = dict.fromkeys(group, "no result")
    for line in lines:
        found = LINE.search(line.text)
        if found is None:
            continue
        name, figure, why = found.groups()
        if name in failed and figure and before:
            own_clock = side.name == NATIVE and name in OPENSSL
            share = 1.0 if own_clock else (line.cpu_s - before.cpu_s) / (line.clock_s - before.clock_s) / cpus
            figures.add(name, side.name, float(figure), min(max(share, 0.01), 1.0))
            del failed[name]
        elif name in failed:
            failed[name] = why
        before = line
    for name, why in failed.items():
        report.note(f"{side.name}: {name} failed: {why}")
    if before is None:
        report.note(f"{side.name} said last: {[line.text for line in lines[-3:]]}")


def summary(figures: Figures) -> list[report.Row]:
    """Medians and ratios."""
    rows = []
    for name in figures.clock:
        clock, alone = (
            {side: statistics.median(taken) for side, taken in table[name].items() if taken}
            for table in (figures.clock, figures.alone)
        )
        rows.append(report.Row(name, RATES.get(name, "s"), alone, name in RATES, BARS.get(name), clock))
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
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table for a document")
    parser.add_argument(
        "--from", type=Path, metavar="FILE", dest="kept", help="measure nothing: figures kept by --json"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(BARS):
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(BARS)}")
    if options.kept:
        kept = json.loads(options.kept.read_text())
        names, figures = kept["sides"], Figures(kept["clock"], kept["alone"])
    else:
        with ExitStack() as stack:
            try:
                sides = prepare(options.accel, options.qemu, stack)
            except OstlerError as error:
                parser.error(str(error))
            figures = measure(sides, options.names or list(BARS), options.rounds)
        names = [side.name for side in sides]
    rows = summary(figures)
    report.table(rows, names)
    if options.json:
        facts = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "sides": names}
        options.json.write_text(json.dumps({**facts, "clock": figures.clock, "alone": figures.alone}, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(report.markdown(rows, names))
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

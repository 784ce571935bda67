"""`python -m benches.disks`: fio in a guest, beside QEMU's TCG on the same backing file.

Runs alternate, the median counts. The guest has busybox, drivers and this host's fio; its console tells the figures.
Both sides serve the disk through the host's page cache: what is compared is what a request costs guest and devices.
The QEMU is the one on PATH, or the one that `QEMU=` names. Exit status 1 where a ratio is below the floor or a figure
is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from benches import peer, report
from benches.network import program_files

from ostler.images import cache, initrd, kernels
from tests.guest.devices_guest import EPILOGUE, module_files

FIO = "fio"
APPEND = "console=ttyS0 quiet panic=-1"
LIMIT_S = 900
RATIO_WANTED, RATIO_FLOOR = 0.8, 0.5
# Field numbers of fio's terse output, version 3, after the version's own: bandwidth in KiB/s, operations a second.
BANDWIDTH, OPERATIONS = {"read": 6, "write": 47}, {"read": 7, "write": 48}
LINE = re.compile(r"FIO (\w+) (\w+) (\d+);(.*)")
SCRIPT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /dev/shm
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox --install -s /bin
while read -r file; do insmod "/modules/$file"; done </modules/order
cd /tmp
for depth in 1 32; do
    for job in randread:4k randwrite:4k read:1m write:1m; do
        said=$(/usr/bin/fio --name=job --filename=/dev/vda --direct=1 --ioengine=libaio --thread --time_based \\
            --runtime=@SECONDS@ --rw=${job%:*} --bs=${job#*:} --iodepth=$depth --output-format=terse \\
            --terse-version=3 2>&1 | tail -n 1)
        echo "FIO ${job%:*} ${job#*:} $depth;$said"
    done
done
"""


def guest_image(seconds: int) -> Path:
    """The initrd."""
    kernel = kernels.fetch()
    return initrd.build({
        "init": (SCRIPT.replace("@SECONDS@", str(seconds)) + EPILOGUE).encode(),
        "bin/busybox": initrd.busybox_program().read_bytes(),
        **module_files(kernel, "virtio_pci", "virtio_blk"),
        **program_files(str(shutil.which(FIO))),
    })  # fmt: skip


def commands(image: Path, disk: Path, qemu: peer.Peer | None) -> dict[str, list[str]]:
    """How to start each side."""
    kernel = kernels.fetch().image
    sides = {
        "ostler": [
            sys.executable, "-m", "ostler", "run", "--accel", "soft", "--memory", "1G", "--kernel", str(kernel),
            "--initrd", str(image), "--append", APPEND, "--disk", str(disk), "--net", "none",
        ],
    }  # fmt: skip
    if qemu is not None:
        sides[qemu.name] = [
            *qemu.program, "-M", "pc", "-accel", "tcg", "-cpu", "max", "-m", "1024", "-display", "none",
            "-monitor", "none", "-serial", "stdio", "-no-reboot", "-net", "none", "-kernel", qemu.file(kernel),
            "-initrd", qemu.file(image), "-append", APPEND, "-drive", f"file={qemu.file(disk)},if=none,id=d,format=raw",
            "-device", "virtio-blk-pci,drive=d,num-queues=1",
        ]  # fmt: skip
    return sides


def figures(text: str) -> dict[str, float]:
    """Operations a second for 4 KiB, MiB/s for 1 MiB, by job."""
    found = {}
    for kind, size, depth, terse in LINE.findall(text):
        fields = terse.split(";")
        way = "write" if "write" in kind else "read"
        try:
            value = float(fields[OPERATIONS[way]]) if size == "4k" else float(fields[BANDWIDTH[way]]) / 1024
        except (IndexError, ValueError):
            report.note(f"fio {kind} {size}: {terse[:200]}")
            continue
        found[f"fio {kind} {size} depth {depth}"] = value
    return found


def measure(command: Sequence[str]) -> dict[str, float]:
    """One guest's figures."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_S,
            check=False,
        )  # fmt: skip
        text = done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode(errors="replace")
    found = figures(text)
    if not found:
        report.note(f"no figure; the console's end: {text[-300:]!r}")
    return found


def main() -> int:
    """Print the table; 1 where a ratio is below the floor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="guests of each side (default: 3)")
    parser.add_argument("--seconds", type=int, default=5, help="of each job (default: 5)")
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the disk (default: 1024)")
    given = parser.parse_args()
    if shutil.which(FIO) is None:
        print("disks: fio is not installed, nothing measured")
        return 0
    taken: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as until:
        disk = Path(until.enter_context(TemporaryDirectory(dir=cache.root()))) / "disk.raw"
        # Written once, so that nobody is measured on holes.
        with disk.open("wb") as file:
            for _ in range(given.size):
                file.write(os.urandom(1 << 20))
        sides = commands(guest_image(given.seconds), disk, peer.find(None, until))
        for turn in range(given.runs):
            for side, command in sides.items():
                report.note(f"disks, round {turn + 1} of {given.runs}: {side}")
                for name, value in measure(command).items():
                    taken[name][side].append(value)
    rows = [
        report.Row(
            name, "/s" if "4k" in name else "MiB/s", {side: statistics.median(each) for side, each in by_side.items()},
            more_is_better=True, bar=RATIO_WANTED,
        )
        for name, by_side in taken.items()
    ]  # fmt: skip
    report.table(rows, list(sides))
    ours, *others = sides
    # A job that one side gave no figure for is none that went well.
    below = [row.name for row in rows for other in others if (row.ratio(ours, other) or 0) < RATIO_FLOOR]
    if below:
        report.note(f"disks, ratio below {RATIO_FLOOR:g}: {', '.join(below)}")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())

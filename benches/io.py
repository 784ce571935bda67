"""`make bench` for disks: fio in a guest on Ostler and on QEMU's TCG, same kernel, same tree, same backing file.

python -m benches.io [--seconds N] [--rounds N]

The sides alternate; of each job the median counts. The ratio is Ostler's operations per second over QEMU's. Both serve
the disk through the host's page cache, so what is compared is what a request costs the guest and the devices.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from benches import peer

from ostler.images import cache, kernels, rootfs
from tests.guest.devices_guest import module_files
from tests.guest.harness import OSTLER

KERNEL, MEMORY_MIB, DISK_MIB = "debian-12-cloud", 1024, 256
# Name, fio's pattern, block size, depth.
JOBS = [
    (f"{pattern}-{size}-{depth}", pattern, size, depth)
    for pattern, size in (("randread", "4k"), ("randwrite", "4k"), ("read", "1M"), ("write", "1M"))
    for depth in (1, 32)
]
READ_FIELD, WRITE_FIELD = 7, 48
BAR, FLOOR = 0.8, 0.5
HUNG_S = 1800
LINE = re.compile(r"IO (\S+) (3;\S.*?)\r?$", re.MULTILINE)
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/
/bin/busybox mount -t proc proc /proc; /bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$module; done
job() {{
    echo "IO $1 $(fio --minimal --name=$1 --filename=/dev/vda --direct=1 --ioengine=libaio --time_based=1 \\
        --runtime={seconds} --rw=$2 --bs=$3 --iodepth=$4 --size={disk}M --gtod_reduce=1 2>&1 | grep '^3;')"
}}
{jobs}
/bin/busybox poweroff -f
"""


def material(seconds: int) -> tuple[Path, Path]:
    """Kernel and initrd, built once."""
    kernel = kernels.fetch(KERNEL)
    jobs = "\n".join(" ".join(("job", name, pattern, size, str(depth))) for name, pattern, size, depth in JOBS)
    init = INIT.format(seconds=seconds, disk=DISK_MIB, jobs=jobs).encode()
    return kernel.image, rootfs.debian(["fio"], {"init": init, **module_files(kernel, "virtio_pci", "virtio_blk")})


def commands(kernel: Path, initrd: Path, disk: Path, until: ExitStack) -> dict[str, list[str]]:
    """How each side is started."""
    append = "console=ttyS0 quiet panic=-1"
    ours = [*OSTLER, "run", "--accel", "soft", "--memory", f"{MEMORY_MIB}M", "--kernel", str(kernel)]
    sides = {"ostler": [*ours, "--initrd", str(initrd), "--append", append, "--disk", f"{disk},format=raw"]}
    qemu = peer.find(None, until)
    if qemu is not None:
        sides[qemu.name] = [
            *qemu.program, "-accel", "tcg,thread=multi", "-cpu", "max", "-m", str(MEMORY_MIB), "-nodefaults",
            "-nographic", "-serial", "stdio", "-no-reboot", "-kernel", qemu.file(kernel), "-initrd", qemu.file(initrd),
            "-append", append, "-drive", f"file={disk},format=raw,if=none,id=disk", "-device",
            "virtio-blk-pci,drive=disk",
        ]  # fmt: skip
    return sides


def measure(command: list[str]) -> dict[str, float]:
    """Operations per second by job."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=HUNG_S, check=False)
    found = {}
    for name, line in LINE.findall(done.stdout.decode(errors="replace")):
        fields = line.split(";")
        found[name] = float(fields[WRITE_FIELD if "write" in name else READ_FIELD])
    if len(found) != len(JOBS):
        said = (done.stderr or done.stdout)[-500:].decode(errors="replace")
        raise SystemExit(f"io: {len(found)} of {len(JOBS)} jobs gave a figure: {said}")
    return found


def main() -> int:
    """Print every figure; exit status 1 when a ratio is below the floor."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=5, help="how long each job runs")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    kernel, initrd = material(given.seconds)
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=cache.root(), prefix="io-")))
        disk = folder / "disk.img"
        with disk.open("wb") as file:
            for _ in range(DISK_MIB):
                file.write(b"\xa5" * (1 << 20))
        sides = commands(kernel, initrd, disk, stack)
        for _ in range(given.rounds):
            for side, command in sides.items():
                for name, rate in measure(command).items():
                    rates[name][side].append(rate)
    worst = min((_show(name, each) for name, each in rates.items()), default=1.0)
    print(f"io: lowest ratio {worst:.2f}, promised {BAR} and never below {FLOOR}")
    return 0 if worst >= FLOOR else 1


def _show(name: str, sides: dict[str, list[float]]) -> float:
    """One line; the ratio, 1 where there is nobody to compare with."""
    medians = {side: statistics.median(values) for side, values in sides.items()}
    ours, *others = medians.values()
    ratio = ours / others[0] if others and others[0] else 1.0
    print(f"{name}: ratio {ratio:.2f}  " + "  ".join(f"{side} {rate:.0f}/s" for side, rate in medians.items()))
    return ratio


if __name__ == "__main__":
    sys.exit(main())

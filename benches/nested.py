"""Ostler beside QEMU's microvm board under the same KVM: start to power-off, and round trips to a device.

Meant for the nested lab, where both run on a KVM that is real; works on any host with KVM, kernels and QEMU.

    python -m benches.nested FOLDER    with kernels `debian-12-cloud` and `debian-13-cloud` and an `initrd.img`
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from benches import exits
from benches.bench import APPEND, OSTLER, QEMU, once

ROUNDS = 5
MEMORY = "256M"


def sides(kernel: Path, image: Path) -> dict[str, list[str]]:
    """Both commands; the guest, its memory and its command line are the same."""
    files = ["--kernel", str(kernel), "--initrd", str(image), "--append", APPEND]
    return {
        "ostler": [*OSTLER, "run", "--accel", "kvm", "--memory", MEMORY, *files],
        "qemu microvm": [
            QEMU, "-M", "microvm,acpi=on,rtc=on", "-accel", "kvm", "-cpu", "host", "-m", MEMORY, "-nographic",
            "-no-reboot", "-kernel", str(kernel), "-initrd", str(image), "-append", APPEND,
        ],
    }  # fmt: skip


def compare(kernel: Path, image: Path, rounds: int = ROUNDS) -> None:
    """Print the medians of alternating runs, and their ratio first."""
    commands = sides(kernel, image)
    times: dict[str, list[float]] = {name: [] for name in commands}
    once(commands["ostler"])  # the kernel's first start unpacks it
    for _ in range(rounds):
        for name, command in commands.items():
            if taken := once(command):
                times[name].append(taken)
    ours, theirs = (times[name] for name in commands)
    if ours and theirs:
        print(
            f"{kernel.name}, start to power-off: {statistics.median(ours) / statistics.median(theirs):.2f} times QEMU"
        )
    for name, found in times.items():
        shown = " ".join(f"{each:.2f}" for each in sorted(found))
        print(f"  {name}: {len(found)} of {rounds} ended; seconds: {shown}")


def main(folder: str) -> int:
    """Print everything; 0."""
    for kernel in ("debian-12-cloud", "debian-13-cloud"):
        compare(Path(folder) / kernel, Path(folder) / "initrd.img")
    exits.main("kvm")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""`make hostile`: random and mutated descriptors, notifications and accesses at every device, a million of them each.

python -m benches.hostile [--attempts N] [--seed N] [device…]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from ostler.testing.hostile import HostileGuest
from ostler.testing.hostile_devices import VICTIMS

GROWTH_LIMIT_KIB = 16 << 10
STEP = 50_000


def resident_kib() -> int:
    """This process's memory in the host."""
    words = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(words.split()[1])


def attack(name: str, attempts: int, seed: int) -> bool:
    """Attack one device and say what came of it; false when memory grew beyond the limit."""
    device, seeds = VICTIMS[name]()
    began = time.perf_counter()
    with HostileGuest(device, seeds, random.Random(seed)) as guest:
        guest.attack(min(STEP, attempts))
        settled = resident_kib()
        for done in range(STEP, attempts, STEP):
            guest.attack(min(STEP, attempts - done))
        growth = resident_kib() - settled
        facts = ", ".join(f"{count:,} {what}" for what, count in sorted(guest.counts.items()))
    took = time.perf_counter() - began
    print(f"{name}: {attempts:,} attempts in {took:.0f} s, {growth} KiB more memory; {facts}")
    return growth <= GROWTH_LIMIT_KIB


def main() -> int:
    """Exit status 1 when a device kept memory; anything else that goes wrong is a traceback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attempts", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("devices", nargs="*", metavar="device", help=", ".join(VICTIMS))
    given = parser.parse_args()
    results = [attack(name, given.attempts, given.seed) for name in given.devices or VICTIMS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

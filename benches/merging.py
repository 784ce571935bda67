"""Three guests of 512 MiB with equal content under pressure: what the host gets back, and how long guests stand still.

    python -m benches.merging [--guests 3] [--fill 300] [--json]

Guests of an image are booted one by one, each from the start, and fill a file in memory with the same bytes, which
nothing compresses. Then `ostler mem --relieve all` is done step by step. Memory is counted in three ways: what the
host has given each guest plus what they have in common, the processes' shares (Pss) after everything was read again in
every guest, and what the whole host has available.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import ostler
from ostler.client import guests, relief

MIB = 1 << 20
FILL = """
import hashlib, random
source = random.Random(7)
with open('/dev/shm/same', 'wb') as file:
    for _ in range({mib}):
        file.write(source.randbytes(1 << 20))
"""


def pss_bytes(pid: int) -> int:
    """Proportional share of a whole process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))


def measure(count: int, fill_mib: int) -> dict[str, Any]:
    """One round."""
    options: dict[str, Any] = {"memory": "512M", "accel": "soft", "nets": ["none"], "cold": True}
    with contextlib.ExitStack() as stack:
        vms = [stack.enter_context(ostler.VM("debian", **options)) for _ in range(count)]
        for vm in vms:
            vm.run(["mount", "-o", "remount,size=450M", "/dev/shm"], check=True)
            vm.run(["python3", "-c", FILL.format(mib=fill_mib)], check=True)
        entries = [vm._running().entry for vm in vms]
        pids = [guests.request(entry, "status")["pid"] for entry in entries]
        sums = {vm.run(["sha256sum", "/dev/shm/same"], check=True).text for vm in vms}
        facts: dict[str, Any] = {
            "guests": count, "fill_mib": fill_mib, "pss_before": sum(map(pss_bytes, pids)),
            "host_available_before": relief.host_available_bytes()[0],
        }  # fmt: skip
        for steps in (["reporting"], ["balloon"], ["merge"]):
            started = time.monotonic()
            report = relief.relieve(entries, need_bytes=1 << 40, steps=steps)
            facts[steps[0]] = {**report, "took_s": time.monotonic() - started}
        after = {vm.run(["sha256sum", "/dev/shm/same"], check=True).text for vm in vms}
        facts["content_is_the_same"] = after == sums
        facts["pss_after"] = sum(map(pss_bytes, pids))
        facts["host_available_after"] = relief.host_available_bytes()[0]
        before = sum(facts["reporting"]["before"].values())
        now = sum(facts["merge"]["after"].values()) + facts["merge"]["common_bytes"]
        facts |= {"memory_before": before, "memory_after": now, "saved": 1 - now / before}
    return facts


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--guests", type=int, default=3)
    parser.add_argument("--fill", type=int, default=300, help="MiB of equal content")
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    facts = measure(wanted.guests, wanted.fill)
    if wanted.json:
        print(json.dumps(facts, indent=2))
    else:
        print(f"{facts['guests']} guests of 512 MiB with {facts['fill_mib']} MiB of equal content each")
        for step in ("reporting", "balloon", "merge"):
            each = facts[step]
            print(f"  {step}: {each['freed_bytes'] / MIB:.0f} MiB back in {each['took_s']:.1f} s")
        print(f"  guests' memory: {facts['memory_before'] / MIB:.0f} to {facts['memory_after'] / MIB:.0f} MiB")
        print(f"  their processes' shares: {facts['pss_before'] / MIB:.0f} to {facts['pss_after'] / MIB:.0f} MiB")
        gained = facts["host_available_after"] - facts["host_available_before"]
        print(f"  the host has {gained / MIB:.0f} MiB more available; content the same: {facts['content_is_the_same']}")
        print(f"  saved: {facts['saved']:.0%} (wanted: 40 %)")
    return 0 if facts["saved"] >= 0.4 and facts["content_is_the_same"] else 1


if __name__ == "__main__":
    sys.exit(main())

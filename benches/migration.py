"""`python -m benches.migration`: the pause of a guest that moves while it works, beside QEMU's TCG moving the same one.

A guest of 1 GiB writes 100 MB of its memory a second and ticks every 2 ms over a TCP stream. It is moved between
processes of this host, over loopback with mutual TLS (QEMU: without). The pause is what the stream's other end sees:
the longest time without a tick, less the 2 ms a tick takes. Needs root for the bridge, and a C compiler.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from benches.migration_parts import (
    RATE_MB,
    SETTLE_S,
    Moved,
    Peer,
    bridge,
    certificates,
    kill,
    program,
    receiving,
    report,
    working,
)
from benches.migration_qemu import QEMU, qemu
from benches.migration_several import several

from ostler.client import moving
from ostler.control import runtime
from ostler.migration.address import TlsFiles


def ostler(rounds: int, tls: TlsFiles, binary: bytes, *, cpus: int, downtime_ms: float) -> tuple[list[Moved], Peer]:
    """One guest, moved back and forth."""
    peer = Peer()
    found = []
    with bridge() as name, receiving(tls) as address, working(2, name, peer, binary, cpus) as guest:
        peer.wait()
        time.sleep(2 * SETTLE_S)
        here = guest.folder.name
        try:
            for number in range(rounds):
                there = f"moving-{os.getpid()}-{number}"
                time.sleep(SETTLE_S)
                peer.longest_gap()
                wish = moving.Wish(address=address, tls=tls, downtime_ms=downtime_ms, name=there)
                facts = moving.migrate(runtime.find(here), wish)
                arrived = time.monotonic()
                time.sleep(0.3)
                found.append(Moved(peer.longest_gap(), facts["pause_s"], facts["elapsed_s"], facts))
                here = there
                print(f"  {number + 1}: seen {found[-1].seen_s * 1000:.0f} ms ({peer.longest_at - arrived:+.2f} s from "
                      f"its arrival), said {found[-1].said_s * 1000:.0f} ms, "
                      f"{facts['elapsed_s']:.1f} s, {facts['round']} rounds, {facts['sent_bytes'] >> 20} MiB, "
                      f"{ {k: round(v * 1000, 1) for k, v in facts['pause_parts'].items()} }", flush=True)  # fmt: skip
        finally:
            kill(here)
    peer.close()
    return found, peer


def late(rounds: int, tls: TlsFiles, binary: bytes) -> None:
    """A guest that writes twice what the link may carry."""
    peer = Peer()
    seen, said, elapsed = [], [], []
    with bridge() as name, receiving(tls) as address, working(4, name, peer, binary, 1) as guest:
        peer.wait()
        time.sleep(2 * SETTLE_S)
        here = guest.folder.name
        try:
            for number in range(rounds):
                there = f"late-{os.getpid()}-{number}"
                time.sleep(SETTLE_S)
                peer.longest_gap()
                wish = moving.Wish(address=address, tls=tls, name=there, post_copy="auto", bytes_per_s=RATE_MB * 5e5)
                facts = moving.migrate(runtime.find(here), wish)
                here = there
                time.sleep(0.5)
                seen.append(peer.longest_gap() * 1000)
                said.append(facts["pause_s"] * 1000)
                elapsed.append(facts["elapsed_s"])
                print(f"  {number + 1}: seen {seen[-1]:.0f} ms, said {said[-1]:.0f} ms, {facts['round']} rounds, "
                      f"{facts['asked']} faults, { {k: round(v * 1000, 1) for k, v in facts['pause_parts'].items()} }",
                      flush=True)  # fmt: skip
        finally:
            kill(here)
    peer.close()
    print(f"post-copy: {rounds} arrived, pause said {[round(each) for each in said]} ms, longest time without a tick "
          f"{[round(each) for each in seen]} ms, whole {[round(each, 1) for each in elapsed]} s, ticks lost "
          f"{peer.lost}, pages lost {peer.bad}", flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--qemu-rounds", type=int, default=5)
    parser.add_argument("--several", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=moving.AT_ONCE)
    parser.add_argument("--late-rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--downtime-ms", type=float, default=40)
    given = parser.parse_args()
    if os.geteuid() or not shutil.which("gcc"):
        print("migration: expected root (for a bridge) and gcc; not measured")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tls, binary = certificates(folder), program(folder)
        if given.rounds:
            report("Ostler", *ostler(given.rounds, tls, binary, cpus=given.cpus, downtime_ms=given.downtime_ms))
        if given.qemu_rounds and shutil.which(QEMU):
            moved, gone, peer = qemu(given.qemu_rounds, binary, folder, downtime_ms=given.downtime_ms)
            report("QEMU", moved, peer)
            print(f"QEMU: {gone} of {given.qemu_rounds} guests did not survive it", flush=True)
        if given.late_rounds:
            late(given.late_rounds, tls, binary)
        if given.several:
            several(given.several, tls, binary, at_once=given.at_once)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Eight guests that `ostler migrate --all` moves: each works and ticks as `benches.migration`'s does, but less.

Both sides are the commands themselves; the receiving one has a runtime folder of its own, so names stay.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benches.migration_parts import SETTLE_S, Peer, bridge, kill, working

from ostler.migration.address import TlsFiles

RATE_MB, MEMORY = 10, "384M"
BANDWIDTH = "400M"


def several(count: int, tls: TlsFiles, binary: bytes, *, at_once: int) -> None:
    """Boot so many, move them all by one command, and say what they and their peers saw."""
    peers = [Peer() for _ in range(count)]
    with folders() as (here, there), bridge() as name, contextlib.ExitStack() as stack:
        os.environ["OSTLER_RUNTIME"] = here
        address = stack.enter_context(_receive(tls, there))
        guests = []
        for number, peer in enumerate(peers):
            guest = working(number + 10, name, peer, binary, 1, rate=RATE_MB, memory=MEMORY)
            guests.append(stack.enter_context(guest).folder.name)
            peer.wait()
        time.sleep(2 * SETTLE_S)
        before = [peer.longest_gap() for peer in peers]
        began = time.monotonic()
        found = _migrate_all(tls, address, at_once)
        seconds = time.monotonic() - began
        time.sleep(0.5)
        gaps = [peer.longest_gap() for peer in peers]
        said = {each: facts["pause_s"] for each, facts in found.items() if "error" not in facts}
        for each, facts in found.items():
            print(f"  {each}: {facts.get('error') or facts['pause_parts']}", flush=True)
        os.environ["OSTLER_RUNTIME"] = there
        for each in guests:
            kill(each)
        print(f"{count} by --all, {at_once} at a time, {BANDWIDTH}/s together: {len(said)} arrived in {seconds:.1f} s; "
              f"longest pause said {max(said.values(), default=0) * 1000:.0f} ms, longest time without a tick "
              f"{sorted(round(gap * 1000) for gap in gaps)} ms (before: {max(before) * 1000:.0f}), ticks lost "
              f"{sum(peer.lost for peer in peers)}, pages lost {sum(peer.bad for peer in peers)}",
              flush=True)  # fmt: skip


@contextlib.contextmanager
def folders() -> Iterator[tuple[str, str]]:
    """Two runtime folders, as of two users or hosts; the environment's is put back afterwards."""
    before = os.environ.get("OSTLER_RUNTIME")
    try:
        with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
            yield here, there
    finally:
        os.environ.pop("OSTLER_RUNTIME", None)
        if before is not None:
            os.environ["OSTLER_RUNTIME"] = before


def _options(tls: TlsFiles) -> list[str]:
    return ["--tls-cert", str(tls.cert), "--tls-key", str(tls.key), "--tls-ca", str(tls.ca)]


def _command(*words: str) -> list[str]:
    return [str(Path(sys.executable).with_name("ostler")), *words]


@contextlib.contextmanager
def _receive(tls: TlsFiles, runtime_folder: str) -> Iterator[str]:
    process = subprocess.Popen(
        _command("receive", "tcp://127.0.0.1:0", *_options(tls)),
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OSTLER_RUNTIME": runtime_folder},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        yield process.stderr.readline().split()[-1]
    finally:
        process.terminate()
        process.communicate()


def _migrate_all(tls: TlsFiles, address: str, at_once: int) -> dict[str, Any]:
    done = subprocess.run(
        _command("migrate", "--all", "--json", "--at-once", str(at_once), "--bandwidth", BANDWIDTH, address,
                 *_options(tls)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not done.stdout:
        raise SystemExit(f"ostler migrate --all: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found

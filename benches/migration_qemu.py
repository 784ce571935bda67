"""The guest of `benches.migration` in QEMU's TCG, moved without TLS by QEMU's own migration."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from benches.migration_parts import HOST, MEMORY_MIB, RATE_MB, SETTLE_S, Moved, Peer, bridge, script

from ostler.images import kernels
from tests.guest.devices_guest import image_of

QEMU, CPU = "qemu-system-x86_64", "kvm64"


class Qmp:
    """QEMU's monitor."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 20
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self._file = self._socket.makefile("rw")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while "event" in (answer := json.loads(self._file.readline())):
            pass
        if "error" in answer:
            raise SystemExit(f"QEMU: {command}: {answer['error']['desc']}")
        return answer["return"]


def qemu(rounds: int, binary: bytes, folder: Path, *, downtime_ms: float) -> tuple[list[Moved], int, Peer]:
    """The same guest in QEMU's TCG, moved without TLS, a new one each time; and how many did not survive it.

    QEMU 7.2's guests of the models max and qemu64 run into data when they have been moved, and reboot. Those of kvm64
    go on, so that is the one taken; what the guest does needs no more than it has.
    """
    found: list[Moved] = []
    peer, gone = Peer(), 0
    helper = "/usr/lib/qemu/qemu-bridge-helper"
    Path("/etc/qemu").mkdir(exist_ok=True)
    allowed = Path("/etc/qemu/bridge.conf")
    before = allowed.read_text() if allowed.exists() else None
    try:
        for number in range(rounds):
            peer.close()
            peer = Peer()
            with bridge() as name, contextlib.ExitStack() as stack:
                allowed.write_text(f"allow {name}\n")
                moved = _qemu_once(number, binary, folder, peer, f"bridge,id=n,br={name},helper={helper}", stack,
                                   downtime_ms=downtime_ms)  # fmt: skip
            if moved is None:
                gone += 1
                print(f"  QEMU {number + 1}: the guest did not survive it", flush=True)
                continue
            found.append(moved)
            print(f"  QEMU {number + 1}: seen {moved.seen_s * 1000:.0f} ms, said {moved.said_s * 1000:.0f} ms, "
                  f"{moved.elapsed_s:.1f} s", flush=True)  # fmt: skip
    finally:
        if before is None:
            allowed.unlink(missing_ok=True)
        else:
            allowed.write_text(before)
    return found, gone, peer


def _qemu_once(
    number: int, binary: bytes, folder: Path, peer: Peer, network: str, stack: contextlib.ExitStack, *,
    downtime_ms: float,
) -> Moved | None:  # fmt: skip
    kernel = kernels.fetch()
    image = image_of(script(3, peer.port, RATE_MB), kernel, files={"moving": binary})

    def end(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()

    def start(side: str, *more: str) -> Qmp:
        monitor = folder / f"qmp{number}{side}"
        process = subprocess.Popen(
            [QEMU, "-accel", "tcg", "-cpu", CPU, "-m", f"{MEMORY_MIB}M", "-nographic", "-nodefaults",
             "-kernel", str(kernel.image), "-initrd", str(image), "-append", f"quiet panic=-1 report={HOST}:1",
             "-netdev", network, "-device", "virtio-net-pci,netdev=n",
             "-qmp", f"unix:{monitor},server=on,wait=off", *more],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        stack.callback(end, process)
        return Qmp(monitor)

    here = start("a")
    peer.wait()
    time.sleep(2 * SETTLE_S)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start("b", "-incoming", f"tcp:127.0.0.1:{port}")
    here("migrate-set-parameters", **{"downtime-limit": int(downtime_ms), "max-bandwidth": 1 << 34})
    time.sleep(SETTLE_S)
    peer.longest_gap()
    started = time.monotonic()
    here("migrate", uri=f"tcp:127.0.0.1:{port}")
    while (state := here("query-migrate"))["status"] not in ("completed", "failed"):
        if time.monotonic() - started > 120:
            return None
        time.sleep(0.02)
    elapsed, ticks = time.monotonic() - started, peer.ticks
    time.sleep(2.0)
    seen = peer.longest_gap()
    # It ticks 500 times a second, whatever a busy host makes of that.
    if peer.ticks < ticks + 10:
        return None
    return Moved(seen, state.get("downtime", 0) / 1000, elapsed, state)

"""`python -m benches.migration`: the pause of a guest that moves while it works, beside QEMU's TCG moving the same one.

A guest of 1 GiB writes 100 MB of its memory a second and ticks every 2 ms over a TCP stream. It is moved between
processes of this host, over loopback with mutual TLS (QEMU: without). The pause is what the stream's other end sees:
the longest time without a tick, less the 2 ms a tick takes. Needs root for the bridge, and a C compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostler.client import moving
from ostler.client.receive import Receiver
from ostler.control import runtime
from ostler.images import kernels
from ostler.migration.address import TlsFiles, parse_address
from tests.guest.devices_guest import Guest, image_of, running

HOST, NETWORK = "198.51.100.1", "198.51.100"
TICK = struct.Struct("<3Q")
TICK_S = 0.002
QEMU = "qemu-system-x86_64"
MEMORY_MIB, RATE_MB, WORKING_SET_MIB = 1024, 100, 256
SETTLE_S = 1.5
GUEST = Path(__file__).resolve().parent.parent / "guest"


def script(number: int, port: int, rate: int) -> str:
    """The guest's work."""
    return f"""
ip addr add {NETWORK}.{number}/24 dev eth0
ip link set eth0 up
/moving {HOST} {port} {rate} {WORKING_SET_MIB}
"""


def program(folder: Path) -> bytes:
    """The guest's program, built on this host."""
    built = folder / "moving"
    subprocess.run(["gcc", "-O2", "-static", "-pthread", "-o", built, GUEST / "moving.c"], check=True)
    return built.read_bytes()


@contextlib.contextmanager
def bridge() -> Iterator[str]:
    """A bridge with this host on it."""
    name = f"ostmg{os.getpid() % 100_000}"
    # An address of its own: else it takes the lowest of its ports', and changes it when a guest comes or goes.
    own = ["address", "02:00:00:00:00:01"]
    subprocess.run(["ip", "link", "add", name, *own, "type", "bridge", "forward_delay", "0"], check=True)
    try:
        subprocess.run(["ip", "addr", "add", f"{HOST}/24", "dev", name], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)


def certificates(folder: Path) -> TlsFiles:
    """An authority and one certificate for 127.0.0.1, for both sides."""
    authority, key, cert = folder / "ca.pem", folder / "key.pem", folder / "cert.pem"
    openssl = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-days", "2"]  # fmt: skip
    subprocess.run(
        [*openssl, "-subj", "/CN=bench authority", "-keyout", folder / "ca.key", "-out", authority],
        check=True, capture_output=True,
    )  # fmt: skip
    subprocess.run(
        [*openssl, "-subj", "/CN=bench", "-addext", "subjectAltName=IP:127.0.0.1",
         "-addext", "basicConstraints=critical,CA:FALSE", "-CA", authority, "-CAkey", folder / "ca.key",
         "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return TlsFiles(cert, key, authority)


class Peer:
    """The stream's other end: when ticks came, that none is missing, and that no page was lost."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("0.0.0.0", 0))
        self.port = int(self._listener.getsockname()[1])
        self._ticking = threading.Event()
        self._lock = threading.Lock()
        self._longest = 0.0
        self._last: float | None = None
        self.ticks = self.lost = self.bad = 0
        self.guest_longest = 0.0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float = 240) -> None:
        """Until the guest ticks."""
        if not self._ticking.wait(timeout_s):
            raise SystemExit("the guest does not tick")

    def longest_gap(self) -> float:
        """Since the last time this was asked; the time since the last tick counts."""
        with self._lock:
            found, self._longest = self._longest, 0.0
            return max(found, time.monotonic() - (self._last or 0))

    def _read(self) -> None:
        try:
            connected, _ = self._listener.accept()
        except OSError:  # closed before anybody came
            return
        data, guest_last = b"", 0
        with connected:
            while more := connected.recv(1 << 16):
                now = time.monotonic()
                data += more
                whole = len(data) // TICK.size * TICK.size
                with self._lock:
                    if self._last is not None:
                        self._longest = max(self._longest, now - self._last)
                    self._last = now
                for tick, guest_ns, bad in TICK.iter_unpack(data[:whole]):
                    self.lost += tick != self.ticks
                    self.ticks, self.bad = tick + 1, bad
                    if guest_last:
                        self.guest_longest = max(self.guest_longest, (guest_ns - guest_last) / 1e9)
                    guest_last = guest_ns
                data = data[whole:]
                self._ticking.set()

    def close(self) -> None:
        self._listener.close()


@dataclass(slots=True)
class Moved:
    """One migration: pauses in seconds as the peer saw it and as the source measured it."""

    seen_s: float
    said_s: float
    elapsed_s: float
    facts: dict[str, Any]


@contextlib.contextmanager
def receiving(tls: TlsFiles | None) -> Iterator[str]:
    """A listener in a thread; its address."""
    said: list[tuple[str, dict[str, Any]]] = []
    receiver = Receiver(parse_address("tcp://127.0.0.1:0"), lambda state, facts: said.append((state, facts)), tls=tls)
    thread = threading.Thread(target=receiver.serve, daemon=True)
    thread.start()
    try:
        yield str(receiver.address)
    finally:
        receiver.stop()
        thread.join()
        receiver.close()


def ostler(rounds: int, tls: TlsFiles, binary: bytes, *, cpus: int, downtime_ms: float) -> tuple[list[Moved], Peer]:
    """One guest, moved back and forth."""
    peer = Peer()
    found = []
    with bridge() as name, receiving(tls) as address, _guest(2, name, peer, binary, cpus) as guest:
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
                time.sleep(0.3)
                found.append(Moved(peer.longest_gap(), facts["pause_s"], facts["elapsed_s"], facts))
                here = there
                print(f"  {number + 1}: seen {found[-1].seen_s * 1000:.0f} ms, said {found[-1].said_s * 1000:.0f} ms, "
                      f"{facts['elapsed_s']:.1f} s, {facts['round']} rounds, {facts['sent_bytes'] >> 20} MiB, "
                      f"{ {k: round(v * 1000, 1) for k, v in facts['pause_parts'].items()} }", flush=True)  # fmt: skip
        finally:
            kill(here)
    peer.close()
    return found, peer


def kill(name: str) -> None:
    """End a guest that is not this process's child."""
    from ostler.client import guests
    from ostler.errors import OstlerError

    with contextlib.suppress(OstlerError):
        guests.kill(runtime.find(name))


@contextlib.contextmanager
def _guest(number: int, bridge_name: str, peer: Peer, binary: bytes, cpus: int, rate: int = RATE_MB,
           memory: str = f"{MEMORY_MIB}M") -> Iterator[Guest]:  # fmt: skip
    with running(
        script(number, peer.port, rate), files={"moving": binary}, nets=[f"bridge={bridge_name}"], memory=memory,
        cpus=cpus, report_to=HOST,
    ) as guest:  # fmt: skip
        yield guest


# -- QEMU -----------------------------------------------------------------------------------------------


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

    Not `-cpu max`: QEMU 7.2's guests of that model reboot when they have been moved.
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
            [QEMU, "-accel", "tcg", "-cpu", "qemu64", "-m", f"{MEMORY_MIB}M", "-nographic", "-nodefaults",
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


# -- post-copy ------------------------------------------------------------------------------------------


def late(rounds: int, tls: TlsFiles, binary: bytes) -> None:
    """A guest that writes twice what the link may carry."""
    peer = Peer()
    seen, said, elapsed = [], [], []
    with bridge() as name, receiving(tls) as address, _guest(4, name, peer, binary, 1) as guest:
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


# -- many at once ---------------------------------------------------------------------------------------


def several(count: int, tls: TlsFiles, binary: bytes) -> None:
    """Guests of 256 MiB, all moved at once."""
    peers = [Peer() for _ in range(count)]
    with bridge() as name, receiving(tls) as address, contextlib.ExitStack() as stack:
        guests = []
        for number, peer in enumerate(peers):
            guests.append(stack.enter_context(_small(number + 10, name, peer, binary)))
            peer.wait()
        time.sleep(2 * SETTLE_S)
        for peer in peers:
            peer.longest_gap()
        entries = [runtime.find(guest.folder.name) for guest in guests]
        found = _rename_all(entries, address, tls)
        time.sleep(0.5)
        gaps = [peer.longest_gap() for peer in peers]
        said = [facts["pause_s"] for facts in found.values() if not isinstance(facts, Exception)]
        for entry in entries:
            kill(f"{entry.name}-b")
        print(f"{count} at once: {len(said)} arrived, longest pause seen {max(gaps) * 1000:.0f} ms, "
              f"said {max(said, default=0) * 1000:.0f} ms, ticks lost {sum(peer.lost for peer in peers)}, "
              f"pages lost {sum(peer.bad for peer in peers)}", flush=True)  # fmt: skip


def _rename_all(entries: list[runtime.Entry], address: str, tls: TlsFiles) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def move(entry: runtime.Entry) -> None:
        try:
            found[entry.name] = moving.migrate(entry, moving.Wish(address=address, tls=tls, name=f"{entry.name}-b"))
        except Exception as error:
            found[entry.name] = error
            print(f"  {entry.name}: {error}", flush=True)

    threads = [threading.Thread(target=move, args=(entry,)) for entry in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@contextlib.contextmanager
def _small(number: int, bridge_name: str, peer: Peer, binary: bytes) -> Iterator[Guest]:
    with _guest(number, bridge_name, peer, binary, 1, rate=10, memory="384M") as guest:
        yield guest


def report(name: str, moved: list[Moved], peer: Peer) -> None:
    """The figures of one side."""
    if not moved:
        return
    seen = [each.seen_s * 1000 for each in moved]
    said = [each.said_s * 1000 for each in moved]
    print(
        f"{name}: pause seen by the peer: median {statistics.median(seen):.0f} ms, worst {max(seen):.0f} ms of "
        f"{len(seen)}; said: median {statistics.median(said):.0f}, worst {max(said):.0f} ms; whole: median "
        f"{statistics.median(each.elapsed_s for each in moved):.1f} s; ticks {peer.ticks}, out of order or lost "
        f"{peer.lost}, pages lost {peer.bad}, the guest's own longest gap {peer.guest_longest * 1000:.0f} ms",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--qemu-rounds", type=int, default=5)
    parser.add_argument("--several", type=int, default=8)
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
            several(given.several, tls, binary)
    return 0


if __name__ == "__main__":
    sys.exit(main())

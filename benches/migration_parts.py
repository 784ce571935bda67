"""What the measurements of migration share: the guest's work, the stream's other end, bridge, certificates."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostler.client import guests
from ostler.client.receive import Receiver
from ostler.control import runtime
from ostler.errors import OstlerError
from ostler.migration.address import TlsFiles, parse_address
from tests.guest.devices_guest import Guest, running

HOST, NETWORK = "198.51.100.1", "198.51.100"
TICK = struct.Struct("<3Q")
TICK_S = 0.002
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
        self._longest = self.longest_at = 0.0
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
                    if self._last is not None and now - self._last > self._longest:
                        self._longest, self.longest_at = now - self._last, now
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


def kill(name: str) -> None:
    """End a guest that is not this process's child."""
    with contextlib.suppress(OstlerError):
        guests.kill(runtime.find(name))


@contextlib.contextmanager
def working(number: int, bridge_name: str, peer: Peer, binary: bytes, cpus: int, rate: int = RATE_MB,
           memory: str = f"{MEMORY_MIB}M") -> Iterator[Guest]:  # fmt: skip
    with running(
        script(number, peer.port, rate), files={"moving": binary}, nets=[f"bridge={bridge_name}"], memory=memory,
        cpus=cpus, report_to=HOST,
    ) as guest:  # fmt: skip
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

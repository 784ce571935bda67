"""`python -m benches.network`: iperf3 into a guest and out of it, beside QEMU's TCG with a passt of the same kind.

One guest of each stays up, runs alternate, the median counts. The guest has busybox, modules and this host's iperf3.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ostler.backends.passt_options import Forward, PasstOptions, addresses, arguments
from ostler.host.helpers import Helper, find_program
from ostler.images import kernels
from tests.guest.devices_guest import DHCP, WAIT_S, image_of, reports, running

QEMU = "qemu-system-x86_64"
IPERF = "iperf3"
IPERF_PORT = 5201
ATTEMPTS = 5
SCRIPT = DHCP + f"mkdir -p /var/run\n/usr/bin/{IPERF} -s >/dev/null &\nsay ready\nwhile :; do sleep 1000; done\n"
MAC = "52:54:00:12:34:56"


def program_files(program: str) -> dict[str, bytes]:
    """A program of this host with the libraries it needs, by their paths."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    paths = [program, *re.findall(r"(/\S+) \(0x", listed)]
    return {path.removeprefix("/"): Path(path).read_bytes() for path in paths}


@contextlib.contextmanager
def ostler_guest(iperf: str, port: int) -> Iterator[None]:
    """A guest of ours with the server in it."""
    with running(SCRIPT, files=program_files(iperf), ports=[f"127.0.0.1:{port}:{IPERF_PORT}"]) as guest:
        guest.next()
        yield


@contextlib.contextmanager
def qemu_guest(iperf: str, port: int) -> Iterator[None]:
    """The same in QEMU."""
    kernel = kernels.fetch()
    image = image_of(SCRIPT, kernel, files=program_files(iperf))
    forward = Forward(port, IPERF_PORT, host_address="127.0.0.1")
    options = PasstOptions(bytes.fromhex(MAC.replace(":", "")), (forward,))
    ours, theirs = socket.socketpair()
    passt = [find_program("passt", package="passt"), *arguments(options, addresses(options), theirs.fileno())]
    with contextlib.ExitStack() as stack:
        stack.enter_context(Helper("passt", passt, pass_fds=[theirs.fileno()]))
        theirs.close()
        said, host = stack.enter_context(reports(b""))
        argv = [
            QEMU, "-accel", "tcg", "-cpu", "max", "-m", "512", "-display", "none", "-no-reboot", "-nodefaults",
            "-kernel", str(kernel.image), "-initrd", str(image), "-append", f"quiet report={host}",
            "-netdev", f"stream,id=n,server=off,addr.type=fd,addr.str={ours.fileno()}",
            "-device", f"virtio-net-pci,netdev=n,mac={MAC},host_mtu=65520,romfile=",
        ]  # fmt: skip
        stack.enter_context(Helper("qemu", argv, pass_fds=[ours.fileno()]))
        ours.close()
        said.get(timeout=WAIT_S)
        yield


def throughput(port: int, seconds: int, *options: str) -> float:
    """Megabits a second that arrived."""
    argv = [IPERF, "-c", "127.0.0.1", "-p", str(port), "-J", "-t", str(seconds), *options]
    said = ""
    for _ in range(ATTEMPTS):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout or "{}")
        if "sum_received" in found.get("end", {}):
            return float(found["end"]["sum_received"]["bits_per_second"]) / 1e6
        said = done.stdout[-300:] + done.stderr
        # The server opens its port anew between runs.
        time.sleep(1)
    raise SystemExit(f"bench: iperf3: {said}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    iperf = shutil.which(IPERF)
    if iperf is None or shutil.which("passt") is None:
        print("network: iperf3 or passt is not installed, nothing measured")
        return 0
    sides: dict[str, Callable[[str, int], contextlib.AbstractContextManager[None]]] = {"ostler": ostler_guest}
    if shutil.which(QEMU):
        sides["qemu"] = qemu_guest
    ways = {"to the guest": (), "from the guest": ("-R",)}
    rates: dict[tuple[str, str], list[float]] = {(way, side): [] for way in ways for side in sides}
    with contextlib.ExitStack() as stack:
        ports = {side: free_port() for side in sides}
        for side, guest in sides.items():
            stack.enter_context(guest(iperf, ports[side]))
        for _ in range(given.runs):
            for way, options in ways.items():
                for side in sides:
                    rates[way, side].append(throughput(ports[side], given.seconds, *options))
    for way in ways:
        ours = statistics.median(rates[way, "ostler"])
        if "qemu" in sides:
            theirs = statistics.median(rates[way, "qemu"])
            print(f"iperf3 {way}: {ours / theirs:.2f} of QEMU's ({ours:.0f} and {theirs:.0f} Mbit/s)")
        else:
            print(f"iperf3 {way}: {ours:.0f} Mbit/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A running Linux carried from one accelerator to the other, by a snapshot in between.

    carry.py save --accel soft --count 20 FOLDER    boot, run into the workload, snapshots at random ticks: FOLDER-1, …
    carry.py continue --accel kvm FOLDER-1          a guest that goes on from the snapshot, to its end

The workload counts, and hashes what it counted: what its last line says depends on every step on both sides. The
processor's model is what both accelerators can give of the older default: `--without` names what the poorer one lacks.
Snapshots are made and read by the package's own code, as `ostler snapshot create` and `ostler restore` do; what the
guest had said on its console is among the manifest's facts.

Exit status 0 when it went as it should, 1 when not; one line says how far the guest was.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from importlib.metadata import version
from pathlib import Path

from ostler import accel
from ostler.accel.fitting import missing_features
from ostler.accel.models import FALLBACK_MODEL, model
from ostler.boot.load import read_kernel
from ostler.boot.unpacked import UnpackedKernels
from ostler.config import GuestSpec
from ostler.host.folders import cache_root
from ostler.snapshot import manifest, store
from ostler.testing.watched import Watched, watched
from ostler.vmm.capture import Capturer
from ostler.vmm.origin import Origin
from ostler.vmm.processors import EndKind

TICKS = 60
# The workload stands between the first and this tick when it is saved: it has work left on the other side.
LAST_STOP = 50
LONGEST_DELAY_S = 0.1
MEMORY = "96M"
APPEND = "console=ttyS0 quiet panic=-1"
WORKLOAD = f"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /tmp
/bin/busybox mount -t proc proc /proc
n=0 sum=start
while [ $n -lt {TICKS} ]; do
    n=$((n + 1))
    sum=$(echo "$sum $n" | /bin/busybox sha256sum)
    echo "tick $n"
done
echo "end $sum"
/bin/busybox poweroff -f
""".encode()


def last_line() -> str:
    """The workload's last line, worked out here."""
    value = "start"
    for n in range(1, TICKS + 1):
        value = hashlib.sha256(f"{value} {n}\n".encode()).hexdigest() + "  -"
    return f"end {value}"


def reduced_model(without: str) -> str:
    """The model's name without the features listed, as `missing` prints them."""
    return ",".join([FALLBACK_MODEL, *(f"-{name}" for name in without.split(",") if name)])


def guest_spec(kernel: Path, image: Path, cpu: str, cpus: int) -> GuestSpec:
    """The guest on both sides."""
    return GuestSpec(kernel=kernel, initrd=image, memory=MEMORY, cpus=cpus, cpu=cpu, append=APPEND)


def save(arguments: argparse.Namespace) -> int:
    """Boot, save at random instants of the workload, each into a folder of its own."""
    chosen = random.Random(arguments.seed)
    ticks = sorted(chosen.sample(range(1, LAST_STOP + 1), arguments.count))
    stops = [(b"tick %d\r" % tick, chosen.uniform(0, LONGEST_DELAY_S)) for tick in ticks]
    spec = guest_spec(arguments.kernel, arguments.initrd, reduced_model(arguments.without), arguments.cpus)
    opened = accel.open(arguments.accel)
    with watched(spec, opened) as guest:
        machine = guest.process.machine
        kernel = read_kernel(arguments.kernel, unpacked=UnpackedKernels(cache_root() / "unpacked"))
        machine.load(kernel, initrd=arguments.initrd.read_bytes(), cmdline=APPEND)
        saved_states = 0

        def take() -> None:
            """In the loop's thread: catch the guest, write the snapshot, and let it go on or end it."""
            nonlocal saved_states
            saved_states += 1
            folder = Path(f"{arguments.folder}-{saved_states}")
            rip = snapshot(folder, guest)
            print(f"saved on {arguments.accel} after tick {guest.console.count(b'tick ')}, RIP {rip:#x}", flush=True)
            if saved_states == arguments.count:
                guest.process.quit()

        end = guest.run(stops, take)
    opened.close()
    if saved_states != arguments.count:
        return complain(f"ended by {end.kind.value} after {saved_states} of {arguments.count} stops", guest.console)
    return 0


def snapshot(folder: Path, guest: Watched) -> int:
    """Make a snapshot; where the first processor stood."""
    process = guest.process
    process.pause()
    try:
        # Both of one instant: nobody says anything while the guest stands still.
        facts = {"console": guest.heard().decode(errors="replace")}
        given = {"name": folder.name, "ostler": version("ostler"), "facts": facts}
        with store.workspace(folder.name, within=folder.parent) as part:
            Capturer(process, "carried").to_folder(part, given, sync=False)()
            rip = int(process.machine.vcpus[0].get_regs().rip)
    finally:
        process.resume()
    return rip


def resume(arguments: argparse.Namespace) -> int:
    """A guest that goes on from the snapshot, run to its end; judge the whole console."""
    origin = Origin.read(store.Snapshot(arguments.folder, manifest.load(arguments.folder)))
    found = origin.snapshot.manifest
    spec = GuestSpec.model_validate({**found.spec, "cpu": found.model})
    opened = accel.open(arguments.accel)
    with watched(spec, opened, beginning=origin) as guest:
        origin.complete(guest.process.machine.memory)
        guest.process.restore_state(origin.saved)
        end = guest.run()
    opened.close()
    before = str(found.facts["console"])
    text = before + guest.console.decode(errors="replace")
    lines = text.replace("\r", "").splitlines()
    ticks = [line for line in lines if line.startswith("tick ")]
    if end.kind is not EndKind.POWER_OFF:
        return complain(f"ended by {end.kind.value} {end.text}", text.encode())
    if ticks != [f"tick {n}" for n in range(1, TICKS + 1)] or last_line() not in lines:
        return complain("the workload went wrong", text.encode())
    print(f"continued on {arguments.accel} from tick {before.count('tick ')} to the end: right")
    return 0


def complain(text: str, console: bytes | bytearray) -> int:
    """Say what went wrong and what the guest said last."""
    print(f"carry: {text}\n{bytes(console[-1500:]).decode(errors='replace')}", file=sys.stderr)
    return 1


def missing(arguments: argparse.Namespace) -> int:
    """Print what the accelerator lacks of the model, separated by commas."""
    opened = accel.open(arguments.accel)
    print(",".join(missing_features(model(FALLBACK_MODEL), opened)))
    opened.close()
    return 0


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="carry.py", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("save", "continue", "missing"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--accel", default="auto")
    parser.add_argument("--kernel", type=Path)
    parser.add_argument("--initrd", type=Path)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1, help="how often to save")
    parser.add_argument("--without", default="", help="features of the model that the other side lacks")
    arguments = parser.parse_intermixed_args()
    return {"save": save, "continue": resume, "missing": missing}[arguments.what](arguments)


if __name__ == "__main__":
    sys.exit(main())

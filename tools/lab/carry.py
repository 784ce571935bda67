"""A running Linux carried from one accelerator to the other, by a file in between.

    carry.py save --accel soft --count 20 FILE    boot, run into the workload, save at random instants: FILE-1, …
    carry.py continue --accel kvm FILE-1          put the state into a new machine and run it to its end

The workload counts, and hashes what it counted: what its last line says depends on every step on both sides. The
processor's model is what both accelerators can give of the older default: `--without` names what the poorer one lacks.
The file is for this tool only: a line of JSON, then the guest's memory but for its empty parts.

Exit status 0 when it went as it should, 1 when not; one line says how far the guest was.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ostler import accel
from ostler.abi.kvm.state import Regs
from ostler.accel.fitting import missing_features
from ostler.accel.models import FALLBACK_MODEL, model
from ostler.boot.load import read_kernel
from ostler.boot.unpacked import UnpackedKernels
from ostler.config import GuestSpec
from ostler.host.folders import cache_root
from ostler.machine import saved
from ostler.memory import GuestMemory
from ostler.testing.watched import Watched, watched
from ostler.vmm.processors import EndKind

TICKS = 60
# The workload stands between the first and this tick when it is saved: it has work left on the other side.
LAST_STOP = 50
LONGEST_DELAY_S = 0.1
PART_BYTES = 64 << 10
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
    """Boot, save at random instants of the workload, each into a file of its own."""
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
            """In the loop's thread: hold the guest, write the file, and let it go on or end it."""
            nonlocal saved_states
            saved_states += 1
            guest.process.pause()
            path = Path(f"{arguments.file}-{saved_states}")
            rip = write(path, saved.save(machine, opened), machine.memory, guest, spec)
            print(f"saved on {arguments.accel} after tick {guest.console.count(b'tick ')}, RIP {rip:#x}", flush=True)
            guest.process.resume()
            if saved_states == arguments.count:
                guest.process.quit()

        end = guest.run(stops, take)
    opened.close()
    if saved_states != arguments.count:
        return complain(f"ended by {end.kind.value} after {saved_states} of {arguments.count} stops", guest.console)
    return 0


def write(path: Path, machine: saved.SavedMachine, memory: GuestMemory, guest: Watched, spec: GuestSpec) -> int:
    """Write the file; where the first processor stands."""
    state = asdict(machine)
    header = {"state": state, "console": guest.heard(), "cpu": spec.cpu, "cpus": spec.cpus}
    with path.open("wb") as out:
        out.write(json.dumps(header, default=as_text).encode() + b"\n")
        for gpa, part in parts(memory):
            out.write(gpa.to_bytes(8, "little"))
            out.write(part)
    return int(Regs.from_buffer_copy(state["processors"][0]["structures"]["regs"]).rip)


def resume(arguments: argparse.Namespace) -> int:
    """Put the file's state into a new machine, run it to its end, judge the whole console."""
    with arguments.file.open("rb") as file:
        header = json.loads(file.readline(), object_hook=from_text)
        memory = memoryview(file.read())
    spec = guest_spec(Path(os.devnull), Path(os.devnull), header["cpu"], header["cpus"])
    opened = accel.open(arguments.accel)
    with watched(spec, opened) as guest:
        unpack(memory, guest.process.machine.memory)
        state = header["state"]
        processors = [
            saved.SavedProcessor(**{**each, "msrs": {int(index): value for index, value in each["msrs"].items()}})
            for each in state["processors"]
        ]
        state |= {"processors": tuple(processors), "chips": tuple(state["chips"])}
        saved.restore(saved.SavedMachine(**state), guest.process.machine, opened)
        end = guest.run()
    opened.close()
    text = (header["console"] + guest.console).decode(errors="replace")
    lines = text.replace("\r", "").splitlines()
    ticks = [line for line in lines if line.startswith("tick ")]
    if end.kind is not EndKind.POWER_OFF:
        return complain(f"ended by {end.kind.value} {end.text}", text.encode())
    if ticks != [f"tick {n}" for n in range(1, TICKS + 1)] or last_line() not in lines:
        return complain("the workload went wrong", text.encode())
    before = header["console"].count(b"tick ")
    print(f"continued on {arguments.accel} from tick {before} to the end: right")
    return 0


def complain(text: str, console: bytes | bytearray) -> int:
    """Say what went wrong and what the guest said last."""
    print(f"carry: {text}\n{bytes(console[-1500:]).decode(errors='replace')}", file=sys.stderr)
    return 1


def parts(memory: GuestMemory) -> Iterator[tuple[int, memoryview]]:
    """Guest memory in parts, without the empty ones."""
    zero = bytes(PART_BYTES)
    for region in memory.regions:
        for gpa in range(region.start, region.start + region.size_bytes, PART_BYTES):
            part = memory.view(gpa, PART_BYTES)
            if bytes(part) != zero:
                yield gpa, part


def unpack(data: memoryview, memory: GuestMemory) -> None:
    """Undo `parts`, into fresh memory."""
    for at in range(0, len(data), PART_BYTES + 8):
        gpa = int.from_bytes(data[at : at + 8], "little")
        memory.write(gpa, data[at + 8 : at + 8 + PART_BYTES])


def as_text(value: Any) -> Any:
    """Bytes, as JSON has none."""
    if isinstance(value, bytes | bytearray):
        return {"bytes": base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} in saved state")


def from_text(value: dict[str, Any]) -> Any:
    """Undo `as_text`."""
    return base64.b64decode(value["bytes"]) if value.keys() == {"bytes"} else value


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
    parser.add_argument("file", nargs="?", type=Path)
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

"""`python -m benches.snapshots [restore|run|fork|load|mutations]…`: snapshots and forks, beside QEMU's TCG.

    restore    a booted Debian guest of 512 MiB: from the request to running, and to its agent's answer
    run        `ostler run debian -- true` whole, from the cached booted guest; the same guest booted by QEMU
    fork       the parent's pause, a child's first command, fifty children: who they are and what memory each has
    load       a guest that compiles, writes and counts is saved once and restored a hundred times
    mutations  ten thousand damaged snapshots: each is refused in one line, or is none that matters

Everything is on the software CPU, with a warm pool of VM processes: `restore` waits until it has a guest ready. The
host's load stands beside each figure.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benches.report import note

import ostler
from ostler import accel
from ostler.accel.api import Accel
from ostler.client import plan as plans
from ostler.client import snapshots
from ostler.client.snapshots import RestoredGuest
from ostler.config import parse_request
from ostler.control import pool, runtime
from ostler.errors import OstlerError
from ostler.snapshot import manifest, schema, store
from ostler.vmm.console import on_descriptors
from ostler.vmm.origin import Origin
from ostler.vmm.run import GuestProcess
from tests.guest.harness import OSTLER

SNAPSHOT = "bench"
QEMU = "qemu-system-x86_64"
WARM_S = 120.0
# How long a guest with a state that was damaged and not refused may do what it likes.
RUN_NS = 20_000_000
# What the guest does in `load`: a compiler's kind of work, writes that are flushed, packets that are answered, and a
# count that must not slip.
WORK = """
n=0
while :; do
    n=$((n + 1))
    python3 -c 'compile("x = 1 * 2; " * 900, "x", "exec")' || touch /root/wrong
    dd if=/dev/zero of=/root/data bs=64k count=4 conv=fsync 2> /dev/null || touch /root/wrong
    python3 /root/ping.py || touch /root/wrong
    printf '%s\\n' $n > /root/count.new && mv /root/count.new /root/count
done
"""


# Echoes of the guest's own kernel, and passt's word where its gateway is: the image has no ping. Who goes on from a
# snapshot has another passt, and another address a moment later: what was on its way then is asked for again.
PING = r"""
import socket, struct, sys
def echo():
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 1) as ping:
        ping.settimeout(5)
        ping.sendto(struct.pack("!BBHHH", 8, 0, 0xFFFF - 0x0800 - 7 - 1, 7, 1), ("127.0.0.1", 0))
        return bool(ping.recv(100))
def gateway():
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)) as link:
        link.settimeout(2)
        link.bind(("eth0", 0x0806))
        own = link.getsockname()[4]
        addresses = own + socket.inet_aton("10.213.77.2") + bytes(6) + socket.inet_aton("10.213.77.1")
        link.send(b"\xff" * 6 + own + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1) + addresses)
        return link.recv(100)[20:22] == b"\0\2"
for what in (echo, gateway):
    for attempt in range(5):
        try:
            if what():
                break
        except OSError:
            pass
    else:
        sys.exit(1)
"""


@contextlib.contextmanager
def everything_apart() -> Iterator[None]:
    """Guests, snapshots and a pool of their own, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="ostler-bench-") as name:
        os.environ |= {"OSTLER_DATA": f"{name}/data", "OSTLER_RUNTIME": f"{name}/run", "OSTLER_POOL": "on"}
        os.environ.pop("OSTLER_COLD", None)
        pool.start()
        if not pool.wait_until_warm(WARM_S):
            raise SystemExit("bench: the pool does not answer")
        try:
            yield
        finally:
            pool.stop()


@contextlib.contextmanager
def parent(memory: str = "512M", **options: Any) -> Iterator[ostler.VM]:
    """A booted guest."""
    with ostler.VM("debian", accel="soft", memory=memory, cold=True, **options) as vm:
        vm.run(["true"], check=True)
        yield vm


def say(what: str, values: Sequence[float], unit: str, wanted: float) -> None:
    """One line: median, worst, what is wanted."""
    load = os.getloadavg()[0]
    print(
        f"{what:52} {statistics.median(values):8.1f} {unit} median, {max(values):8.1f} worst of {len(values)}"
        f"   wanted {wanted:g}   load {load:.1f}", flush=True,
    )  # fmt: skip


def measure_restore(rounds: int) -> None:
    """See the head of the file."""
    with parent() as vm:
        vm.snapshot(SNAPSHOT)
    found = store.find(SNAPSHOT)
    runs: list[float] = []
    answers: list[float] = []
    commands: list[float] = []
    for number in range(rounds + 1):
        # The first has none made ahead, and is none of the figures.
        pool.wait_until_warm(WARM_S, ready=min(number, 1))
        began = time.perf_counter()
        guest = snapshots.start(found, None, leash=True, remove=True, ports=False)
        runs.append((time.perf_counter() - began) * 1000)
        try:
            guest.agent.ping()
            answers.append((time.perf_counter() - began) * 1000)
            guest.configure()
            guest.agent.run(["true"])
            commands.append((time.perf_counter() - began) * 1000)
        finally:
            guest.end()
    store.remove(SNAPSHOT)
    say("restore: request to the guest running", runs[1:], "ms", 30)
    say("restore: request to the agent's answer", answers[1:], "ms", 150)
    say("restore: request to the end of its first command", commands[1:], "ms", 200)
    first = ", ".join(f"{each[0]:.1f}" for each in (runs, answers, commands))
    print(f"the first, of which the pool had none ready: {first} ms", flush=True)


def measure_run(rounds: int) -> None:
    """See the head of the file."""
    words = [*OSTLER, "run", "--accel", "soft", "debian", "--", "true"]
    for _ in range(2):
        subprocess.run(words, check=True)
    say("ostler run debian -- true, cached", [_timed(words) for _ in range(rounds)], "s", 0.5)
    cold = [*OSTLER, "run", "--cold", "--accel", "soft", "debian", "--", "true"]
    say("ostler run --cold debian -- true", [_timed(cold) for _ in range(3)], "s", float("nan"))
    if shutil.which(QEMU) is None:
        note(f"{QEMU} is not installed: nothing to compare with")
        return
    say("the same guest booted by QEMU's TCG", [_timed(_qemu()) for _ in range(3)], "s", float("nan"))


def _timed(words: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _qemu() -> list[str]:
    spec = plans.make(parse_request(image="debian")).spec
    disk = spec.disks[0]
    return [
        QEMU, "-accel", "tcg", "-cpu", "max", "-m", "512",
        "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio",
        "-kernel", str(spec.kernel), "-initrd", str(spec.initrd),
        "-append", f"{spec.append} ostler.exec=true panic=-1",
        "-drive", f"file={disk.path},format=raw,snapshot=on,if=none,id=root", "-device", "virtio-blk-pci,drive=root",
    ]  # fmt: skip


def measure_fork(children: int) -> None:
    """See the head of the file."""
    with parent() as vm:
        entry = runtime.find(vm.name)
        pauses: list[float] = []
        firsts: list[float] = []
        for _ in range(5):
            began = time.perf_counter()
            made, pause_ms = snapshots.fork(entry, [None], leash=True)
            made[0].agent.run(["true"])
            firsts.append((time.perf_counter() - began) * 1000)
            pauses.append(pause_ms)
            made[0].end()
        say("fork: the parent's pause", pauses, "ms", 20)
        say("fork: request to the end of a child's first command", firsts, "ms", 200)
        began = time.perf_counter()
        family, pause_ms = snapshots.fork(entry, [None] * children, leash=True)
        try:
            _look_at(family, time.perf_counter() - began, pause_ms)
        finally:
            for child in family:
                child.end()


def _look_at(family: list[RestoredGuest], seconds: float, pause_ms: float) -> None:
    script = "hostname; cat /sys/class/net/e*/address; cat /proc/sys/kernel/random/uuid"
    said = [child.agent.run(["sh", "-c", script]).text.split() for child in family]
    unique = [len({each[at] for each in said}) for at in range(3)]
    time.sleep(2)
    private = [_private_mib(child.entry.path / "pid") for child in family]
    print(f"{len(family)} children in {seconds:.1f} s, pause {pause_ms:.1f} ms; unique names {unique[0]}, MAC "
          f"addresses {unique[1]}, random numbers {unique[2]}", flush=True)  # fmt: skip
    say("private memory of an idle child", private, "MiB", 15)


def _private_mib(path: Path) -> float:
    lines = Path(f"/proc/{path.read_text().strip()}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def measure_load(rounds: int) -> None:
    """See the head of the file."""
    with parent() as vm:
        vm.write("/root/ping.py", PING)
        vm.run(["sh", "-c", f"({WORK}) > /dev/null 2>&1 &"], check=True)
        while vm.run(["test", "-e", "/root/count"]).returncode:
            time.sleep(0.2)
        if not vm.run(["test", "-e", "/root/wrong"]).returncode:
            raise SystemExit("bench: the guest's work fails before it is saved")
        before = int(vm.read("/root/count"))
        vm.snapshot(SNAPSHOT)
    found, right = store.find(SNAPSHOT), 0
    for number in range(rounds):
        try:
            with ostler.VM.restore(SNAPSHOT, ports=False) as again:
                first = int(again.read("/root/count"))
                while int(again.read("/root/count")) < first + 2:
                    time.sleep(0.05)
                wrong = again.run(["sh", "-c", "test -e /root/wrong; echo $?; dmesg | grep -ci 'error\\|bug:'"]).text
                if first >= before and wrong.split() == ["1", "0"]:
                    right += 1
                else:
                    note(f"restore {number}: count {first} after {before}, {wrong!r}")
        except (OstlerError, ValueError) as error:
            note(f"restore {number}: {error}")
    store.remove(found.name)
    print(f"restored under load: {right} of {rounds} right", flush=True)


def measure_mutations(count: int, seed: int = 1) -> None:
    """See the head of the file; `seed` begins another series."""
    with parent(memory="128M", nets=[]) as vm:
        vm.snapshot(SNAPSHOT)
    found = store.find(SNAPSHOT)
    damage, chosen = found.folder.parent / "damaged", random.Random(seed)
    ends = {"refused": 0, "ran": 0}
    opened = accel.open("soft")
    for number in range(count):
        shutil.rmtree(damage, ignore_errors=True)
        shutil.copytree(found.folder, damage, copy_function=os.link)
        _damage(damage, chosen, number)
        ends[_judged(damage, opened)] += 1
        if number % 500 == 499:
            note(f"{number + 1} mutations: {ends}")
    shutil.rmtree(damage)
    opened.close()
    store.remove(SNAPSHOT)
    print(f"mutations, seed {seed}: {ends} of {count}; nothing crashed", flush=True)


def _damage(folder: Path, chosen: random.Random, number: int) -> None:
    """One file changed: bytes, length, or the body of the state with a checksum that is right again."""
    name = ("manifest.json", "state", "state", "disk0.map")[number % 4]
    data = bytearray((folder / name).read_bytes())
    sealed = name == "state" and number % 8 >= 4
    # Half of those stay well formed: what they say is for the devices and the processor to judge.
    formed = sealed and number % 16 >= 8
    body = data[schema.HEAD.size :] if sealed else data
    for _ in range(chosen.randint(1, 6)):
        at = chosen.randrange(max(len(body), 1))
        if formed:
            body[at : at + 1] = _another(chosen, body[at : at + 1])
            continue
        what = chosen.randrange(4)
        if what == 0:
            del body[at:]
        elif what == 1:
            body[at : at + chosen.randrange(4)] = chosen.randbytes(chosen.randrange(5))
        elif what == 2:
            body[at : at + 1] = chosen.choice((b"0", b"9", b"A", b"/", b'"', b"}", b"-"))
        else:
            body[at:at] = body[at : at + chosen.randrange(64)]
    if sealed:
        import hashlib

        head = schema.HEAD.pack(schema.MAGIC, schema.VERSION, len(body), hashlib.sha256(body).digest())
        data = bytearray(head + body)
    (folder / name).unlink()
    (folder / name).write_bytes(data)
    if sealed:
        # The manifest of whoever attacks says what it must.
        facts = manifest.load(folder)
        files = {**facts.files, name: store.describe(folder, name, sync=False)}
        manifest.save(facts.model_copy(update={"files": files}), folder)


def _another(chosen: random.Random, old: bytes | bytearray) -> bytes | bytearray:
    """A digit for a digit, a letter for a letter."""
    if old.isdigit():
        return chosen.choice(b"123456789").to_bytes()
    return chosen.choice(b"ABCXYZabcxyz/+").to_bytes() if old.isalpha() and old.isupper() else old


def _judged(folder: Path, opened: Accel) -> str:
    """What becomes of a guest that is to go on from there: here, in this process, which a crash would end."""
    try:
        found = store.Snapshot(folder, manifest.load(folder))
        plan, _ = snapshots.plan(found, ports=False)
        origin = Origin.read(found)
        with tempfile.TemporaryDirectory() as place, Path(os.devnull).open("wb") as nothing:
            console = on_descriptors(None, nothing.fileno())
            process = GuestProcess(plan.spec, opened, console, folder=Path(place), beginning=origin)
            with process:
                origin.complete(process.machine.memory)
                process.restore_state(origin.saved)
                timer = process.loop.new_timer()
                timer.call(process.quit)
                timer.arm(time.monotonic_ns() + RUN_NS)
                process.run()
    except OstlerError as error:
        if "\n" in str(error):
            raise SystemExit(f"mutation: {error!r}") from error
        return "refused"
    return "ran"


def main() -> int:
    """Measure what is asked for."""
    kinds: dict[str, tuple[Callable[..., None], int]] = {
        "restore": (measure_restore, 20),
        "run": (measure_run, 20),
        "fork": (measure_fork, 50),
        "load": (measure_load, 100),
        "mutations": (measure_mutations, 10_000),
    }
    parser = argparse.ArgumentParser(prog="python -m benches.snapshots", description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="*", choices=[*kinds, []], default=["restore", "run", "fork"])
    parser.add_argument("--rounds", type=int, metavar="N", help="instead of as many as the bars say")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the mutations: for them in parts")
    given = parser.parse_args()
    print(f"{shlex.join(sys.argv)}: {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}", flush=True)
    with everything_apart():
        for what in given.what:
            measure, rounds = kinds[what]
            seeds = {"seed": given.seed} if what == "mutations" else {}
            measure(given.rounds or rounds, **seeds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

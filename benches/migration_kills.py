"""`python -m benches.migration_kills`: source, target or link ended at random moments of a migration.

A guest counts, on its console and on a disk that both sides open by its path. After each kill there must be exactly one
copy that goes on counting, from where the last one was, with the disk saying the same number. Killing the process in
which the guest runs, before the other has everything or after it has gone there, is killing the guest, as at any other
time: those are counted apart, and then no copy may run. What the sides' witnesses say tells the cases from each other.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostler.client import guests, moving
from ostler.client.receive import Receiver
from ostler.config.guest import parse_guest
from ostler.control import runtime
from ostler.control.launch import launch
from ostler.errors import OstlerError
from ostler.images import kernels
from ostler.migration.address import parse_address
from ostler.migration.witness import MOVING, RUNNING, STOPPED
from tests.guest.devices_guest import image_of

DISK_BYTES = 1 << 20
SETTLE_S = 6.0
SCRIPT = """
n=0
while :; do
    n=$((n + 1))
    printf '%016d' $n >/tmp/n
    dd if=/tmp/n of=/dev/vda bs=16 conv=notrunc,fsync 2>/dev/null
    echo "count $n"
    usleep 2000
done
"""
COUNT = re.compile(rb"count (\d+)\r?\n")


class Proxy:
    """A link that can be cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        self._cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Nothing passes any more."""
        self._cut = True
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(1 << 16):
                if self._cut:
                    return
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            # Whoever is still there hears of it at once, as it would from a real link's other end: closed, for what
            # is shut down only takes no more and lets its peer wait.
            for each in (one, other):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()


def counted(entry: runtime.Entry) -> int:
    """The last number on a guest's console."""
    with contextlib.suppress(OSError):
        found = COUNT.findall(entry.console_log.read_bytes()[-4096:])
        return int(found[-1]) if found else 0
    return 0


def alive(names: list[str]) -> list[runtime.Entry]:
    """Those that count on, looked at for a while."""
    found = []
    entries = [entry for entry in runtime.entries() if entry.name in names and entry.is_running()]
    before = {entry.name: counted(entry) for entry in entries}
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        time.sleep(0.1)
        found = [entry for entry in entries if entry.is_running() and counted(entry) > before[entry.name]]
        if found and time.monotonic() > deadline - SETTLE_S + 0.6:
            break
    return found


def boot(name: str, disk: Path) -> None:
    """A new guest that counts from one."""
    disk.write_bytes(bytes(DISK_BYTES))
    kernel = kernels.fetch()
    image = image_of(SCRIPT, kernel, drivers=("virtio_blk",))
    spec = parse_guest(
        kernel=kernel.image, initrd=image, append="console=ttyS0 loglevel=4", memory="128M", accel="soft",
        disks=[{"path": disk, "format": "raw"}],
    )  # fmt: skip
    launched = launch(name, spec.model_dump_json(), facts={})
    # A child that is killed would stay as a zombie, which still holds nothing.
    threading.Thread(target=launched.process.wait, daemon=True).start()
    entry = runtime.find(name)
    deadline = time.monotonic() + 120
    while counted(entry) < 5:
        if time.monotonic() > deadline:
            raise SystemExit("the guest does not count")
        time.sleep(0.1)


@contextlib.contextmanager
def receiving(began: threading.Event) -> Iterator[Receiver]:
    """A listener in a thread; `began` is set when a guest is on its way."""
    receiver = Receiver(parse_address("tcp://127.0.0.1:0"), lambda _state, _facts: began.set())
    thread = threading.Thread(target=receiver.serve, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.stop()
        thread.join()
        receiver.close()


def end(name: str) -> bool:
    """SIGKILL for a guest's process."""
    with contextlib.suppress(OstlerError, OSError, ValueError):
        pid = int((runtime.find(name).path / runtime.PID).read_text())
        os.kill(pid, signal.SIGKILL)
        return True
    return False


@dataclass(frozen=True, slots=True)
class Trial:
    """One migration and one kill."""

    what: str
    outcome: str
    living: list[str]
    words: dict[str, str]
    """How far each side had written that it was; one that went on has removed its own, but for a guest that runs."""

    def verdict(self, here: str, there: str) -> tuple[str, bool]:
        """What came of it, and whether that is right."""
        mine = self.words.get("source", ""), self.words.get("target", "")
        where = {(here,): "lives here", (there,): "lives there", (): "no copy"}.get((*self.living,), "WRONG")
        if self.what == "source" and mine == ("", RUNNING):
            return f"source killed when the guest had gone: {where}", self.living == [there]
        if self.what == "source" and mine[0] in ("", MOVING):
            return f"source killed while the guest ran in it: {where}", not self.living
        if self.what == "source" and mine[0] == STOPPED:
            # The target may have had everything or not: in the first case it has to go on.
            right = self.living == ([there] if mine[1] == RUNNING else [])
            return f"source killed in the hand-over: {where}", right
        if self.what == "source":
            return f"source killed after COMMIT: {where}", self.living == [there]
        if self.what == "target" and mine[1] == RUNNING:
            return f"target killed while the guest ran in it: {where}", not self.living
        if self.what == "target":
            return f"target killed before the guest ran in it: {where}", self.living == [here]
        return f"{self.what}: {where}", len(self.living) == 1


def trial(here: str, there: str, disk: Path, chance: random.Random, usual_s: list[float]) -> Trial:
    """One migration and one kill."""
    what = chance.choice(["source", "target", "link"])
    # Half of them about the hand-over, which is the last few percent.
    usual = sum(usual_s[-4:]) / len(usual_s[-4:])
    when = usual * (chance.uniform(0, 1.05) if chance.random() < 0.5 else chance.uniform(0.85, 1.05))
    said: list[Any] = []
    done: list[float] = []
    began = threading.Event()
    known = set(witnesses())
    with receiving(began) as receiver, contextlib.closing(Proxy(receiver.address.port)) as proxy:

        def move() -> None:
            wish = moving.Wish(address=f"tcp://127.0.0.1:{proxy.port}", name=there)
            try:
                said.append(moving.migrate(runtime.find(here), wish))
            except OstlerError as error:
                said.append(error)
            done.append(time.monotonic())

        thread = threading.Thread(target=move)
        thread.start()
        began.wait(30)
        started = time.monotonic()
        time.sleep(when)
        if what == "link":
            proxy.cut()
        elif not end(here if what == "source" else there):
            what += " (gone already)"
        thread.join(60)
        if thread.is_alive():
            return Trial(what, "the migration never ends", ["nobody", "knows"], {})
        survivors = alive([here, there])
        words = {}
        for path in witnesses():
            if path not in known:
                with contextlib.suppress(FileNotFoundError):
                    words[path.suffix[1:]] = path.read_text().strip()
    moved = isinstance(said[0], dict)
    if moved:
        usual_s.append(done[0] - started)
    outcome = "moved" if moved else str(said[0])
    for entry in survivors:
        on_disk, on_console = int(disk.read_bytes()[:16] or b"0"), counted(entry)
        if not -3 <= on_console - on_disk <= 3:
            return Trial(what, f"{outcome}; disk says {on_disk}, console {on_console}", ["disk", "differs"], words)
    return Trial(what, outcome, [entry.name for entry in survivors], words)


def witnesses() -> list[Path]:
    """What the two sides of migrations have written of themselves."""
    return [*(runtime.root() / "migrations").glob("*.*")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    tally: Counter[str] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        disk = Path(scratch) / "disk"
        here = ""
        usual_s = [1.0]
        for number in range(given.trials):
            if not here:
                here = f"kills-{os.getpid()}-{number}"
                boot(here, disk)
            there = f"kills-{os.getpid()}-{number}-b"
            before = counted(runtime.find(here))
            tried = trial(here, there, disk, chance, usual_s)
            text, right = tried.verdict(here, there)
            living = tried.living
            if living == [here] and counted(runtime.find(here)) < before:
                right = False
            wrong += not right
            tally[text] += 1
            shown = f"{text} {'' if right else 'WRONG '}{tried.words} [{tried.outcome[:110]}]"
            print(f"  {number + 1}: {shown}", flush=True)
            for name in (here, there):
                if name not in living:
                    end(name)
            here = living[0] if len(living) == 1 else ""
        if here:
            with contextlib.suppress(OstlerError):
                guests.kill(runtime.find(here))
    for name, count in sorted(tally.items()):
        print(f"{count:4} {name}")
    print(f"{given.trials} kills, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

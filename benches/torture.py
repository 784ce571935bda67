"""Disk torture: a guest writes and flushes, its VM process is killed with SIGKILL at a random moment, again and again.

    python -m benches.torture [--rounds 50] [--image debian] [--seed N] [--keep]

One persistent disk goes through all rounds. In each, a guest boots from it (its kernel replays the journal that the
kill cut short), writes numbered records, and says a number on its standard output only after fsync has returned for it.
What the host had read by the time of the kill is acknowledged. Then, on a copy of the disk: the journal is replayed,
e2fsck must find nothing, and every acknowledged record must be there, byte for byte. Records come in three ways:
appended to a log, files of their own, and one file replaced by rename; each with the fsync calls that this way needs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from ostler.host import files
from ostler.images import persist, tools

OSTLER = [sys.executable, "-m", "ostler"]
GUEST = DISK = "torture"
BOOT_LIMIT_S = 180.0
LONGEST_WRITING_S = 4.0
# Enough to look back at, and the disk does not fill up over the rounds.
KEPT_FILES = 100
BLOCK = 4096

RECORD = r"""
import hashlib

def record(number):
    size = 100 + number * 7919 % 16000
    word = hashlib.sha256(b"record %d" % number).digest()
    return b"%012d %06d " % (number, size) + (word * (size // 32 + 1))[:size] + hashlib.sha256(word).digest()
"""

WRITER = (
    RECORD
    + r"""
import os, sys

folder, number, kept = "/torture", int(sys.argv[1]), int(sys.argv[2])

def sync_folder():
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)

def write(name, data):
    with open(folder + "/" + name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

os.makedirs(folder, exist_ok=True)
log = os.open(folder + "/log", os.O_WRONLY | os.O_CREAT)
end = os.lseek(log, 0, os.SEEK_END) // 4096 * 4096
os.ftruncate(log, end)
os.fsync(log)
sync_folder()
parent = os.open("/", os.O_RDONLY)
os.fsync(parent)
while True:
    data = record(number)
    if number % 3 == 0:
        padded = data + bytes(-len(data) % 4096)
        os.pwrite(log, padded, end)
        os.fsync(log)
        end += len(padded)
    elif number % 3 == 1:
        write("file-%d" % number, data)
        sync_folder()
        old = folder + "/file-%d" % (number - 3 * kept)
        if os.path.exists(old):
            os.unlink(old)
    else:
        write("new", data)
        os.rename(folder + "/new", folder + "/current")
        sync_folder()
    print(number, flush=True)
    number += 1
"""
)
_space: dict[str, object] = {}
exec(RECORD, _space)  # the very same text on both sides


def record(number: int) -> bytes:
    """Return the content of record `number`."""
    made = _space["record"](number)  # type: ignore[operator]
    assert isinstance(made, bytes)
    return made


@dataclass(slots=True)
class Account:
    """What the host has been told, over all rounds."""

    acknowledged: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.acknowledged[-1] if self.acknowledged else -1


def write_until_killed(account: Account, runtime: Path, image: str, dice: random.Random) -> str:
    """Boot, write, kill; add what was acknowledged to the account. Return what the round was like."""
    first = account.last + 2  # the one after the last may be there, unacknowledged
    command = [*OSTLER, "run", "--accel", "soft", "--net", "none", "--persist", DISK, "--name", GUEST, image, "--"]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
    with tempfile.TemporaryFile() as errors, subprocess.Popen(
        [*command, "python3", "-c", WRITER, str(first), str(KEPT_FILES)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        out = process.stdout.fileno()
        started = time.monotonic()
        if not select.select([out], [], [], BOOT_LIMIT_S)[0]:
            process.kill()
            raise SystemExit("torture: the guest wrote nothing; is it able to boot?")
        booted_s = time.monotonic() - started
        pid = _vm_process(runtime)
        writing_s = dice.uniform(0, LONGEST_WRITING_S)
        told = _read_until(out, time.monotonic() + writing_s)
        os.kill(pid, signal.SIGKILL)
        # Said before the kill and still on its way: acknowledged, too.
        while chunk := os.read(out, 65536):
            told += chunk
        process.wait()
        errors.seek(0)
        if not told:
            raise SystemExit(f"torture: {errors.read().decode(errors='replace').strip()}")
    new = [int(line) for line in told.decode().split("\n")[:-1]]
    account.acknowledged += new
    return f"up after {booted_s:5.1f} s, killed {writing_s:4.2f} s later, {len(new):4} records acknowledged"


def _vm_process(runtime: Path) -> int:
    return int((runtime / "ostler" / "guests" / GUEST / "pid").read_text())


def _read_until(fd: int, deadline: float) -> bytes:
    told = b""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0]:
            chunk = os.read(fd, 65536)
            if not chunk:
                break
            told += chunk
    return told


def check(account: Account, disk: Path, scratch: Path) -> None:
    """Look at a copy of the disk, as the kill left it; note what is wrong."""
    copy = scratch / "copy.raw"
    with disk.open("rb") as source, copy.open("xb") as target:
        files.copy_sparse(source.fileno(), target.fileno())
    try:
        e2fsck = tools.require("e2fsck", package="e2fsprogs")
        for arguments in (["-y", "-E", "journal_only"], ["-fn"]):
            done = subprocess.run([e2fsck, *arguments, copy], capture_output=True, text=True, check=False)
            if done.returncode not in ((0, 1) if arguments[0] == "-y" else (0,)):
                account.wrong.append(f"e2fsck {' '.join(arguments)}: status {done.returncode}: {done.stdout[-300:]}")
        tools.run(["debugfs", "-R", f"rdump /torture {scratch}", str(copy)], package="e2fsprogs")
        compare(account, scratch / "torture")
    finally:
        copy.unlink()


def compare(account: Account, found: Path) -> None:
    """Compare what lies in the folder `found` with what was acknowledged."""
    log = (found / "log").read_bytes()
    logged = {int(log[at : at + 12]): at for at in range(0, len(log), BLOCK) if log[at : at + 12].isdigit()}
    for number in account.acknowledged:
        data = record(number)
        if number % 3 == 0:
            at = logged.get(number, -1)
            is_there = at >= 0 and log[at : at + len(data)] == data
        elif number % 3 == 1 and number > account.last - 3 * KEPT_FILES + 6:
            file = found / f"file-{number}"
            is_there = file.exists() and file.read_bytes() == data
        else:
            continue
        if not is_there:
            account.wrong.append(f"record {number}: acknowledged and not there")
    replaced = max((number for number in account.acknowledged if number % 3 == 2), default=None)
    if replaced is not None:
        current = (found / "current").read_bytes()
        number = int(current[:12])
        if number < replaced or current != record(number):
            account.wrong.append(f"record {replaced}: acknowledged, and the file holds {number} or no whole record")


def main() -> None:
    """Run the rounds; status 1 if anything acknowledged was lost or a file system was damaged."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--image", default="debian")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    given = parser.parse_args()
    print(f"torture: {given.rounds} rounds on {given.image}, --seed {given.seed}")
    dice, account = random.Random(given.seed), Account()
    with tempfile.TemporaryDirectory(prefix="ostler-torture-") as folder:
        scratch, runtime = Path(folder), Path(folder) / "run"
        runtime.mkdir(mode=0o700)
        os.environ["OSTLER_DATA"] = str(scratch / "data")
        for number in range(1, given.rounds + 1):
            said = write_until_killed(account, runtime, given.image, dice)
            place = scratch / f"round-{number}"
            place.mkdir()
            copy = persist.find(DISK)
            assert copy is not None
            check(account, copy.disk, place)
            subprocess.run(["rm", "-rf", place], check=True)
            print(f"{number:3}: {said}; {len(account.wrong)} wrong so far", flush=True)
    for line in account.wrong[:20]:
        print(f"torture: {line}")
    print(
        f"torture: {given.rounds} kills, {len(account.acknowledged)} records acknowledged, {len(account.wrong)} wrong"
    )
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(bool(account.wrong))


if __name__ == "__main__":
    main()

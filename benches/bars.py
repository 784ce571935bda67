"""`make bars`: the figures Ostler promises, each measured for real. Takes long; `make test` holds a slice of it.

python -m benches.bars [kernels] [repeat] [time] [memory] [debian]
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ostler.images import initrd, kernels, rootfs
from tests.guest.harness import COMPLAINTS, OSTLER

KERNELS = ("debian-12-cloud", "debian-12", "debian-13-cloud")
REPORT = "console=ttyS0 loglevel=8 ostler.report"
QUIET = "console=ttyS0 quiet ostler.poweroff"
GUEST = Path(__file__).resolve().parent.parent / "guest"
PYTHON_TESTS = ("math", "float", "struct", "hashlib", "zlib", "json", "threading")
MEMORY_LIMIT_MIB = 80
TIME_LIMIT_S = 25.0
HUNG_S = 300

Bar = Iterator[tuple[bool, str]]


def command(name: str, append: str, *options: str) -> list[str]:
    """`ostler run` of a kernel with the busybox initrd."""
    kernel = kernels.fetch(name)
    image = initrd.busybox(kernel)
    files = ["--kernel", str(kernel.image), "--initrd", str(image), "--append", append]
    return [*OSTLER, "run", "--accel", "soft", *files, *options]


def run(words: list[str], limit_s: float = HUNG_S) -> tuple[int | None, str, float]:
    """Exit status (None where it hung), console and log, seconds."""
    began = time.perf_counter()
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b"").decode(errors="replace"), limit_s
    return done.returncode, done.stdout.decode(errors="replace"), time.perf_counter() - began


def stock_kernels() -> Bar:
    """Every kernel on 1, 2 and 4 processors reaches init and powers off with nothing to complain of."""
    for name in KERNELS:
        for cpus in (1, 2, 4):
            status, text, seconds = run(command(name, REPORT, "--cpus", str(cpus)))
            found = [line for line in text.splitlines() if COMPLAINTS.search(line)]
            good = status == 0 and f"cpu: {cpus} x" in text and not found
            yield good, f"{name}, {cpus} vCPUs: status {status}, {seconds:.1f} s{'; ' + found[0] if found else ''}"


def repeat() -> Bar:
    """Twenty boots in a row on two processors, none of which hangs."""
    words = command("debian-12-cloud", QUIET, "--cpus", "2")
    statuses = [run(words, 120)[0] for _ in range(20)]
    yield statuses == [0] * 20, f"20 boots with 2 vCPUs: {statuses.count(0)} of 20 ended with status 0"


def start_to_power_off() -> Bar:
    """One processor, 512 MiB, median of five."""
    words = command("debian-12-cloud", QUIET, "--memory", "512M")
    taken = [seconds for status, _, seconds in (run(words) for _ in range(5)) if status == 0]
    median = statistics.median(taken) if taken else float("inf")
    good = len(taken) == 5 and median <= TIME_LIMIT_S
    yield good, f"start to power-off: {median:.2f} s, median of {len(taken)} (at most {TIME_LIMIT_S:.0f} s)"


def memory() -> Bar:
    """What the process holds beyond guest memory, once the guest has booted."""
    words = command("debian-12-cloud", "console=ttyS0 quiet")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if b"[ostler] init reached" in line:
                break
        mib = beyond_guest_memory(process.pid) / (1 << 20)
        process.stdin.close()
        process.terminate()
    yield mib <= MEMORY_LIMIT_MIB, f"memory beyond the guest's: {mib:.1f} MiB (at most {MEMORY_LIMIT_MIB} MiB)"


def beyond_guest_memory(pid: int) -> int:
    """Bytes resident in all mappings but the guest's memfd."""
    total, guest = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            guest = "memfd:" in line
        elif line.startswith("Rss:") and not guest:
            total += int(line.split()[1]) << 10
    return total


def debian() -> Bar:
    """CPython's own tests and checksums in a Debian tree as initrd."""
    files = {"init": (GUEST / "minbase-init").read_bytes()}
    packages = ["python3", "openssl", "libpython3.11-testsuite"]
    image = rootfs.debian(packages, files, checksums=200, progress=lambda step, _=None: print(f"  … {step}"))
    kernel = kernels.fetch()
    status, text, seconds = run(
        [
            *OSTLER, "run", "--accel", "soft", "--memory", "1536M", "--kernel", str(kernel.image),
            "--initrd", str(image), "--append", "console=ttyS0 quiet",
        ],
        limit_s=3600,
    )  # fmt: skip
    yield status == 0, f"Debian tree: status {status} after {seconds:.0f} s"
    results = dict(re.findall(r"^RESULT (\S+) (\d+)\r?$", text, re.MULTILINE))
    for name in (*(f"test_{name}" for name in PYTHON_TESTS), "sha256"):
        yield results.get(name) == "0", f"  {name}: status {results.get(name, 'missing')}"


BARS: dict[str, Callable[[], Bar]] = {
    "kernels": stock_kernels,
    "repeat": repeat,
    "time": start_to_power_off,
    "memory": memory,
    "debian": debian,
}


def main(names: list[str]) -> int:
    """Measure the bars named, or all; 1 where one is missed."""
    if unknown := set(names) - set(BARS):
        sys.stderr.write(f"bars: {' '.join(unknown)}: expected {' '.join(BARS)}\n")
        return 2
    missed = 0
    for name in names or BARS:
        for good, text in BARS[name]():
            missed += not good
            print(f"{'ok  ' if good else 'MISS'} {text}", flush=True)
    return 1 if missed else os.EX_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

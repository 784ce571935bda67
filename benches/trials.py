"""`make trials`: long runs of real guests that judge whether the software CPU is right, not how fast it is.

python -m benches.trials [lockstep] [boots] [stress] [languages] [leak] [--boots N] [--seconds N] [--minutes N]

lockstep runs a kernel's whole boot, and CPython, on the interpreter and the translator at once, compared instruction
by instruction; the others run guests as users do. Exit status 1 where anything failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ostler.errors import OstlerError
from ostler.images import initrd, kernels, rootfs

TRIALS = Path(__file__).resolve().parent.parent / "guest" / "trials"
STRESSORS = ("cpu", "vm", "vecmath", "context", "fork", "mmap", "signal", "futex")
HUNG_S = 7200
# Guests as initrds: the tree is copied once more by the kernel while it boots.
MEMORY = {"busybox": "256M", "python": "768M", "languages": "3G"}
PACKAGES = {
    "python": ("python3",),
    "languages": ("python3", "stress-ng", "iproute2", "nodejs", "openjdk-17-jdk-headless"),
}
LEAK_LIMIT_MIB = 48
SETTLED_S = 180
LOCKSTEP = re.compile(r"^lockstep: (\d+) differences over (\d+) instructions", re.MULTILINE)
RESULT = re.compile(r"^RESULT (\S+) (\d+)\r?$", re.MULTILINE)

Verdict = Iterator[tuple[bool, str]]


def command(tree: str, append: str, cpus: int) -> list[str]:
    """`ostler run` of the default kernel with one of the trees."""
    kernel = kernels.fetch()
    if tree == "busybox":
        image = initrd.busybox(kernel)
    else:
        files = {path.name if path.name == "init" else f"trials/{path.name}": path.read_bytes() for path in files_of()}
        image = rootfs.debian(PACKAGES[tree], files, progress=note)
    return [
        sys.executable, "-m", "ostler", "run", "--accel", "soft", "--memory", MEMORY[tree], "--cpus", str(cpus),
        "--kernel", str(kernel.image), "--initrd", str(image), "--append", f"console=ttyS0 {append}",
    ]  # fmt: skip


def files_of() -> list[Path]:
    """What lies in the guests beside Debian."""
    return sorted(TRIALS.iterdir())


def note(step: str, fraction: float | None = None) -> None:
    """Progress, on standard error."""
    sys.stderr.write(f"  … {step}{f' {fraction:.0%}' if fraction else ''}\n")


def run(words: list[str], *, engine: str | None = None, limit_s: float = HUNG_S) -> tuple[int | None, str, float]:
    """Exit status (None where it hung), console and log, seconds."""
    environment = {**os.environ, **({"OSTLER_ENGINE": engine} if engine else {})}
    began = time.perf_counter()
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit_s,
            check=False, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b"").decode(errors="replace"), limit_s
    return done.returncode, done.stdout.decode(errors="replace"), time.perf_counter() - began


def lockstep(_: argparse.Namespace) -> Verdict:
    """The whole boot of a kernel, and CPython: no difference between the two engines."""
    guests = {
        "a boot": command("busybox", "loglevel=8 ostler.report", 1),
        "a boot and python": command("python", "quiet trials=python", 1),
    }
    for name, words in guests.items():
        status, text, seconds = run(words, engine="lockstep")
        found = LOCKSTEP.findall(text)
        differences, instructions = map(int, found[-1]) if found else (-1, 0)
        failed = [line for line in RESULT.findall(text) if line[1] != "0"]
        good = status == 0 and differences == 0 and not failed
        yield (
            good,
            (
                f"{name} in lockstep: {differences} differences over {instructions:,} instructions, "
                f"status {status}, {seconds:.0f} s"
            ),
        )
        if not good:
            yield False, text[-3000:]


def boots(options: argparse.Namespace) -> Verdict:
    """Boots in a row on two processors, every one of which powers off by itself."""
    words = command("busybox", "quiet ostler.poweroff", 2)
    ended, taken = 0, []
    for turn in range(options.boots):
        status, text, seconds = run(words, limit_s=180)
        ended += status == 0
        taken.append(seconds)
        if status != 0:
            yield False, f"  boot {turn + 1}: status {status} after {seconds:.1f} s; {text[-300:]!r}"
    longest = max(taken, default=0.0)
    yield (
        ended == options.boots,
        f"{ended} of {options.boots} boots with 2 vCPUs ended well, at most {longest:.1f} s each",
    )


def stress(options: argparse.Namespace) -> Verdict:
    """stress-ng checks its own results."""
    yield from results("languages", STRESSORS, options.seconds, f"stress-ng --verify, {options.seconds} s each")


def languages(options: argparse.Namespace) -> Verdict:
    """Programs that generate code: V8 and HotSpot, and CPython."""
    yield from results("languages", ("python", "node", "java"), options.seconds, "languages")


def results(tree: str, names: tuple[str, ...], seconds: int, title: str) -> Verdict:
    """One guest of two processors with these trials."""
    words = command(tree, f"quiet trials={','.join(names)} seconds={seconds}", 2)
    status, text, taken = run(words)
    found = dict(RESULT.findall(text))
    failed = [name for name in names if found.get(name) != "0"]
    yield (
        status == 0 and not failed,
        (
            f"{title}, 2 vCPUs: {len(names) - len(failed)} of {len(names)} passed ({', '.join(names)}), "
            f"status {status}, {taken:.0f} s"
        ),
    )
    if failed:
        yield False, text[-3000:]


def leak(options: argparse.Namespace) -> Verdict:
    """What the VM's process holds while a guest makes and ends programs: it settles."""
    words = command("python", f"quiet trials=busy seconds={options.minutes * 60}", 2)
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        began, samples = time.monotonic(), []
        while process.poll() is None and time.monotonic() - began < options.minutes * 60 + 600:
            samples.append((time.monotonic() - began, beyond_guest_memory(process.pid)))
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                continue
        process.kill()
        text = process.stdout.read().decode(errors="replace") if process.stdout else ""
    settled = [size for at, size in samples if at >= SETTLED_S and size]
    first, last, most = (settled[0], settled[-1], max(settled)) if settled else (0, 0, 0)
    good = "RESULT busy 0" in text and bool(settled) and last - first <= LEAK_LIMIT_MIB << 20
    yield (
        good,
        (
            f"{options.minutes} minutes of programs: {first / 2**20:.1f} MiB beyond guest memory after {SETTLED_S} s, "
            f"{last / 2**20:.1f} at the end, {most / 2**20:.1f} at most (growth allowed: {LEAK_LIMIT_MIB})"
        ),
    )


def beyond_guest_memory(pid: int) -> int:
    """Bytes resident in all mappings but the guest's memfd; 0 for a process that has ended."""
    total, guest = 0, False
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            guest = "memfd:ostler" in line
        elif line.startswith("Rss:") and not guest:
            total += int(line.split()[1]) << 10
    return total


CAMPAIGNS: dict[str, Callable[[argparse.Namespace], Verdict]] = {
    "lockstep": lockstep, "boots": boots, "stress": stress, "languages": languages, "leak": leak,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the campaigns named, or all; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="CAMPAIGN", help=f"all by default: {', '.join(CAMPAIGNS)}")
    parser.add_argument("--boots", type=int, default=200, help="how many boots (default: 200)")
    parser.add_argument("--seconds", type=int, default=60, help="for each stressor (default: 60)")
    parser.add_argument("--minutes", type=int, default=30, help="of the leak run (default: 30)")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(CAMPAIGNS):
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(CAMPAIGNS)}")
    failed = 0
    try:
        for name in options.names or CAMPAIGNS:
            for good, text in CAMPAIGNS[name](options):
                failed += not good
                print(f"{'ok  ' if good else 'MISS'} {text}", flush=True)
    except OstlerError as error:
        parser.error(str(error))
    return 1 if failed else os.EX_OK


if __name__ == "__main__":
    sys.exit(main())

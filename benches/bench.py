"""`make bench`: what the software CPU does in a second, and how long a guest takes from start to power-off.

Figures of a shared machine move by tens of percent: runs of the two sides alternate, the median counts, and where there
is something to compare with, the ratio comes first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benches import exits

from ostler import accel, vmm
from ostler.accel.api import ExitReason
from ostler.accel.soft import load_engine
from ostler.accel.vm import Accelerator
from ostler.config import parse_guest
from ostler.images import initrd, kernels
from tests.accel.lab import Machine

OSTLER = [sys.executable, "-m", "ostler"]
QEMU = "qemu-system-x86_64"
APPEND = "console=ttyS0 quiet panic=-1 ostler.poweroff"
HUNG_S = 60
TURNS = 5_000_000
# Dependent and independent arithmetic in the mix compilers make, no memory: the interpreter's own cost.
REGISTER_LOOP = """
start:
        mov     ecx, edi
2:      add     rax, rbx
        xor     rdx, rax
        lea     rsi, [rsi + rax*4 + 1]
        rol     rdx, 7
        sub     rbx, rdx
        mov     r8, rsi
        dec     ecx
        jnz     2b
        finish
"""
INSTRUCTIONS_A_TURN = 8


def register_loop() -> float:
    """Millions of guest instructions a second of CPU time over a loop in registers."""
    opened = accel.open("soft")
    with Machine(opened, REGISTER_LOOP) as machine:
        vcpu = machine.vcpus[0]
        start = vcpu.get_regs()
        rates = []
        for turns in (TURNS // 10, TURNS, TURNS, TURNS):
            regs = start
            regs.rdi = turns
            vcpu.set_regs(regs)
            began = time.thread_time()
            reason = vcpu.run()
            elapsed = time.thread_time() - began
            if reason is not ExitReason.IO:
                raise SystemExit(f"bench: the loop ended by {reason.name}, expected IO")
            rates.append(turns * INSTRUCTIONS_A_TURN / elapsed / 1e6)
    opened.close()
    return max(rates[1:])


def boot_rate() -> None:
    """Instructions the boot of Debian's cloud kernel retires, and how many a second of the vCPU's own CPU time."""
    kernel = kernels.fetch()
    spec = parse_guest(kernel=kernel.image, initrd=initrd.busybox(kernel), append=APPEND)
    system = CountingSystem(load_engine().System())
    with Path(os.devnull).open("wb") as nowhere:
        vmm.run(spec, console_out=nowhere.fileno(), accelerator=Accelerator("soft", system))
    millions = system.instructions / 1e6
    print(f"boot: {millions / system.busy_s:.0f} M instructions/s ({millions:.0f} M in {system.busy_s:.2f} s of run())")


class CountingSystem:
    """The engine, with an eye on what its virtual CPU did: one VM, one vCPU."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.instructions, self.busy_s = 0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_vm(self) -> Any:
        return CountingVm(self._inner.create_vm(), self)


class CountingVm:
    """See CountingSystem."""

    def __init__(self, inner: Any, system: CountingSystem) -> None:
        self._inner, self._system = inner, system

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_vcpu(self, vcpu_id: int) -> Any:
        return CountingVcpu(self._inner.create_vcpu(vcpu_id), self._system)


class CountingVcpu:
    """See CountingSystem. CPU time of the thread, not the clock's: HLT and other processes do not count."""

    def __init__(self, inner: Any, system: CountingSystem) -> None:
        self._inner, self._system = inner, system

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self) -> None:
        began = time.thread_time()
        try:
            self._inner.run()
        finally:
            self._system.busy_s += time.thread_time() - began

    def close(self) -> None:
        self._system.instructions += self._inner.instructions
        self._inner.close()


def once(command: list[str]) -> float | None:
    """Seconds a command took; None where it hung or failed."""
    began = time.perf_counter()
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=HUNG_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    return time.perf_counter() - began if done.returncode == 0 else None


def boots(rounds: int) -> None:
    """Start to power-off of Debian's cloud kernel with the busybox initrd, one processor, 512 MiB."""
    kernel = kernels.fetch()
    image = initrd.busybox(kernel)
    files = ["--kernel", str(kernel.image), "--initrd", str(image), "--append", APPEND]
    sides: dict[str, list[str]] = {"ostler": [*OSTLER, "run", "--accel", "soft", "--memory", "512M", *files]}
    if shutil.which(QEMU):
        # Of its boards microvm is the quicker one and pc the one whose every boot ends.
        for board in ("microvm,acpi=on,rtc=on", "pc"):
            sides[f"qemu {board.partition(',')[0]}"] = [
                QEMU, "-M", board, "-accel", "tcg", "-cpu", "max", "-m", "512", "-nographic", "-no-reboot",
                "-kernel", str(kernel.image), "-initrd", str(image), "-append", APPEND,
            ]  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in sides}
    failed = dict.fromkeys(sides, 0)
    for _ in range(rounds):
        for name, command in sides.items():
            taken = once(command)
            if taken is None:
                failed[name] += 1
            else:
                times[name].append(taken)
    medians = {name: statistics.median(taken) for name, taken in times.items() if taken}
    ours = medians.pop("ostler", None)
    if ours and medians:
        best = min(medians, key=lambda name: medians[name])
        print(f"start to power-off: {ours / medians[best]:.2f} times QEMU's TCG ({best})")
    medians |= {"ostler": ours} if ours else {}
    for name in sides:
        took = f"{medians[name]:.2f} s, median of {len(times[name])}" if name in medians else "no run ended"
        hung = f", {failed[name]} hung or failed" if failed[name] else ""
        print(f"  {name}: {took}{hung}")


def main() -> int:
    """Print the figures asked for; all by default."""
    parts: dict[str, Callable[[int], None]] = {
        "loop": lambda _: print(f"register loop: {register_loop():.0f} M instructions/s"),
        "rate": lambda _: boot_rate(),
        "boot": boots,
        "exits": lambda _: exits.main("soft"),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(parts)}; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="boots of each side (default: 5)")
    arguments = parser.parse_args()
    for name in arguments.parts or parts:
        if name not in parts:
            parser.error(f"{name!r}: expected one of {', '.join(parts)}")
        parts[name](arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())

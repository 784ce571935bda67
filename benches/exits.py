"""Round trips to a device and back: a port read and an MMIO read, on Ostler and on QEMU, of the same program.

The program is a multiboot kernel that both boot themselves. It reads the echo port of pc-testdev and then that device's
memory, each `turns` times, and says on the serial port when it gets from one to the next:

    eb 0e           start:  jmp     over            (the multiboot header lies in between)
    ba f8030000     over:   mov     edx, 0x3f8
    b0 01 ee                mov     al, 1; out dx, al
    b9 <turns>              mov     ecx, turns
    e4 e0           1:      in      al, 0xe0
    49 75 fb                dec     ecx; jnz 1b
    b0 02 ee                mov     al, 2; out dx, al
    b9 <turns>              mov     ecx, turns
    bb 000000ff             mov     ebx, 0xff000000
    8b 03           2:      mov     eax, [ebx]
    49 75 fb                dec     ecx; jnz 2b
    b0 03 ee                mov     al, 3; out dx, al
    31 c0 e6 f4             xor     eax, eax; out 0xf4, al
    f4 eb fd                hlt; jmp .-1

The time between two of those bytes is the host's, so `turns` grows until it is long.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ostler.testing import kernels

QEMU = "qemu-system-x86_64"
LONG_ENOUGH_S = 0.4
FIRST_TURNS, MOST_TURNS, GROWTH = 1_000, 4_000_000, 5
HUNG_S = 120
MARKS = b"\1\2\3"


def program(turns: int) -> bytes:
    """The program as an ELF file with a multiboot header."""
    count = turns.to_bytes(4, "little")
    return kernels.elf32(
        bytes.fromhex("eb0e 9090")
        + kernels.multiboot_header()
        + bytes.fromhex("baf8030000 b001ee b9") + count + bytes.fromhex("e4e0 4975fb")
        + bytes.fromhex("b002ee b9") + count + bytes.fromhex("bb000000ff 8b03 4975fb")
        + bytes.fromhex("b003ee 31c0e6f4 f4ebfd")
    )  # fmt: skip


def sides(accelerator: str) -> dict[str, list[str]]:
    """Commands that run the program whose file name is appended."""
    ostler = [sys.executable, "-m", "ostler", "run", "--accel", accelerator, "--test-devices", "--kernel"]
    found: dict[str, list[str]] = {f"ostler {accelerator}": ostler}
    if shutil.which(QEMU):
        theirs = "kvm" if accelerator == "kvm" else "tcg"
        found[f"qemu {theirs}"] = [
            QEMU, "-M", "pc", "-accel", theirs, "-m", "64", "-nodefaults", "-display", "none", "-serial", "stdio",
            "-no-reboot", "-device", "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel",
        ]  # fmt: skip
    return found


def phases(command: list[str], turns: int) -> tuple[float, float] | None:
    """Seconds that `turns` port reads and as many MMIO reads took; None where the program did not end."""
    with tempfile.NamedTemporaryFile(suffix=".elf") as file:
        Path(file.name).write_bytes(program(turns))
        process = subprocess.Popen(
            [*command, file.name], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        seen: list[float] = []
        try:
            while len(seen) < len(MARKS) and (chunk := os.read(process.stdout.fileno(), 256)):
                seen += [time.perf_counter() for byte in chunk if byte in MARKS]
            process.wait(HUNG_S)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    return (seen[1] - seen[0], seen[2] - seen[1]) if len(seen) == len(MARKS) else None


def rates(command: list[str]) -> tuple[float, float] | None:
    """Port and MMIO round trips a second, medians of three runs that are long enough."""
    turns = FIRST_TURNS
    while (took := phases(command, turns)) and min(took) < LONG_ENOUGH_S and turns < MOST_TURNS:
        turns *= GROWTH
    found = [pair for _ in range(3) if (pair := phases(command, turns))] if took else []
    if not found:
        return None
    port, mmio = (statistics.median(pair[part] for pair in found) for part in (0, 1))
    return turns / port, turns / mmio


def main(accelerator: str = "soft") -> None:
    """Print both sides' rates."""
    print(f"round trips a second to a device, {accelerator}:")
    for name, command in sides(accelerator).items():
        found = rates(command)
        print(f"  {name}: " + (f"port {found[0]:,.0f}, MMIO {found[1]:,.0f}" if found else "no run ended"))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Programs without an operating system through the whole of `ostler run`, on every accelerator."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guest.harness import Boot, Run

BareMetal = Callable[..., Run]

EMULATED = "KVM here emulates its guests"
SAY_AND_POWER_OFF = """
start:  lea     rsi, [rip + text]
1:      lodsb
        test    al, al
        jz      2f
        mov     dx, 0x3f8
        out     dx, al
        jmp     1b
2:      mov     dx, 0x604                       # ACPI's PM1 control
        mov     ax, 0x2000                      # SLP_EN with sleep type 0: S5
        out     dx, ax
3:      hlt
        jmp     3b
text:   .asciz "hello from ring 0\\n"
"""
LEAVE_BY_DEBUG_PORT = """
start:  mov     al, 21
        out     0xf4, al
1:      hlt
        jmp     1b
"""
FAULT_WITHOUT_TABLES = """
start:  lidt    [rip + none]
        mov     rbx, 0x1234567
        ud2
none:   .quad   0, 0
"""


@pytest.fixture(params=[pytest.param("kvm", marks=pytest.mark.kvm), "soft"])
def bare_metal(request: pytest.FixtureRequest, boot: Boot, tmp_path: Path) -> BareMetal:
    """`bare_metal(source, options...)` assembles a 64-bit program and runs it."""
    accelerator: str = request.param

    def run(source: str, *options: str) -> Run:
        program = assemble(source, tmp_path)
        done = boot("--accel", accelerator, "--memory", "16M", "--kernel", str(program), *options)
        # Whoever asks for an emulating KVM is told so; that is test_opening's business.
        return replace(done, log="".join(line for line in done.log.splitlines(True) if EMULATED not in line))

    return run


def assemble(source: str, folder: Path) -> Path:
    """An ELF program at 1 MiB, entered in 64-bit mode."""
    for tool in ("as", "ld"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} to assemble with (Debian: binutils)")
    (folder / "a.s").write_text(f".intel_syntax noprefix\n.globl start\n{source}")
    subprocess.run(["as", "--64", "-o", folder / "a.o", folder / "a.s"], check=True)
    subprocess.run(
        [
            "ld",
            "-N",
            "--no-warn-rwx-segments",
            "-Ttext=0x100000",
            "-e",
            "start",
            "-o",
            folder / "a.elf",
            folder / "a.o",
        ],
        check=True,
    )
    return folder / "a.elf"


def test_console_output_and_power_off_is_status_0(bare_metal: BareMetal) -> None:
    run = bare_metal(SAY_AND_POWER_OFF)

    assert (run.status, run.console, run.log) == (0, "hello from ring 0\n", "")


def test_debug_exit_port_gives_its_status(bare_metal: BareMetal) -> None:
    run = bare_metal(LEAVE_BY_DEBUG_PORT)

    assert (run.status, run.log) == (43, "")


def test_timing_names_the_phases_and_leaves_the_console_alone(bare_metal: BareMetal) -> None:
    run = bare_metal(SAY_AND_POWER_OFF, "--timing")

    assert (run.status, run.console) == (0, "hello from ring 0\n")
    assert [line.split()[1] for line in run.log.splitlines()] == ["fetch", "load", "run", "in"]


def test_triple_fault_is_status_3_with_one_line(bare_metal: BareMetal) -> None:
    run = bare_metal(FAULT_WITHOUT_TABLES)

    assert run.status == 3
    assert len(run.log.splitlines()) == 1
    assert run.log.startswith("ostler: guest ")


def test_triple_fault_with_debug_shows_registers_and_the_instruction(bare_metal: BareMetal) -> None:
    run = bare_metal(FAULT_WITHOUT_TABLES, "--debug")

    assert run.status == 3
    assert "rbx=0000000001234567" in run.log
    assert "ud2" in run.log

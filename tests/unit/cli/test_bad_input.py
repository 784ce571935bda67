"""What a user can get wrong with `ostler run`: one line on standard error, exit status 2, terminal restored.

End to end, as a user meets it: the command in a process of its own, on a pseudo-terminal. None of it needs the engine.
"""

from __future__ import annotations

import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

ELF_HEADER = struct.Struct("<4sBBBBQHHIQQQIHHHHHH")
EM_AARCH64, EM_X86_64 = 183, 62
Command = Callable[..., "tuple[int, str, str]"]


def elf(machine: int, *, entry: int = 0x10_0000) -> bytes:
    """An ELF executable with one loadable segment at 1 MiB and no PVH note."""
    header = ELF_HEADER.pack(
        b"\x7fELF", 2, 1, 1, 0, 0, 2, machine, 1, entry, ELF_HEADER.size, 0, 0, ELF_HEADER.size, 56, 1, 64, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0x1000, 0x10_0000, 0x10_0000, 16, 16, 0x1000)
    return (header + segment).ljust(0x1000, b"\0") + b"\xf4" * 16


@pytest.fixture
def ostler() -> Command:
    """Run `ostler` with standard input on a fresh pseudo-terminal, and see that it is left as it was."""

    def run(*arguments: str) -> tuple[int, str, str]:
        controller, line = pty.openpty()
        try:
            before = termios.tcgetattr(line)
            done = subprocess.run(
                [sys.executable, "-m", "ostler", *arguments], stdin=line, capture_output=True, text=True,
                timeout=60, check=False, env={**os.environ, "OSTLER_CACHE": "/dev/null/no-cache-needed"},
            )  # fmt: skip
            assert termios.tcgetattr(line) == before
        finally:
            os.close(controller)
            os.close(line)
        return done.returncode, done.stdout, done.stderr

    return run


def assert_one_line(outcome: tuple[int, str, str], *parts: str) -> None:
    status, out, err = outcome
    assert status == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("ostler: ")
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--memory", "15M"], ["memory", "15M", "16 MiB"]),
        (["--memory", "lots"], ["memory", "lots", "512M"]),
        (["--memory", "512"], ["memory", "512"]),
        (["--memory", "900T"], ["memory", "900T", "host"]),
        (["--cpus", "0"], ["cpus", "0", "expected 1 to"]),
        (["--cpus", "1000"], ["cpus", "1000", "expected 1 to"]),
        (["--cpus", "two"], ["cpus", "two"]),
        (["--cpu", "pentium"], ["cpu", "pentium", "expected one of"]),
        (["--accel", "magic"], ["accel", "magic", "auto, kvm, soft"]),
        (["--append", "two\nlines"], ["append"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["--memory"], ["--memory"]),
        (["no-such-image"], ["no-such-image", "debian-12-cloud"]),
        (["debian-12", "--kernel", "/boot/k"], ["debian-12", "/boot/k"]),
        (["one", "two"], ["two"]),
    ],
)
def test_bad_value_is_one_line_with_the_value(ostler: Command, options: list[str], parts: list[str]) -> None:
    assert_one_line(ostler("run", *options), *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"#!/bin/sh\necho not a kernel\n" * 100, ["kernel"]),
        (b"", ["kernel"]),
        (elf(EM_AARCH64), ["AARCH64"]),
        (elf(EM_X86_64, entry=0x1000), ["PVH"]),
    ],
    ids=["text", "empty", "other-machine", "no-entry"],
)
def test_file_that_is_no_kernel_is_one_line_with_its_name(
    ostler: Command, tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    (tmp_path / "vmlinuz").write_bytes(content)

    assert_one_line(ostler("run", "--kernel", str(tmp_path / "vmlinuz")), str(tmp_path / "vmlinuz"), *parts)


def test_missing_kernel_is_one_line_with_its_name(ostler: Command, tmp_path: Path) -> None:
    assert_one_line(ostler("run", "--kernel", str(tmp_path / "none")), str(tmp_path / "none"))


def test_folder_as_kernel_is_one_line_with_its_name(ostler: Command, tmp_path: Path) -> None:
    assert_one_line(ostler("run", "--kernel", str(tmp_path)), str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_kernel_is_one_line_with_its_name(ostler: Command, tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").touch(mode=0o000)

    assert_one_line(ostler("run", "--kernel", str(tmp_path / "vmlinuz")), str(tmp_path / "vmlinuz"), "ermission")


def test_truncated_bzimage_is_one_line_with_its_name(ostler: Command, tmp_path: Path) -> None:
    image = bytearray(0x1000)
    image[0x1F1] = 4  # setup sectors
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x202:0x206] = b"HdrS"
    image[0x206:0x208] = (0x020F).to_bytes(2, "little")
    image[0x211] = 1
    image[0x1F4:0x1F8] = (0x8_0000).to_bytes(4, "little")  # paragraphs of 16 bytes that are not there
    (tmp_path / "bzImage").write_bytes(image)

    assert_one_line(ostler("run", "--kernel", str(tmp_path / "bzImage")), str(tmp_path / "bzImage"))


def test_missing_initrd_is_one_line_with_its_name(ostler: Command, tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(b"x")

    outcome = ostler("run", "--kernel", str(tmp_path / "vmlinuz"), "--initrd", str(tmp_path / "none"))

    assert_one_line(outcome, "initrd", str(tmp_path / "none"))


def test_initrd_larger_than_memory_is_one_line_with_its_name(ostler: Command, tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(b"x")
    with (tmp_path / "initrd").open("wb") as file:
        file.truncate(64 << 20)

    outcome = ostler(
        "run", "--memory", "32M", "--kernel", str(tmp_path / "vmlinuz"), "--initrd", str(tmp_path / "initrd")
    )

    assert_one_line(outcome, "initrd", str(tmp_path / "initrd"))


WITHOUT_ENGINE = "import sys; sys.modules['ostler._soft'] = None"
WITHOUT_KVM = "from ostler.accel import kvm; kvm.KvmSystem.__init__.__defaults__ = ('/nonexistent',)"


@pytest.mark.parametrize(
    ("world", "accel", "parts"),
    [
        (WITHOUT_ENGINE, "soft", ["software CPU is not built"]),
        (WITHOUT_KVM, "kvm", ["/nonexistent"]),
        (f"{WITHOUT_ENGINE}; {WITHOUT_KVM}", "auto", ["no accelerator", "/nonexistent", "software CPU is not built"]),
    ],
    ids=["no-engine", "no-kvm", "neither"],
)
def test_accelerator_that_is_not_there_is_one_line_with_the_reason(
    tmp_path: Path, world: str, accel: str, parts: list[str]
) -> None:
    (tmp_path / "kernel").write_bytes(elf(EM_X86_64))
    program = f"{world}; from ostler.cli import main; main()"
    command = [sys.executable, "-c", program, "run", "--accel", accel, "--kernel", str(tmp_path / "kernel")]

    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    assert_one_line((done.returncode, done.stdout, done.stderr), *parts)


def test_debug_shows_where_it_came_from(ostler: Command) -> None:
    status, _, err = ostler("run", "--debug", "--cpus", "0")

    assert status == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("ostler: cpus '0'")

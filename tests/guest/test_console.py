"""The guest's console on a real terminal: typing, job control, window size, and getting out."""

from __future__ import annotations

import os
import termios
from collections.abc import Iterator

import pexpect
import pytest

from tests.guest.harness import OSTLER

LFLAG = 3
PROMPT = "/ # "


@pytest.fixture
def shell() -> Iterator[pexpect.spawn]:  # type: ignore[type-arg]
    """`ostler run` on a pseudo-terminal of 30 × 100, at the guest's prompt."""
    program, *arguments = [*OSTLER, "run", "--accel", "soft"]
    child = pexpect.spawn(
        program, arguments, timeout=200, encoding="utf-8", codec_errors="replace",
        dimensions=(30, 100), env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip
    # pexpect would otherwise sleep before each line it sends.
    child.delaybeforesend = None
    try:
        child.expect_exact(PROMPT)
        yield child
    finally:
        child.close(force=True)


def is_cooked(child: pexpect.spawn) -> bool:  # type: ignore[type-arg]
    return bool(termios.tcgetattr(child.child_fd)[LFLAG] & termios.ICANON)


def test_shell_has_job_control_and_the_terminals_size(shell: pexpect.spawn) -> None:  # type: ignore[type-arg]
    assert not is_cooked(shell)
    shell.sendline("stty size; echo $TERM; cat")
    shell.expect_exact("30 100")
    shell.expect_exact("xterm-256color")
    shell.sendline("typed")
    # The terminal adds a carriage return of its own to the guest's.
    shell.expect(r"typed[\r\n]+typed[\r\n]+")
    shell.sendintr()
    shell.expect_exact(PROMPT)
    shell.sendline("echo status=$?")
    shell.expect_exact("status=130")
    shell.expect_exact(PROMPT)

    shell.sendline("exit")
    shell.expect(pexpect.EOF)
    shell.wait()

    assert shell.exitstatus == 0


def test_escape_key_ends_the_guest_and_restores_the_terminal() -> None:
    program, *arguments = [*OSTLER, "run", "--accel", "soft"]
    line = "; ".join(["before=$(stty -g)", " ".join([program, *arguments]), "echo status=$?",
                      '[ "$before" = "$(stty -g)" ] && echo restored'])  # fmt: skip
    child = pexpect.spawn("/bin/sh", ["-c", line], timeout=200, encoding="utf-8", codec_errors="replace")
    child.delaybeforesend = None
    child.expect_exact("Linux version")

    child.send("\x1dq")

    child.expect(r"status=(\d+)")
    child.expect_exact("restored")
    child.expect(pexpect.EOF)
    child.close()

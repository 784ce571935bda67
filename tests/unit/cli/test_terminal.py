"""Raw mode and the escape key."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

from ostler.cli import terminal

LFLAG = 3
HOLD = "import os, sys\nfrom ostler.cli import terminal\nwith terminal.raw(0):\n    print('raw', flush=True)\n    {}"


@pytest.fixture
def pair() -> Iterator[tuple[int, int]]:
    controller, line = pty.openpty()
    yield controller, line
    os.close(controller)
    os.close(line)


def is_cooked(fd: int) -> bool:
    return bool(termios.tcgetattr(fd)[LFLAG] & termios.ICANON)


@pytest.mark.parametrize(
    ("typed", "passed", "leave", "help_wanted"),
    [
        (b"ls\r\x03", b"ls\r\x03", False, False),
        (b"a\x1dq", b"a", True, False),
        (b"a\x1dqlost", b"a", True, False),
        (b"\x1d\x1d", b"\x1d", False, False),
        (b"\x1dxb", b"b", False, True),
    ],
)
def test_escape_filter_takes_out_only_its_own_keys(
    typed: bytes, passed: bytes, leave: bool, help_wanted: bool  # noqa: FBT001
) -> None:  # fmt: skip
    keys = terminal.EscapeFilter()

    assert keys.feed(typed) == passed
    assert (keys.quit, keys.help_wanted) == (leave, help_wanted)


def test_escape_filter_remembers_an_escape_across_reads() -> None:
    keys = terminal.EscapeFilter()

    assert keys.feed(b"a\x1d") == b"a"
    assert keys.feed(b"q") == b""
    assert keys.quit


def test_raw_restores_after_an_exception(pair: tuple[int, int]) -> None:
    _, line = pair

    def fail() -> None:
        with terminal.raw(line):
            assert not is_cooked(line)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert is_cooked(line)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_raw_restores_after_the_process_was_killed(pair: tuple[int, int], number: signal.Signals) -> None:
    controller, line = pair
    program = HOLD.format(f"os.kill(os.getpid(), {int(number)})")

    done = subprocess.run([sys.executable, "-c", program], stdin=line, stdout=subprocess.PIPE, check=False)

    # The guard holds the write end of stdout too, so the read above ends only after it has done its work.
    assert done.returncode == -number
    assert done.stdout == b"raw\n"
    assert is_cooked(line)
    del controller


def test_raw_leaves_a_pipe_alone() -> None:
    read, write = os.pipe()
    with terminal.raw(read):
        pass
    os.close(read)
    os.close(write)


def test_orderly_signals_unwind_with_the_shells_status() -> None:
    def send() -> None:
        with terminal.orderly_signals():
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        send()

    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("redirect", "expected"), [("0<&-", "None"), ("</dev/null", "0")])
def test_standard_input_is_none_only_where_the_caller_closed_it(redirect: str, expected: str) -> None:
    script = "from ostler.cli import terminal; print(terminal.standard_input())"
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, script],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == expected

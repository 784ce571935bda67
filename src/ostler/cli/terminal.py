"""The user's terminal while it is the guest's console: raw mode, the escape key, and getting back out of both.

In raw mode every key goes to the guest, Ctrl-C included. One key is Ostler's: Ctrl-] opens an escape, as in telnet.
The terminal is put back by whoever leaves last: the context manager, or, where the process dies without leaving it
(SIGKILL, a crash in native code), a guard process that waits on a pipe for just that.
"""

from __future__ import annotations

import os
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ESCAPE = 0x1D  # Ctrl-]
ESCAPE_HELP = "Ctrl-] q ends the guest at once, Ctrl-] Ctrl-] sends Ctrl-] to it"

_IFLAG, _LFLAG, _CC = 0, 3, 6


class EscapeFilter:
    """Takes Ostler's own keys out of what is typed. A state machine without I/O."""

    def __init__(self) -> None:
        self.quit = False
        self.help_wanted = False
        self._open = False

    def feed(self, typed: bytes) -> bytes:
        """Return what of `typed` is the guest's; sets `quit` or `help_wanted`. Nothing after `quit` counts."""
        passed = bytearray()
        for byte in typed:
            if self._open:
                self._open = False
                if byte == ESCAPE:
                    passed.append(byte)
                elif byte in b"qQ":
                    self.quit = True
                    break
                else:
                    self.help_wanted = True
            elif byte == ESCAPE:
                self._open = True
            else:
                passed.append(byte)
        return bytes(passed)


def standard_input() -> int | None:
    """Return standard input, or None where the caller closed it."""
    try:
        os.fstat(0)
    except OSError:
        return None
    return 0


def size(fd: int) -> os.terminal_size | None:
    """Return the size of the terminal `fd`, or None where it is no terminal or does not know."""
    try:
        found = os.get_terminal_size(fd)
    except OSError:
        return None
    return found if found.lines and found.columns else None


@contextmanager
def raw(fd: int) -> Iterator[None]:
    """Put the terminal `fd` into raw mode for the block; no change where `fd` is not a terminal.

    Output processing stays on, so that log lines on the same terminal begin at its left edge. Enter it before any
    thread starts: it forks.
    """
    if not os.isatty(fd):
        yield
        return
    saved = termios.tcgetattr(fd)
    guard = _Guard(fd, saved)
    changed = termios.tcgetattr(fd)
    changed[_IFLAG] &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
        | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
    )  # fmt: skip
    changed[_LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    changed[_CC] = [*changed[_CC]]
    changed[_CC][termios.VMIN], changed[_CC][termios.VTIME] = 1, 0
    try:
        termios.tcsetattr(fd, termios.TCSADRAIN, changed)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)
        guard.dismiss()


class _Guard:
    """A process that restores the terminal if this one dies without doing so."""

    def __init__(self, fd: int, saved: list[object]) -> None:
        read, self._write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            self._wait(fd, saved, read)
        os.close(read)

    def _wait(self, fd: int, saved: list[object], read: int) -> NoReturn:
        try:
            os.close(self._write)
            # SIGTTOU: by then a background process, which could not touch the terminal otherwise.
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTTOU):
                signal.signal(each, signal.SIG_IGN)
            if os.read(read, 1) == b"":
                termios.tcsetattr(fd, termios.TCSANOW, saved)  # type: ignore[arg-type]
        finally:
            os._exit(0)

    def dismiss(self) -> None:
        """Say that the terminal is as it was."""
        os.write(self._write, b".")
        os.close(self._write)
        os.waitpid(self._pid, 0)


@contextmanager
def orderly_signals() -> Iterator[None]:
    """Let the signals that ask a process to end unwind the stack, so that context managers do their work."""

    def leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, leave) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)

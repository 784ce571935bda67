"""A command in a guest as if it ran here: its streams, its terminal, its signals, its exit status.

A terminal is given to the command where standard input and output both are one; then every key goes to the guest,
Ctrl-C included, and the window's size follows. Otherwise the signals that would end this process go to the command;
the second one of the same kind ends the wait for it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from ostler.cli import terminal

if TYPE_CHECKING:
    from ostler.agent.client import AgentClient
    from ostler.agent.process import Process
    from ostler.agent.requests import Terminal
    from ostler.client.job import Job

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def run(agent: AgentClient, job: Job, *, tty: bool | None = None) -> int:
    """Run the job with this process's standard streams; the exit status as a shell has it.

    `tty` None gives the command a terminal where standard input and output are one.

    Raises what the agent raises; KeyboardInterrupt at the second Ctrl-C; BrokenPipeError.
    """
    wanted = os.isatty(0) and os.isatty(1) if tty is None else tty
    given = _terminal() if wanted else None
    with agent.start(job.argv, env=job.env, cwd=job.cwd, user=job.user, tty=given) as process, ExitStack() as stack:
        if given and os.isatty(0):
            stack.enter_context(terminal.raw(0))
            stack.enter_context(_window(process))
        stack.enter_context(_signals(process))
        status = process.relay(terminal.standard_input(), 1, 2)
    return shell_status(status)


def shell_status(returncode: int) -> int:
    """128 and the signal's number for a command that died of one."""
    return returncode if returncode >= 0 else 128 - returncode


def _terminal() -> Terminal:
    from ostler.agent.requests import Terminal

    size = terminal.size(0)
    term = os.environ.get("TERM", "linux")
    return Terminal(size.lines, size.columns, term) if size else Terminal(term=term)


@contextmanager
def _window(process: Process) -> Iterator[None]:
    """Tell the guest of every change of the window's size."""

    def changed(_number: int, _frame: FrameType | None) -> None:
        if size := terminal.size(0):
            process.resize(size.lines, size.columns)

    before = signal.signal(signal.SIGWINCH, changed)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


@contextmanager
def _signals(process: Process) -> Iterator[None]:
    seen: set[int] = set()

    def forward(number: int, _frame: FrameType | None) -> None:
        if number in seen and number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        seen.add(number)
        process.send_signal(number)

    before = {each: signal.signal(each, forward) for each in FORWARDED}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)

"""A command's console with the CPU time at each line, so that a busy machine can be told from slow code.

On a shared machine a program gets part of a processor. What its workload took of CPU time is what it would have
taken of the clock on a machine of its own; that is the figure worth comparing.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Line:
    """A line, and what had passed when it came: on the clock, and of CPU time of the command and its children."""

    text: str
    clock_s: float
    cpu_s: float


def console(command: Sequence[str], limit_s: float) -> list[Line]:
    """All a command prints on either output; its own end is not judged. It is killed after `limit_s` seconds."""
    lines: list[Line] = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        alarm = threading.Timer(limit_s, process.kill)
        alarm.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                text = line.decode(errors="replace").rstrip("\r\n")
                lines.append(Line(text, time.monotonic(), _session_cpu_s(process.pid)))
        finally:
            alarm.cancel()
            process.kill()
    return lines


def _session_cpu_s(session: int) -> float:
    """CPU seconds of a session's processes and of the children they have waited for."""
    total = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        # Behind the name, which may hold anything: state ppid pgrp session … utime stime cutime cstime.
        fields = re.sub(r"^.*\) ", "", stat, flags=re.DOTALL).split()
        if int(fields[3]) == session:
            total += sum(map(int, fields[11:15]))
    return total * _TICK_S

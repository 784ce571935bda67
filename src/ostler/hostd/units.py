"""systemd's units for the service and for guests' orderly end, with what they start by its whole path.

systemd wants a whole path and does not look where this one was installed. A user's own units belong to another target,
and are told of a shutdown by the user's own systemd.
"""

from __future__ import annotations

import shlex
from importlib.resources import files

UNITS = ("host", "guests")


def file_name(unit: str) -> str:
    """What systemd is to know it by."""
    return f"ostler-{unit}.service"


def text(unit: str, program: str, *, user: bool) -> str:
    """One of UNITS; `program` is the whole path of `ostler`."""
    found = (files("ostler.hostd") / "data" / file_name(unit)).read_text()
    escaped = program.replace("%", "%%")  # in a unit it begins a specifier
    # The shell of ExecStop has its quotes already.
    found = found.replace("@OSTLER@", shlex.quote(escaped) if unit == "host" else escaped)
    if user:
        found = found.replace("multi-user.target", "default.target").replace("@USER@", " --user")
        # A user's systemd knows no targets of the system's.
        found = "".join(line for line in found.splitlines(keepends=True) if "network-online.target" not in line)
    return found.replace("@USER@", "")

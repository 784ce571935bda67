"""Where a service is, and what it keeps: known to servers and clients."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from ostler.control import runtime

SOCKET = "host.sock"


def default_state() -> Path:
    """Where the service keeps what it knows: OSTLER_STATE, else in the user's state folder."""
    chosen = os.environ.get("OSTLER_STATE")
    return Path(chosen) if chosen else platformdirs.user_state_path("ostler") / "host"


def default_socket() -> Path:
    """Where it listens."""
    return runtime.root() / SOCKET

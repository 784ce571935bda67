"""A helper that listens on a descriptor it is given, and a socket connected to it.

The socket's file lives in a private folder and only until both ends are there, so nobody else can connect and nothing
is left behind.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from ostler.errors import HostError
from ostler.host.helpers import Helper


def connected(start: Callable[[int], Helper]) -> tuple[Helper, socket.socket]:
    """`start(fd)` starts the helper, which is to accept one connection on `fd`. Main thread only; raises HostError."""
    with tempfile.TemporaryDirectory(prefix="ostler-") as folder, socket.socket(socket.AF_UNIX) as listening:
        path = str(Path(folder) / "s")
        ours = socket.socket(socket.AF_UNIX)
        try:
            listening.bind(path)
            listening.listen(1)
            helper = start(listening.fileno())
            # Taken by the kernel at once: the helper need not be so far yet.
            ours.connect(path)
        except OSError as error:
            ours.close()
            raise HostError(f"socket of a helper program: {error.strerror or error}") from error
        except BaseException:
            ours.close()
            raise
    return helper, ours

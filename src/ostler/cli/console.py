"""This process's terminal as the console of a guest that runs elsewhere."""

from __future__ import annotations

import os
import selectors
import socket
from contextlib import ExitStack

from ostler.cli import terminal

CHUNK_BYTES = 16 << 10


def attach(stream: socket.socket, first: bytes) -> None:
    """Relay until the guest ends, the user leaves (Ctrl-] q), or standard input and the guest's output both end."""
    with ExitStack() as stack:
        stack.enter_context(terminal.orderly_signals())
        stack.enter_context(terminal.raw(0))
        keys = terminal.EscapeFilter() if os.isatty(0) else None
        _write(first)
        with selectors.PollSelector() as waiting:
            waiting.register(stream, selectors.EVENT_READ)
            waiting.register(0, selectors.EVENT_READ)
            while True:
                for ready, _ in waiting.select():
                    if ready.fileobj is stream:
                        data = stream.recv(CHUNK_BYTES)
                        if not data:
                            return
                        _write(data)
                    elif not _typed(stream, keys):
                        if keys is not None:
                            return
                        # A script's input has ended; what the guest has to say about it still comes.
                        waiting.unregister(0)


def _typed(stream: socket.socket, keys: terminal.EscapeFilter | None) -> bool:
    """Pass on what was typed; false at the end of it."""
    typed = os.read(0, CHUNK_BYTES)
    if not typed:
        return False
    stream.sendall(keys.feed(typed) if keys else typed)
    return not (keys and keys.quit)


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]

"""`--engine` and `--debug-engine`: how the software CPU goes about it. A wish for debugging, no part of a guest.

The engine reads its environment when a virtual CPU is made, in this process or in one that it starts.
"""

from __future__ import annotations

import os
from collections.abc import Collection

from ostler.errors import BadRequest

ENGINES = ("translate", "interp", "lockstep")
DUMPS = ("blocks", "stats")


def choose(engine: str | None, debug_engine: str | None) -> None:
    """Have guests that start from here run so; None leaves the environment's own word.

    Raises:
        BadRequest: there is no such engine, or nothing of that name to show.
    """
    for option, variable, value, known in (
        ("--engine", "OSTLER_ENGINE", engine, ENGINES),
        ("--debug-engine", "OSTLER_DEBUG_ENGINE", debug_engine, DUMPS),
    ):
        if value is not None:
            _need(option, value, known)
            os.environ[variable] = value


def _need(option: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise BadRequest(f"{option} {value!r}: expected {' or '.join(known)}")

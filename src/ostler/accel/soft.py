"""The software CPU's carrier: the engine's own objects, if this installation has it."""

import importlib
from typing import Protocol, cast

from ostler.accel.transport import SystemTransport, require_features
from ostler.errors import AccelUnavailable


class Engine(Protocol):
    """What the module `ostler._soft` offers."""

    def System(self) -> SystemTransport:
        """Plays /dev/kvm."""


# Made before a process forks, for its children: a System takes 10 ms to learn how fast the host's clock is.
_prepared: list[SystemTransport] = []


def prepare() -> None:
    """Have the next `open_engine` find it done. Raises AccelUnavailable."""
    if not _prepared:
        _prepared.append(load_engine().System())


def open_engine() -> SystemTransport:
    """The engine's System. Raises AccelUnavailable where the engine was not built, does not load, or is too old."""
    system = _prepared.pop() if _prepared else load_engine().System()
    require_features(system, "the software CPU")
    return system


def load_engine() -> Engine:
    """Import the engine. Raises AccelUnavailable where it was not built or does not load."""
    try:
        return cast(Engine, importlib.import_module("ostler._soft"))
    except ModuleNotFoundError as error:
        if error.name != "ostler._soft":
            raise
        raise AccelUnavailable(
            "the software CPU is not built: this installation has no ostler._soft"
            " (building it takes a newer cargo: see README)"
        ) from error
    except ImportError as error:
        raise AccelUnavailable(f"the software CPU does not load: {error}") from error

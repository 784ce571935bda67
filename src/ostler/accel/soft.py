"""The software CPU's carrier: the engine's own objects, if this installation has it."""

import importlib
from typing import Protocol, cast

from ostler.accel.transport import SystemTransport
from ostler.errors import AccelUnavailable


class Engine(Protocol):
    """What the module `ostler._soft` offers."""

    def System(self) -> SystemTransport:
        """Plays /dev/kvm."""


def load_engine() -> Engine:
    """Import the engine. Raises AccelUnavailable where it was not built or does not load."""
    try:
        return cast(Engine, importlib.import_module("ostler._soft"))
    except ModuleNotFoundError as error:
        if error.name != "ostler._soft":
            raise
        raise AccelUnavailable(
            "the software CPU is not built: this installation has no ostler._soft"
            " (building it takes cargo 1.88 or newer)"
        ) from error
    except ImportError as error:
        raise AccelUnavailable(f"the software CPU does not load: {error}") from error

"""The typed specification of a guest, and the only parser of what users ask for.

What judges is loaded when it is asked for: a VM process and the short way of the command line want `defaults` alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ostler.config.guest import GuestSpec, parse_guest
    from ostler.config.request import GuestRequest, parse_request
    from ostler.config.sizes import parse_size

_HOMES = {
    "GuestRequest": "request", "GuestSpec": "guest", "parse_guest": "guest", "parse_request": "request",
    "parse_size": "sizes",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


__all__ = ["GuestRequest", "GuestSpec", "parse_guest", "parse_request", "parse_size"]

"""Which of Ostler's own calls a guest may make. docs/hypercalls.md says what they do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

RIGHTS = ("log", "keys", "ready", "snapshot", "own")
DEFAULT_RIGHTS = ("log", "keys", "ready", "own")


def _listed(value: object) -> object:
    """Text as the command line has it: `log,keys`, or `none`."""
    if isinstance(value, str):
        return () if value == "none" else tuple(each.strip() for each in value.split(","))
    return value


def _known(value: Iterable[str]) -> tuple[str, ...]:
    for each in value:
        if each not in RIGHTS:
            raise ValueError(f"expected none or some of {', '.join(RIGHTS)}")
    return tuple(dict.fromkeys(value))


CallRights = Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_known)]

"""Which of Ostler's own calls a guest may make. docs/hypercalls.md says what they do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from ostler.config.defaults import CALL_RIGHTS


def _listed(value: object) -> object:
    """Text as the command line has it: `log,keys`, or `none`."""
    if isinstance(value, str):
        return () if value == "none" else tuple(each.strip() for each in value.split(","))
    return value


def _known(value: Iterable[str]) -> tuple[str, ...]:
    for each in value:
        if each not in CALL_RIGHTS:
            raise ValueError(f"expected none or some of {', '.join(CALL_RIGHTS)}")
    return tuple(dict.fromkeys(value))


CallRights = Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_known)]

"""Validation errors of pydantic as the one line that users get: the field, the value, what was expected."""

from __future__ import annotations

from pydantic import ValidationError

from ostler.errors import BadRequest

MAX_SHOWN = 80


def bad_request(error: ValidationError, *, whole: str = "guest") -> BadRequest:
    """The first error, as an exception of one line. A member of a list is named by the list and shown itself."""
    first = error.errors()[0]
    location = [part for part in first["loc"] if not _is_noise(part)]
    if len(location) > 1 and isinstance(location[-1], int):
        location.pop()
    field = ".".join(str(part) for part in location) or whole
    expected = first["msg"].removeprefix("Value error, ")
    if not location and first["type"] == "value_error":
        # Of fields that do not go together; all of them would be no help.
        return BadRequest(f"{whole}: {expected}")
    if first["type"] == "missing":
        return BadRequest(f"{field}: missing, expected a value")
    if first["type"] == "extra_forbidden":
        expected = "not known here; `ostler schema` says what there is"
    shown = " ".join(str(first["input"]).split())
    if len(shown) > MAX_SHOWN:
        shown = shown[: MAX_SHOWN - 1] + "…"
    return BadRequest(f"{field} {shown!r}: {expected}")


def _is_noise(part: int | str) -> bool:
    """Names that pydantic gives to alternatives of a union, which no user has written."""
    return isinstance(part, str) and part.startswith(("function-", "is-instance", "tagged-union"))

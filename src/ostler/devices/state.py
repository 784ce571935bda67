"""Saved device state: plain dataclasses out, validated plain data in.

A state class declares each register's width where it declares the register:

    @dataclass(slots=True)
    class State:
        ier: int = uint(8)
        rx: bytes = blob(16)

`save` makes a dictionary of integers and bytes; `load` takes one from anywhere, treats it as
hostile and raises StateError for anything the device could not have produced by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ostler.errors import StateError

StateT = TypeVar("StateT")
Saved = dict[str, int | bytes]


def uint(width: int, default: int = 0) -> Any:
    """An unsigned register of `width` bits."""
    return dataclasses.field(default=default, metadata={"width": width})


def blob(max_size: int) -> Any:
    """At most `max_size` bytes, a queue or a small memory."""
    return dataclasses.field(default=b"", metadata={"max_size": max_size})


def save(state: Any) -> Saved:
    """The state as data; shares nothing with the device."""
    values: Saved = {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        values[field.name] = bytes(value) if "max_size" in field.metadata else int(value)
    return values


def load(cls: type[StateT], name: str, data: Mapping[str, object]) -> StateT:
    """Build a state of `cls` for the device `name`. Raises StateError."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if set(data) != set(fields):
        odd = sorted(set(data) ^ set(fields))
        raise StateError(f"{name}: saved state has missing or unknown entries {odd[:8]}")
    return cls(**{key: _checked(name, field, data[key]) for key, field in fields.items()})


def _checked(name: str, field: dataclasses.Field[Any], value: object) -> int | bytes:
    if "max_size" in field.metadata:
        limit = field.metadata["max_size"]
        if not isinstance(value, bytes) or len(value) > limit:
            raise StateError(f"{name}: saved {field.name} is not at most {limit} bytes")
        return value
    width = field.metadata["width"]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << width:
        raise StateError(f"{name}: saved {field.name} = {value!r}: expected {width} bits")
    return value

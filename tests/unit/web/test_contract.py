"""The dashboard's types against the service's models: every field it reads is there, with a type that agrees."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from types import UnionType
from typing import Any

import pytest

pytest.importorskip("pydantic")

from pydantic import BaseModel

from ostler.hostd import models

TYPES = (Path(__file__).parents[3] / "web" / "src" / "api" / "types.ts").read_text()
INTERFACES = {
    name: dict(re.findall(r"^  (\w+): (.+);$", body, re.MULTILINE))
    for name, body in re.findall(r"^export interface (\w+) \{\n(.*?)^\}", TYPES, re.MULTILINE | re.DOTALL)
}


@pytest.mark.parametrize("name", sorted(INTERFACES))
def test_interface_has_only_fields_of_its_model_with_their_types(name: str) -> None:
    model = getattr(models, name)
    assert issubclass(model, BaseModel)

    said = INTERFACES[name]

    assert said
    found = {field: typescript(model.model_fields[field].annotation) for field in said if field in model.model_fields}
    assert said == {field: found.get(field) for field in said}


@pytest.mark.parametrize("name", ["GuestState", "JobState", "Role"])
def test_union_of_words_is_the_enumeration(name: str) -> None:
    body = re.search(rf"^export type {name} =(.*?);", TYPES, re.MULTILINE | re.DOTALL)
    assert body is not None

    assert re.findall(r'"([^"]+)"', body[1]) == [each.value for each in getattr(models, name)]


def typescript(annotation: Any) -> str:
    """How TypeScript would write it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, UnionType):
        return " | ".join(typescript(each) for each in arguments)
    if origin is list:
        return f"{typescript(arguments[0])}[]"
    if origin is dict:
        value = "unknown" if arguments[1] is Any else typescript(arguments[1])
        return f"Record<string, {value}>"
    if origin is typing.Literal:
        return " | ".join(f'"{each}"' for each in arguments)
    names = {str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
    return names.get(annotation) or str(annotation.__name__)

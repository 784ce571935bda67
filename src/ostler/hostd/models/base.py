"""What all have in common: how views and wishes are judged, words and lines of text."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_LIST = 1000
MAX_WORDS, MAX_WORD = 256, 64 << 10
MAX_COPIES = 100
# Without NUL, which no program's argument can hold, and without what is no character.
TEXT_PATTERN = r"^[^\x00]*$"
Word = Annotated[str, Field(max_length=MAX_WORD, pattern=TEXT_PATTERN)]
Flag = Annotated[bool, Field(strict=True)]
Line = Annotated[str, Field(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]


class View(BaseModel):
    """Something the service says."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Wish(BaseModel):
    """Something a caller asks for; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Empty(View):
    """Done, and nothing to say."""

"""`VALUE,key=value,flag`: options that hold several values, as the command line writes them."""

from __future__ import annotations

from collections.abc import Collection


def split_options(text: str, *, flags: Collection[str], keys: Collection[str]) -> tuple[str, dict[str, str | bool]]:
    """The first word, and the options after it. Raises ValueError with what was expected."""
    first, *rest = text.split(",")
    found: dict[str, str | bool] = {}
    for word in rest:
        key, equals, value = word.partition("=")
        if equals and key in keys and value:
            found[key] = value
        elif not equals and key in flags:
            found[key] = True
        else:
            options = [*flags, *(f"{key}=…" for key in keys)]
            raise ValueError(f"{word!r} is no option of it; expected {', '.join(options)}")
    return first, found


def one_line(value: str) -> str:
    """The text again. Raises ValueError for what cannot be a word of a command or of a file."""
    if "\0" in value or "\n" in value:
        raise ValueError("expected one line of text")
    return value

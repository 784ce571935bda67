"""Declared registers: masks, fields, descriptions."""

from __future__ import annotations

import pytest

from ostler.registers import Register, bit, field


class Example(Register):
    """One of each."""

    READY = bit(0)
    LEVEL = field(2, 3)
    BUSY = bit(7)


def test_describe_names_bits_fields_and_rest() -> None:
    assert Example.describe(0x80 | 5 << 2 | 0x40) == "BUSY|LEVEL=5|0x40"


def test_bit_arithmetic_yields_plain_int() -> None:
    assert type(Example.READY | Example.BUSY) is int
    assert Example.declared() == 0x9D


def test_field_put_cuts_surplus_bits() -> None:
    assert Example.LEVEL.put(0xFF, 0x1A) == 0xE3 | 2 << 2
    assert Example.LEVEL.get(0x14) == 5


def test_declaration_overlap_raises() -> None:
    with pytest.raises(TypeError, match="share bits 0x4"):
        type("Bad", (Register,), {"A": bit(2), "B": field(1, 3)})

"""The AML encoder against encodings worked out by hand from the specification."""

from __future__ import annotations

import pytest

from ostler.boot.acpi import aml


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("\\_S5", b"\\_S5_"),
        ("COM1", b"COM1"),
        ("\\_SB.COM1", b"\\\x2e_SB_COM1"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
        ("\\", b"\\\x00"),
    ],
)
def test_name_string_prefixes_by_number_of_segments(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


@pytest.mark.parametrize("path", ["toolong", "1ABC", "ab", "A-B"])
def test_name_string_bad_segment_raises(path: str) -> None:
    with pytest.raises(ValueError, match="segment"):
        aml.name_string(path)


@pytest.mark.parametrize(
    ("size", "encoded"),
    [(0, b"\x01"), (0x3E, b"\x3f"), (0x3F, b"\x41\x04"), (0xFFD, b"\x4f\xff"), (0xFFE, b"\x81\x00\x01")],
)
def test_package_length_counts_itself(size: int, encoded: bytes) -> None:
    assert aml.package_length(size) == encoded


@pytest.mark.parametrize(
    ("value", "encoded"),
    [(0, b"\0"), (1, b"\1"), (0x80, b"\x0a\x80"), (0x100, b"\x0b\0\1"), (1 << 16, b"\x0c\0\0\1\0")],
)
def test_integer_takes_shortest_form(value: int, encoded: bytes) -> None:
    assert aml.integer(value) == encoded


def test_eisa_id_packs_letters_and_digits() -> None:
    assert aml.eisa_id("PNP0501") == bytes.fromhex("0c41d00501")
    with pytest.raises(ValueError, match="EISA"):
        aml.eisa_id("PN0501")


def test_device_nests_and_resources_end_with_tag() -> None:
    crs = aml.resource_template(aml.io_ports(0x3F8, 8), aml.isa_irq(4))
    assert crs.endswith(b"\x22\x10\x00\x79\x00")
    device = aml.device("COM1", aml.name("_CRS", crs))
    assert device[:2] == b"\x5b\x82"
    assert device[2] == len(device) - 2

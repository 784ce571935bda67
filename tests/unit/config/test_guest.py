"""The guest's specification: what is taken, and one line for what is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.config import parse_guest, parse_size
from ostler.config.guest import ACCELERATORS, host_memory_bytes
from ostler.errors import BadRequest

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 * MIB), ("1G", 1024 * MIB), ("1.5G", 1536 * MIB), ("64 mib", 64 * MIB), ("16384K", 16 * MIB)],
)
def test_parse_size_units_and_fractions(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "512", "M", "1,5G", "-1G", "1e3M", "0x10M", "١G", "1.G", "512MM"])
def test_parse_size_not_a_size_raises(text: str) -> None:
    with pytest.raises(ValueError, match="such as 512M"):
        parse_size(text)


@given(st.text(max_size=12))
def test_parse_size_any_text_is_size_or_value_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError as error:
        assert "such as" in str(error)  # noqa: PT017


def test_parse_guest_defaults_and_none_means_not_given() -> None:
    spec = parse_guest(kernel="vmlinuz", initrd=None, memory=None)
    assert (spec.memory_bytes, spec.cpus, spec.accel, spec.initrd) == (512 * MIB, 1, "auto", None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory": "15M"}, "memory '15M': expected 16 MiB to the host's"),
        ({"memory": "lots"}, "memory 'lots': expected a size such as 512M, 1G or 1.5G"),
        ({"memory": f"{host_memory_bytes() * 2 >> 20}M"}, "expected 16 MiB to the host's"),
        ({"cpus": 0}, "cpus '0': expected 1 to 255"),
        ({"cpus": "1000"}, "cpus '1000': expected 1 to 255"),
        ({"cpus": "0000000000001"}, "expected 1 to 255"),
        ({"cpus": 1.5}, "cpus '1.5'"),
        ({"cpu": "pentium"}, "cpu 'pentium': expected one of ostler-v1.1, ostler-v2.1, ostler-v2.2, "),
        ({"accel": "xen"}, "accel 'xen': expected one of auto, kvm, soft"),
        ({"append": "a\nb"}, "expected one line"),
        ({"kernel": None}, "kernel: missing"),
        ({"disk": "x"}, "disk 'x'"),
    ],
)
def test_parse_guest_bad_value_is_one_line_naming_it(values: dict[str, object], message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_guest(**{"kernel": "vmlinuz", **values})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_accelerators_are_those_there_are() -> None:
    from ostler.accel.opener import NAMES

    assert ACCELERATORS == NAMES

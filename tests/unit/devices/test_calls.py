"""Calls by a page and by a port, the page's bounds, and keys that are saved and restored as hostile data."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.devices.calls import (
    ANSWER,
    CALL_OFFSET,
    DATA_OFFSET,
    LENGTH_OFFSET,
    MAGIC,
    MAX_DATA_BYTES,
    REQUEST,
    SHORT_OFFSET,
    Calls,
    leaves,
)
from ostler.errors import StateError
from ostler.memory import GuestMemory

PAGE = 0x1000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.of_size(1 << 20) as memory:
        yield memory


@pytest.fixture
def calls(memory: GuestMemory) -> Calls:
    device = Calls(memory)
    device.serve = lambda number, arguments, data: (number + arguments[0], data[::-1])
    return device


def ask(memory: GuestMemory, calls: Calls, *, number: int = 1, first: int = 0, data: bytes = b"", **odd: Any) -> Any:
    head = REQUEST.pack(odd.get("magic", MAGIC), number, 77, first, 0, 0, 0, 0, 0, odd.get("length", len(data)))
    memory.write(3 * PAGE, (head.ljust(DATA_OFFSET, b"\0") + data)[:PAGE])
    calls.write(CALL_OFFSET, 4, 3)
    length, result, sequence = ANSWER.unpack(memory.read(3 * PAGE + LENGTH_OFFSET, ANSWER.size))
    return result, sequence, memory.read(3 * PAGE + DATA_OFFSET, min(length, MAX_DATA_BYTES))


def test_call_in_a_page_is_answered_there(memory: GuestMemory, calls: Calls) -> None:
    written: list[tuple[int, int]] = []
    memory.on_write(lambda gpa, size: written.append((gpa, size)))
    assert ask(memory, calls, number=5, first=40, data=b"abc") == (45, 77, b"cba")
    assert calls.read(CALL_OFFSET, 4) == 0
    assert written[-1] == (3 * PAGE, PAGE)


def test_call_by_the_port_alone_has_its_result_there(calls: Calls) -> None:
    calls.write(SHORT_OFFSET, 4, 7 << 16 | 3)
    assert calls.read(SHORT_OFFSET, 4) == 10
    assert calls.read(0, 4) == 1


def test_page_without_the_magic_number_is_left_alone(memory: GuestMemory, calls: Calls) -> None:
    assert ask(memory, calls, data=b"abc", magic=MAGIC ^ 1) == (0, 0, b"abc")
    assert calls.read(CALL_OFFSET, 4) == errno.EFAULT


@pytest.mark.parametrize("page", [256, 0xFFFF_FFFF])
def test_page_outside_of_memory_is_an_error_of_the_port(calls: Calls, page: int) -> None:
    calls.write(CALL_OFFSET, 4, page)
    assert calls.read(CALL_OFFSET, 4) == errno.EFAULT


def test_more_data_than_a_page_holds_is_refused(memory: GuestMemory, calls: Calls) -> None:
    assert ask(memory, calls, length=MAX_DATA_BYTES + 1)[0] == -errno.EMSGSIZE
    assert ask(memory, calls, length=1 << 63)[0] == -errno.EMSGSIZE


def test_call_nobody_serves_is_not_there(memory: GuestMemory) -> None:
    assert ask(memory, Calls(memory))[0] == -errno.ENOSYS


@given(st.binary(max_size=PAGE), st.integers(0, 1 << 32))
def test_any_page_and_number_is_survived(content: bytes, page: int) -> None:
    with GuestMemory.of_size(64 << 10) as memory:
        calls = Calls(memory)
        memory.write(0, MAGIC.to_bytes(8, "little") + content[: PAGE - 8])
        calls.write(CALL_OFFSET, 4, 0)
        calls.write(CALL_OFFSET, 4, page & 0xFFFF_FFFF)
        calls.write(page % 16, 1 << page % 3, page)


def test_keys_are_bounded(calls: Calls) -> None:
    assert calls.put("", "x") == -errno.EINVAL
    assert calls.put("k" * 129, "x") == -errno.EINVAL
    assert calls.put("big", "x" * (64 << 10)) == -errno.ENOSPC
    for number in range(256):
        assert calls.put(f"key{number}", "v") == 0
    assert calls.put("one more", "v") == -errno.ENOSPC
    assert calls.put("key0", "changed") == 0


def test_keys_and_readiness_are_saved_and_restored(memory: GuestMemory, calls: Calls) -> None:
    calls.put("colour", "blau \u00fc")
    calls.is_ready = True
    other = Calls(memory)
    other.restore(calls.save())
    assert (other.keys, other.is_ready) == ({"colour": "blau \u00fc"}, True)


@pytest.mark.parametrize(
    "keys", [b"{", b"[]", b'{"a": 1}', json.dumps({"k" * 200: "v"}).encode(), json.dumps({"a": "x" * 70_000}).encode()]
)
def test_saved_keys_that_no_guest_could_have_are_refused(calls: Calls, keys: bytes) -> None:
    calls.put("mine", "stays")
    with pytest.raises(StateError, match="calls: saved key"):
        calls.restore({"keys": keys, "is_ready": 0})
    assert calls.keys == {"mine": "stays"}


def test_cpuid_leaves_name_the_port() -> None:
    first, facts = leaves()[0x4000_0100], leaves()[0x4000_0101]
    assert b"".join(word.to_bytes(4, "little") for word in first[1:]) == b"OstlerCalls\0"
    assert (first[0], facts) == (0x4000_0101, (1, 0xD00, 3, 0))

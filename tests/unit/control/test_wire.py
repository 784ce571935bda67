"""Framing of the control protocol, and errors that cross it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.control.wire import MAX_LINE_BYTES, Decoder, WireError, encode, pack_error, unpack_error
from ostler.errors import BadRequest, GuestPanic, HostError


@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), max_size=5), st.integers(1, 9))
def test_messages_cut_anywhere_arrive_whole(messages: list[dict[str, object]], step: int) -> None:
    stream = b"".join(encode(message) for message in messages)
    decoder, got = Decoder(), []
    for at in range(0, len(stream), step):
        decoder.feed(stream[at : at + step])
        while (message := decoder.next()) is not None:
            got.append(message)
    assert got == messages
    assert decoder.rest() == b""


def test_bytes_after_the_last_message_are_kept_for_the_console() -> None:
    decoder = Decoder()
    decoder.feed(encode({"id": 1}) + b"ls\r")
    assert decoder.next() == {"id": 1}
    assert decoder.rest() == b"ls\r"


@pytest.mark.parametrize("line", [b"no json\n", b"[1]\n", b"7\n", b"[" * 50_000 + b"\n", b"\xff\n"])
def test_line_that_is_no_object_is_refused(line: bytes) -> None:
    decoder = Decoder()
    decoder.feed(line)
    with pytest.raises(WireError):
        decoder.next()


def test_line_without_end_is_refused_at_the_bound() -> None:
    decoder = Decoder()
    decoder.feed(b"x" * (MAX_LINE_BYTES - 1))
    assert decoder.next() is None
    decoder.feed(b"x")
    with pytest.raises(WireError, match="more than"):
        decoder.next()


def test_errors_keep_class_line_and_details() -> None:
    sent = GuestPanic("guest crashed:\n  panic", details="rip=0\ncr0=1")
    got = unpack_error(pack_error(sent))
    assert isinstance(got, GuestPanic)
    assert (str(got), got.details) == ("guest crashed: panic", "rip=0\ncr0=1")
    assert type(unpack_error(pack_error(BadRequest("memory '1K': too little")))) is BadRequest


@pytest.mark.parametrize("kind", ["NoSuchError", "annotations", "Exception", None, "__doc__"])
def test_unknown_error_is_a_host_error(kind: str | None) -> None:
    assert type(unpack_error({"kind": kind, "message": "m"})) is HostError

"""The host's end of the agent's protocol: what it sends, and what it does not take from a guest."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ostler.agent import wire
from ostler.agent.protocol import WINDOW_BYTES, Conversation, Data, Entry, Exited, Failed, Hello, Phase, Reply, Room
from ostler.agent.wire import MAX_PAYLOAD, Decoder, Kind, decode_json, encode, encode_json
from ostler.errors import AgentProtocolError, CommandNotFound

HELLO = encode_json(Kind.HELLO, {"protocol": "ostler-agent", "version": 1, "agent": "9.9", "features": ["exec"]})
STARTED = encode_json(Kind.REPLY, {"pid": 5})


def greeted(operation: str | None = None) -> Conversation:
    conversation = Conversation()
    conversation.hello()
    list(conversation.receive(HELLO))
    if operation:
        conversation.request(operation)
    return conversation


def running() -> Conversation:
    conversation = greeted("exec")
    list(conversation.receive(STARTED))
    return conversation


def test_frames_fed_in_any_pieces_come_out_whole() -> None:
    wire = HELLO + encode(Kind.DATA, b"x" * 300, 2) + encode(Kind.DATA, b"", 1)
    for step in (1, 7, len(wire)):
        decoder = Decoder()
        frames = [frame for at in range(0, len(wire), step) for frame in decoder.feed(wire[at : at + step])]
        assert [(frame.kind, frame.stream, len(frame.payload)) for frame in frames] == [
            (Kind.HELLO, 0, len(HELLO) - 8), (Kind.DATA, 2, 300), (Kind.DATA, 1, 0),
        ]  # fmt: skip
        assert decoder.pending_bytes == 0


def test_request_sent_before_the_greeting_is_answered_after_it() -> None:
    conversation = Conversation()
    sent = conversation.hello() + conversation.request("info")

    assert [frame.kind for frame in Decoder().feed(sent)] == [Kind.HELLO, Kind.REQUEST]
    events = list(conversation.receive(HELLO + encode_json(Kind.REPLY, {"cpus": 2})))
    assert events == [Hello(1, "9.9", frozenset({"exec"})), Reply({"cpus": 2})]
    assert conversation.phase is Phase.IDLE


def test_command_is_started_talks_and_ends() -> None:
    conversation = running()

    events = list(
        conversation.receive(
            encode(Kind.DATA, b"out", 1) + encode(Kind.DATA, b"", 2) + encode(Kind.WINDOW, struct.pack("<I", 0), 0)
            + encode_json(Kind.EXIT, {"code": 7, "signal": None, "timed_out": False})
        )
    )  # fmt: skip
    assert events == [Data(1, b"out"), Data(2, b""), Room(0), Exited(7, None, False)]
    assert conversation.phase is Phase.IDLE


def test_names_that_are_no_utf8_go_as_their_bytes() -> None:
    frame = greeted().request("exec", {"argv": ["caf\udce9", "é"]})

    assert b'"caf\xe9","\xc3\xa9"' in frame
    assert wire.decode_json(frame[8:])["argv"] == ["caf\udce9", "é"]


def test_refusal_becomes_the_exception_of_its_code() -> None:
    conversation = greeted("exec")
    (event,) = conversation.receive(encode_json(Kind.ERROR, {"code": "command-not-found", "message": "x\x1b[2J: no"}))

    assert isinstance(event, Failed)
    assert isinstance(event.error, CommandNotFound)
    assert str(event.error) == "x?[2J: no"
    assert event.error.exit_status == 127


def test_input_beyond_the_guests_room_is_not_sent() -> None:
    conversation = running()
    conversation.stdin(b"x" * WINDOW_BYTES)

    with pytest.raises(ValueError, match="room for 0"):
        conversation.stdin(b"x")
    list(conversation.receive(encode(Kind.WINDOW, struct.pack("<I", 10), 0)))
    assert len(list(Decoder().feed(conversation.stdin(b"y" * 10)))) == 1


def test_output_is_taken_within_the_room_given_and_not_beyond() -> None:
    conversation = running()
    full = b"".join(encode(Kind.DATA, b"x" * MAX_PAYLOAD, 1) for _ in range(WINDOW_BYTES // MAX_PAYLOAD))
    list(conversation.receive(full))
    conversation.make_room(1, 5)
    list(conversation.receive(encode(Kind.DATA, b"12345", 1)))

    with pytest.raises(AgentProtocolError, match="room was for 0"):
        list(conversation.receive(encode(Kind.DATA, b"6", 1)))
    assert conversation.phase is Phase.BROKEN


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        (Conversation(), b"HTTP/1.1 400 Bad Request\r\n"),
        (Conversation(), struct.pack("<IBBH", MAX_PAYLOAD + 1, Kind.HELLO, 0, 0)),
        (Conversation(), struct.pack("<IBBH", 0, 77, 0, 0)),
        (Conversation(), struct.pack("<IBBH", 0, Kind.HELLO, 0, 1)),
        (Conversation(), STARTED),
        (Conversation(), encode(Kind.HELLO, b"[" * 60_000)),
        (Conversation(), encode(Kind.HELLO, b"[1]")),
        (
            Conversation(),
            encode_json(Kind.HELLO, {"protocol": "ostler-agent", "version": 2, "agent": "", "features": []}),
        ),
        (Conversation(), encode_json(Kind.HELLO, {"protocol": "else", "version": 1, "agent": "", "features": []})),
        (Conversation(), encode_json(Kind.HELLO, {"protocol": "ostler-agent", "version": 1, "features": 3})),
        (greeted(), HELLO),
        (greeted(), STARTED),
        (greeted("info"), encode(Kind.DATA, b"x", 1)),
        (greeted("info"), encode(Kind.ERROR, b'{"code": 1, "message": "x"}')),
        (greeted("exec"), encode_json(Kind.EXIT, {"code": 0})),
        (greeted("get"), encode(Kind.DATA, b"x", 2)),
        (running(), STARTED + STARTED),
        (running(), encode(Kind.DATA, b"x", 0)),
        (running(), encode(Kind.DATA, b"", 1) + encode(Kind.DATA, b"more", 1)),
        (running(), encode(Kind.WINDOW, struct.pack("<I", 1), 0)),
        (running(), encode(Kind.WINDOW, b"\0", 0)),
        (running(), encode(Kind.WINDOW, struct.pack("<I", 0), 1)),
        (running(), encode_json(Kind.EXIT, {"code": 0, "signal": 9})),
        (running(), encode_json(Kind.EXIT, {"code": True})),
        (running(), encode_json(Kind.EXIT, {"code": 256})),
        (running(), encode_json(Kind.EXIT, {})),
        (running(), encode_json(Kind.ENTRY, {"path": ""})),
    ],
)
def test_what_a_guest_must_not_say_ends_the_conversation(conversation: Conversation, said: bytes) -> None:
    with pytest.raises(AgentProtocolError):
        list(conversation.receive(said))
    assert conversation.phase is Phase.BROKEN


FRAME = st.builds(
    encode,
    st.sampled_from(list(Kind)),
    st.one_of(
        st.binary(max_size=40),
        st.just(b""),
        st.dictionaries(
            st.sampled_from(["code", "signal", "pid", "path", "type", "message", "protocol", "version"]),
            st.one_of(st.integers(), st.text(max_size=4), st.none(), st.booleans()),
        ).map(lambda value: json.dumps(value).encode()),
    ),
    st.integers(0, 255),
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # hosts under load are slow
@given(operation=st.sampled_from(["exec", "get", "info"]), frames=st.lists(st.one_of(FRAME, st.binary(max_size=30))))
def test_random_guest_gives_events_or_an_error_and_nothing_is_hoarded(operation: str, frames: list[bytes]) -> None:
    conversation = greeted(operation)
    kinds = (Data, Entry, Exited, Failed, Hello, Reply, Room)
    try:
        for piece in frames:
            assert all(isinstance(event, kinds) for event in conversation.receive(piece))
    except AgentProtocolError:
        assert conversation.phase is Phase.BROKEN
    assert conversation._decoder.pending_bytes <= MAX_PAYLOAD + 8 + 40


def test_requests_at_once_are_answered_in_their_order() -> None:
    conversation = greeted()
    sent = conversation.requests([("entropy", {"hex": "00"}), ("ping", {}), ("info", {})])
    frames = list(Decoder().feed(sent))
    refusal = encode_json(Kind.ERROR, {"code": "unsupported", "message": "no"})
    events = list(conversation.receive(encode_json(Kind.REPLY, {"one": 1}) + refusal))

    assert [decode_json(frame.payload)["op"] for frame in frames] == ["entropy", "ping", "info"]
    assert [type(event) for event in events] == [Reply, Failed]
    phases = [conversation.phase]
    assert list(conversation.receive(encode_json(Kind.REPLY, {}))) == [Reply({})]
    assert [*phases, conversation.phase] == [Phase.WAITING, Phase.IDLE]


@pytest.mark.parametrize("wanted", [[], [("ping", {}), ("exec", {})]])
def test_requests_at_once_are_such_as_have_one_answer(wanted: list[tuple[str, dict[str, object]]]) -> None:
    conversation = greeted()
    with pytest.raises(ValueError, match="one answer each"):
        conversation.requests(wanted)

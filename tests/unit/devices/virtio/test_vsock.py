"""The vsock device against a scripted guest and streams without sockets."""

from __future__ import annotations

import pytest

from ostler.devices.virtio import vsock
from ostler.devices.virtio.vsock import MAX_CONNECTIONS
from ostler.devices.virtio.vsock_connection import BUFFER_BYTES
from ostler.devices.virtio.vsock_outbox import MAX_RESETS
from ostler.devices.virtio.vsock_packet import (
    HEADER_BYTES,
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_SEND,
)
from ostler.errors import StateError
from tests.unit.devices.virtio.vsock_fakes import FakeStream, Guest

AGENT = 1024
GUEST_PORT = 5000


def accepted(guest: Guest, stream: FakeStream | None = None, *, alloc: int = 1 << 18) -> tuple[FakeStream, int]:
    """A connection that the host asked for and the guest accepted."""
    stream = stream or FakeStream()
    assert guest.device.open(stream, AGENT)
    (request, _) = guest.received()[-1]
    guest.send(OP_RESPONSE, AGENT, request.src_port, alloc=alloc)
    return stream, request.src_port


def asked(guest: Guest, host_port: int = 80, *, room: int = 1 << 30) -> FakeStream:
    """A connection that the guest asked for."""
    made = FakeStream(room=room)
    guest.backend.listeners.setdefault(host_port, []).append(made)
    guest.send(OP_REQUEST, GUEST_PORT, host_port)
    return made


def test_configuration_holds_the_guest_cid() -> None:
    with Guest() as guest:
        low, high = guest.device.read_config(0, 4), guest.device.read_config(4, 4)

    assert (low, high) == (3, 0)


def test_host_asks_guest_accepts_and_both_send() -> None:
    with Guest() as guest:
        stream, port = accepted(guest)
        stream.incoming += b"ping"
        stream.pump()
        guest.send(OP_RW, AGENT, port, b"pong")
        packets = guest.received()

    assert stream.accepted_port == port >= vsock.FIRST_HOST_PORT
    assert [(header.op, data) for header, data in packets] == [(OP_RW, b"ping")]
    assert packets[0][0].dst_port == AGENT
    assert bytes(stream.outgoing) == b"pong"


def test_guest_asks_for_a_port_with_a_listener_and_is_accepted() -> None:
    with Guest() as guest:
        stream = asked(guest)
        guest.send(OP_RW, GUEST_PORT, 80, b"hello")
        packets = guest.received()

    assert [header.op for header, _ in packets] == [OP_RESPONSE]
    assert packets[0][0].buf_alloc == BUFFER_BYTES
    assert bytes(stream.outgoing) == b"hello"


def test_guest_asks_for_a_port_nobody_listens_on_and_is_reset() -> None:
    with Guest() as guest:
        guest.send(OP_REQUEST, GUEST_PORT, 81)
        packets = guest.received()

    assert [(header.op, header.src_port, header.dst_port) for header, _ in packets] == [(OP_RST, 81, GUEST_PORT)]


@pytest.mark.parametrize("op", [OP_RESPONSE, OP_SHUTDOWN, OP_RW, OP_CREDIT_UPDATE, OP_CREDIT_REQUEST, 0, 99])
def test_packet_of_no_connection_is_answered_by_a_reset(op: int) -> None:
    with Guest() as guest:
        guest.send(op, 1, 2)
        assert guest.ops() == [OP_RST]


def test_reset_of_no_connection_is_not_answered() -> None:
    with Guest() as guest:
        guest.send(OP_RST, 1, 2)
        assert guest.ops() == []


def test_refused_connection_closes_the_host_stream() -> None:
    with Guest() as guest:
        stream = FakeStream()
        guest.device.open(stream, AGENT)
        (request, _) = guest.received()[0]
        guest.send(OP_RST, AGENT, request.src_port)
        assert guest.ops() == []

    assert stream.closed
    assert stream.accepted_port is None


def test_open_without_a_driver_is_refused() -> None:
    guest = Guest()
    guest.close()

    assert not guest.device.open(FakeStream(), AGENT)


def test_host_that_gives_up_before_the_answer_resets_the_guest() -> None:
    with Guest() as guest:
        stream = FakeStream()
        guest.device.open(stream, AGENT)
        stream.ended = True
        stream.pump()
        assert guest.ops() == [OP_REQUEST, OP_RST]

    assert stream.closed


def test_bytes_sent_before_the_answer_arrive_after_it() -> None:
    with Guest() as guest:
        stream = FakeStream(b"early")
        guest.device.open(stream, AGENT)
        stream.pump()
        assert not stream.reading
        (request, _) = guest.received()[0]
        guest.send(OP_RESPONSE, AGENT, request.src_port)
        stream.pump()
        packets = guest.received()

    assert [(header.op, data) for header, data in packets] == [(OP_RW, b"early")]


def test_large_transfer_to_the_guest_fills_buffers_of_any_shape_in_order() -> None:
    data = bytes(range(256)) * 300
    with Guest(rx_buffers=0) as guest:
        guest.give_buffers(4, HEADER_BYTES, 4096)
        stream, port = accepted(guest)
        for sizes in ((HEADER_BYTES + 1000,), (20, 30, 2000), (1, 43, 7), (HEADER_BYTES, 4096, 4096)):
            guest.give_buffers(3, *sizes)
        stream.incoming += data
        got = b""
        for _ in range(100):
            stream.pump()
            for header, payload in guest.received():
                assert header.len == len(payload)
                assert (header.op, header.src_port) == (OP_RW, port)
                got += payload

    assert got == data


def test_guest_credit_limits_what_the_host_may_send() -> None:
    with Guest() as guest:
        stream, port = accepted(guest, alloc=10_000)
        stream.incoming += bytes(25_000)
        stream.pump()
        first = sum(len(data) for _, data in guest.received())
        assert not stream.reading
        guest.send(OP_CREDIT_UPDATE, AGENT, port, alloc=10_000, fwd_cnt=8_000)
        stream.pump()
        second = sum(len(data) for _, data in guest.received())

    assert (first, second) == (10_000, 8_000)


def test_guest_that_claims_to_have_consumed_more_than_it_got_has_no_credit() -> None:
    with Guest() as guest:
        stream, port = accepted(guest)
        guest.send(OP_CREDIT_UPDATE, AGENT, port, fwd_cnt=5)
        stream.incoming += b"x"
        stream.pump()
        assert guest.ops() == []

    assert bytes(stream.incoming) == b"x"


def test_slow_host_is_buffered_up_to_the_credit_and_then_reset() -> None:
    with Guest() as guest:
        stream = asked(guest, room=100)
        for _ in range(BUFFER_BYTES // 65536):
            guest.send(OP_RW, GUEST_PORT, 80, bytes(65536))
        assert guest.ops() == [OP_RESPONSE]
        guest.send(OP_RW, GUEST_PORT, 80, bytes(101))
        assert guest.ops() == [OP_RST]

    assert stream.closed


def test_slow_host_that_catches_up_gets_everything_and_the_guest_its_credit() -> None:
    data = bytes(range(256)) * 512
    with Guest() as guest:
        stream = asked(guest, room=1000)
        guest.send(OP_RW, GUEST_PORT, 80, data[:65536])
        guest.send(OP_RW, GUEST_PORT, 80, data[65536:])
        guest.received()
        while stream.writing:
            stream.room = 30_000
            stream.pump()
        updates = [header for header, _ in guest.received() if header.op == OP_CREDIT_UPDATE]

    assert bytes(stream.outgoing) == data
    assert updates
    assert updates[-1].fwd_cnt >= len(data) - 65536


def test_credit_request_is_answered() -> None:
    with Guest() as guest:
        asked(guest)
        guest.send(OP_RW, GUEST_PORT, 80, b"12345")
        guest.received()
        guest.send(OP_CREDIT_REQUEST, GUEST_PORT, 80)
        packets = guest.received()

    assert [(header.op, header.fwd_cnt, header.buf_alloc) for header, _ in packets] == [
        (OP_CREDIT_UPDATE, 5, BUFFER_BYTES)
    ]


def test_guest_that_shuts_both_directions_gets_a_reset_and_loses_nothing() -> None:
    with Guest() as guest:
        stream = asked(guest, room=3)
        guest.send(OP_RW, GUEST_PORT, 80, b"abcdef")
        guest.received()
        guest.send(OP_SHUTDOWN, GUEST_PORT, 80, flags=SHUTDOWN_BOTH)
        assert guest.ops() == [OP_RST]
        assert not stream.closed
        stream.room = 100
        stream.pump()

    assert bytes(stream.outgoing) == b"abcdef"
    assert stream.closed
    assert guest.device.connection_count == 0


def test_guest_that_shuts_its_sending_half_can_still_receive() -> None:
    with Guest() as guest:
        stream = asked(guest, room=2)
        guest.send(OP_RW, GUEST_PORT, 80, b"abc")
        guest.send(OP_SHUTDOWN, GUEST_PORT, 80, flags=SHUTDOWN_SEND)
        assert not stream.finished
        stream.room = 10
        stream.pump()
        finished = stream.finished
        stream.incoming += b"answer"
        stream.pump()
        payload = b"".join(data for _, data in guest.received())
        guest.send(OP_RW, GUEST_PORT, 80, b"more")
        assert guest.ops() == [OP_RST]

    assert finished
    assert payload == b"answer"


def test_host_end_of_stream_tells_which_directions_are_shut() -> None:
    with Guest() as guest:
        half, _ = accepted(guest)
        half.incoming += b"last"
        half.ended = True
        half.pump()
        half_packets = guest.received()
        whole, _ = accepted(guest)
        whole.gone = True
        whole.pump()
        whole_packets = guest.received()

    assert [(header.op, header.flags, data) for header, data in half_packets] == [
        (OP_RW, 0, b"last"), (OP_SHUTDOWN, SHUTDOWN_SEND, b"")
    ]  # fmt: skip
    assert [(header.op, header.flags) for header, _ in whole_packets] == [(OP_SHUTDOWN, SHUTDOWN_BOTH)]


def test_broken_host_socket_resets_the_guest_in_both_directions() -> None:
    with Guest() as guest:
        reading, _ = accepted(guest)
        reading.broken = True
        reading.pump()
        assert guest.ops() == [OP_RST]
        writing, port = accepted(guest)
        writing.gone = True
        guest.send(OP_RW, AGENT, port, b"x")
        assert guest.ops() == [OP_RST]

    assert reading.closed
    assert writing.closed


def test_response_goes_before_data_when_buffers_come_late() -> None:
    with Guest(rx_buffers=0) as guest:
        stream = asked(guest)
        stream.incoming += b"data"
        stream.pump()
        assert not stream.reading
        guest.give_buffers(1)
        stream.pump()
        guest.give_buffers(4)
        stream.pump()
        packets = guest.received()

    assert [(header.op, data) for header, data in packets] == [(OP_RESPONSE, b""), (OP_RW, b"data")]


def test_connections_are_bounded_and_a_finished_one_gives_way() -> None:
    with Guest() as guest:
        streams = []
        ops: list[int] = []
        for port in range(MAX_CONNECTIONS + 1):
            stream = FakeStream()
            guest.backend.listeners[80] = [stream]
            guest.send(OP_REQUEST, port, 80)
            streams.append(stream)
            ops = guest.ops()
        assert ops == [OP_RST]
        assert guest.device.connection_count == MAX_CONNECTIONS
        streams[3].gone = True
        streams[3].pump()
        guest.received()
        guest.send(OP_REQUEST, 100_000, 80)
        assert guest.ops() == [OP_RST, OP_RESPONSE]

    assert all(stream.closed for stream in streams[:MAX_CONNECTIONS])


def test_answers_without_room_stop_the_guest_queue_until_there_is_room() -> None:
    with Guest(rx_buffers=0) as guest:
        for _ in range(MAX_RESETS + 40):
            guest.send(OP_RW, 1, 2)
        waiting = len(guest.tx.sent)
        for _ in range(15):
            guest.give_buffers(20)
            guest.backend.run_calls()
            guest.received(refill=False)
            guest.tx.collect()

    assert waiting == 40
    assert not guest.tx.sent


def test_malformed_packets_are_counted_and_harm_nobody_else() -> None:
    with Guest() as guest:
        stream = asked(guest)
        guest.received()
        guest.send_raw(b"short")
        guest.send(OP_RW, GUEST_PORT, 80, b"x", src_cid=9)
        guest.send(OP_RW, GUEST_PORT, 80, b"x", dst_cid=1 << 40)
        assert guest.ops() == []
        guest.send(OP_RW, 1, 2, b"x", len=2)
        guest.send(OP_REQUEST, 1, 80, type=2)
        assert guest.ops() == [OP_RST, OP_RST]
        guest.send(OP_RW, GUEST_PORT, 80, b"fine")

    assert guest.device.malformed == 5
    assert bytes(stream.outgoing) == b"fine"


def test_receive_buffers_too_small_for_a_header_come_back_empty() -> None:
    with Guest(rx_buffers=0) as guest:
        small = guest.give_buffers(3, 40)
        guest.send(OP_RW, 1, 2)
        done = guest.rx.collect()

    assert [(sent.head, sent.written) for sent in done] == [(sent.head, 0) for sent in small]


def test_device_reset_closes_every_stream() -> None:
    guest = Guest()
    stream, _ = accepted(guest)
    guest.close()

    assert stream.closed
    assert guest.device.connection_count == 0


def test_restored_device_tells_the_guest_that_its_connections_are_gone() -> None:
    with Guest() as before:
        _, host_port = accepted(before)
        saved = before.device.save()
    with Guest() as guest:
        guest.device.restore(saved)
        assert guest.device.open(FakeStream(), AGENT)
        (reset, _), (request, _) = guest.received()

    assert (reset.op, reset.dst_port, reset.src_port) == (OP_RST, AGENT, host_port)
    # A guest that still holds its end of the old connection must not take this for a packet of it.
    assert (request.op, request.dst_port) == (OP_REQUEST, AGENT)
    assert request.src_port != host_port


def test_restored_device_that_is_saved_at_once_still_knows_whom_to_tell() -> None:
    with Guest() as before:
        accepted(before)
        saved = before.device.save()
    with Guest(rx_buffers=0) as guest:
        guest.device.restore(saved)
        assert guest.device.save() == saved


_SAVED: dict[str, object] = {"guest_cid": 3, "next_host_port": 1 << 30, "lost": b""}


@pytest.mark.parametrize(
    "data",
    [
        {}, {**_SAVED, "guest_cid": -1}, {**_SAVED, "guest_cid": 1 << 64}, {**_SAVED, "more": 1},
        {**_SAVED, "lost": bytes(7)}, {**_SAVED, "lost": bytes(8 * 1000)}, {**_SAVED, "next_host_port": 80},
    ],
)  # fmt: skip
def test_hostile_saved_state_is_refused(data: dict[str, object]) -> None:
    with Guest() as guest, pytest.raises(StateError):
        guest.device.restore(data)

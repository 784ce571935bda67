"""The network card against a scripted driver and a wire in lists."""

from __future__ import annotations

import random

import pytest

from ostler.devices.virtio import net_header as net
from ostler.devices.virtio.net import TX
from ostler.devices.virtio.net_header import HEADER, HEADER_BYTES
from ostler.devices.virtio.rate_limit import RateLimit
from ostler.errors import StateError
from ostler.testing.fakes import FakeClock, FakeTimer
from tests.unit.devices.virtio.net_fakes import MAC, Card

PASST = net.F_CSUM | net.F_GUEST_CSUM | net.F_HOST_TSO4 | net.F_HOST_TSO6


def frame(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def test_configuration_says_address_link_and_mtu() -> None:
    with Card(mtu=65520) as card:
        config = b"".join(card.device.read_config(at, 1).to_bytes(1, "little") for at in range(12))

    assert config == MAC + (1).to_bytes(2, "little") + (1).to_bytes(2, "little") + (65520).to_bytes(2, "little")


def test_sent_frames_reach_the_wire_in_one_batch_without_their_header() -> None:
    frames = [frame(60 + n, n) for n in range(20)]
    with Card() as card:
        card.send(*frames)

    assert card.wire.sent == frames
    assert card.wire.batches == [20]
    assert card.driver.interrupts[TX] == 1


def test_header_goes_along_to_a_wire_that_wants_it() -> None:
    header = HEADER.pack(1, 1, 54, 1448, 34, 16, 0)
    with Card(header_bytes=HEADER_BYTES) as card:
        card.send(b"x" * 4000, header=header)

    assert card.wire.sent == [header + b"x" * 4000]


@pytest.mark.parametrize("parts", [[b"abc"], [bytes(12)], [bytes(12), bytes(13)], [bytes(12), bytes(66_000)]])
def test_frame_too_short_or_too_long_is_dropped_and_its_buffer_returned(parts: list[bytes]) -> None:
    with Card() as card:
        sent = card.tx.add(parts)
        card.driver.kick(TX)
        assert card.tx.collect() == [sent]

    assert card.wire.sent == []
    assert card.device.dropped == 1


def test_header_cut_across_descriptors_is_still_skipped() -> None:
    with Card() as card:
        card.tx.add([bytes(5), bytes(7) + b"0123456", b"789" * 10])
        card.driver.kick(TX)

    assert card.wire.sent == [b"0123456" + b"789" * 10]


def test_full_wire_stops_the_queue_until_it_is_writable() -> None:
    with Card() as card:
        card.wire.full_after = 1
        card.send(*(frame(1000) for _ in range(3)))
        card.send(frame(500))
        before = len(card.wire.sent)
        card.wire.full_after = None
        card.wire.writable()

    assert (before, len(card.wire.sent)) == (3, 4)


def test_frame_goes_into_one_buffer_with_its_header() -> None:
    data = frame(1200)
    with Card() as card:
        card.give(2, 2048)
        assert card.wire.receive(data) == 1
        (got,) = card.received()

    assert got[HEADER_BYTES:] == data
    assert HEADER.unpack(got[:HEADER_BYTES]) == (0, 0, 0, 0, 0, 0, 1)


def test_verified_checksums_are_announced_only_to_a_driver_that_negotiated_them() -> None:
    flags = []
    for features in (None, 0):
        with Card(features=features, offloads=PASST) as card:
            card.give(1, 2048)
            card.wire.receive(frame(100))
            flags.append(card.received()[0][0])

    assert flags == [net.FLAG_DATA_VALID, 0]


@pytest.mark.parametrize("sizes", [(1526,), (12, 1514), (5, 7, 100, 1414), (1, 1, 1, 1, 1522)])
def test_large_frame_is_merged_over_buffers_of_any_shape(sizes: tuple[int, ...]) -> None:
    data = frame(9000)
    with Card(features=net.F_MRG_RXBUF) as card:
        card.give(8, *sizes)
        assert card.wire.receive(data) == 1
        buffers = card.received()

    whole = b"".join(buffers)
    assert whole[HEADER_BYTES:] == data
    assert HEADER.unpack(whole[:HEADER_BYTES])[6] == len(buffers) == -(-(9000 + HEADER_BYTES) // 1526)


def test_driver_that_polls_sees_all_buffers_of_a_frame_or_none() -> None:
    with Card(features=net.F_MRG_RXBUF) as card:
        card.give(4, 1000)
        seen: set[int] = set()
        card.driver.memory.on_write(lambda *_: seen.add(card.driver.memory.read_int(card.rx.used + 2, 2)))
        card.wire.receive(frame(3500))

    assert seen == {0, 4}


def test_frame_without_room_waits_for_buffers_and_none_is_lost() -> None:
    frames = [frame(3000, n) for n in range(4)]
    with Card(features=net.F_MRG_RXBUF) as card:
        card.give(3, 1526)
        assert card.wire.receive(*frames) == 1
        got = b"".join(card.received())
        card.give(6, 1526)
        got += b"".join(card.received())

    assert [got[at * 3012 + 12 : (at + 1) * 3012] for at in range(4)] == frames


def test_frame_that_never_fits_is_dropped_and_the_buffer_stays() -> None:
    with Card(features=0) as card:
        card.give(1, 500)
        assert card.wire.receive(frame(1000), frame(100)) == 2
        (got,) = card.received()

    assert got[HEADER_BYTES:] == frame(100)
    assert card.device.dropped == 1


def test_header_of_a_wire_that_has_one_is_kept_and_counts_buffers() -> None:
    header = HEADER.pack(1, 1, 54, 1448, 34, 16, 0xFFFF)
    data = frame(5000)
    with Card(features=net.F_MRG_RXBUF, header_bytes=HEADER_BYTES) as card:
        card.give(4, 2000)
        card.wire.receive(header + data)
        whole = b"".join(card.received())

    assert HEADER.unpack(whole[:HEADER_BYTES]) == (1, 1, 54, 1448, 34, 16, 3)
    assert whole[HEADER_BYTES:] == data


def test_frames_without_a_driver_or_a_link_are_lost() -> None:
    with Card() as card:
        card.give(2, 2048)
        card.device.set_link(up=False)
        assert card.wire.receive(frame(100)) == 1
        assert card.device.read_config(6, 2) == 0
        assert card.received() == []
        card.device.set_link(up=True)
        card.device.reset()
        assert card.wire.receive(frame(100)) == 1

    assert card.driver.config_changes == 2
    assert card.device.dropped == 2


def test_offloads_are_what_both_sides_can() -> None:
    with Card(offloads=PASST) as card:
        assert card.wire.offloads == PASST
        assert card.command(net.CTRL_GUEST_OFFLOADS, 0, (0).to_bytes(8, "little")) == 0
        assert card.wire.offloads == PASST & ~net.F_GUEST_CSUM
        assert card.command(net.CTRL_GUEST_OFFLOADS, 0, net.F_GUEST_TSO4.to_bytes(8, "little")) == 1


@pytest.mark.parametrize(
    ("kind", "number", "data", "answer"),
    [
        (net.CTRL_RX, 0, b"\1", 0), (net.CTRL_RX, 6, b"\1", 1), (net.CTRL_MAC, 0, bytes(8), 0),
        (net.CTRL_MAC, 1, b"\2\0\0\0\0\1", 0), (net.CTRL_MAC, 1, b"\2", 1),
        (net.CTRL_ANNOUNCE, 0, b"", 1), (9, 9, b"", 1),
    ],
)  # fmt: skip
def test_control_command_is_answered(kind: int, number: int, data: bytes, answer: int) -> None:
    with Card() as card:
        assert card.command(kind, number, data) == answer


def test_address_set_by_the_driver_lasts_until_reset() -> None:
    with Card() as card:
        card.command(net.CTRL_MAC, net.CTRL_MAC_ADDR_SET, b"\2\0\0\0\0\1")
        changed = card.device.mac
        card.device.reset()

    assert changed == b"\2\0\0\0\0\1"
    assert card.device.mac == MAC


def test_restored_card_asks_the_driver_to_announce_itself() -> None:
    with Card() as card:
        saved = card.device.save()
        card.device.reset()
        card.device.restore(saved)
        card.device.activate(card.driver.virtqueues, card.driver.features)
        assert card.device.read_config(6, 2) == net.STATUS_LINK_UP | net.STATUS_ANNOUNCE
        assert card.command(net.CTRL_ANNOUNCE, net.CTRL_ANNOUNCE_ACK) == 0
        assert card.device.read_config(6, 2) == net.STATUS_LINK_UP


@pytest.mark.parametrize("change", [{"mac": b"123"}, {"offloads": 1 << 40}, {"link_up": 2}, {"more": 1}])
def test_hostile_saved_state_is_refused(change: dict[str, object]) -> None:
    with Card() as card, pytest.raises(StateError):
        card.device.restore(card.device.save() | change)


def test_rate_limit_holds_frames_back_until_time_has_passed() -> None:
    clock, timer = FakeClock(), FakeTimer()
    limit = RateLimit(1_000_000, clock=clock, timer=timer, burst_bytes=10_000)
    with Card(tx_limit=limit) as card:
        card.send(*(frame(1000) for _ in range(12)))
        card.send(frame(1000))
        before = len(card.wire.sent)
        assert timer.deadline_ns is not None
        clock.now_ns = timer.deadline_ns
        limit.expired()

    # 2,000 bytes of debt at a million a second.
    assert 2_000_000 <= clock.now_ns <= 2_010_000
    assert (before, len(card.wire.sent)) == (12, 13)


def test_rate_limit_of_reception_pauses_the_wire() -> None:
    clock, timer = FakeClock(), FakeTimer()
    limit = RateLimit(1_000_000, clock=clock, timer=timer, burst_bytes=1500)
    with Card(rx_limit=limit) as card:
        card.give(5, 2048)
        assert card.wire.receive(*(frame(1000, n) for n in range(4))) == 2
        assert timer.deadline_ns is not None
        clock.now_ns = timer.deadline_ns
        limit.expired()
        assert len(card.received()) == 3

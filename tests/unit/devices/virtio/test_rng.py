"""The entropy device."""

from __future__ import annotations

from ostler.devices.virtio.rng import MAX_REQUEST_BYTES, Entropy
from ostler.testing.virtio import FakeDriver


def test_request_is_filled_up_to_the_limit_and_no_further() -> None:
    asked: list[int] = []

    def source(count: int) -> bytes:
        asked.append(count)
        return b"\x5a" * count

    with FakeDriver(Entropy(source)) as driver:
        assert driver.request(0, writable=[10, 22]) == b"\x5a" * 32
        assert len(driver.request(0, writable=[MAX_REQUEST_BYTES, 100])) == MAX_REQUEST_BYTES
    assert asked == [32, MAX_REQUEST_BYTES]


def test_request_without_room_stops_the_device() -> None:
    with FakeDriver(Entropy(bytes)) as driver:
        driver.queues[0].add([b"x"])
        driver.kick(0)
        assert "without room" in str(driver.errors[0])


def test_kick_after_reset_does_nothing() -> None:
    device = Entropy(bytes)
    device.reset()
    device.kicked(0)
    assert device.save() == {}

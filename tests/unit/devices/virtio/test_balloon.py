"""The balloon: pages given and reported, statistics, what the driver may write."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from ostler.abi.virtio import balloon as abi
from ostler.abi.virtio.ring import VRING_DESC_F_WRITE
from ostler.devices.virtio.balloon import MAX_PFN_BYTES, Balloon
from ostler.testing.virtio import FakeDriver

MIB = 1 << 20
MEMORY = 4 * MIB
INFLATE, DEFLATE, STATS, REPORTING = range(4)


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    with FakeDriver(Balloon(MEMORY), memory_bytes=MEMORY) as driver:
        yield driver


def balloon(driver: FakeDriver) -> Balloon:
    assert isinstance(driver.device, Balloon)
    return driver.device


def resident(driver: FakeDriver) -> int:
    """Bytes the host keeps for the guest."""
    return os.fstat(driver.memory.fd).st_blocks * 512


def pfns(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def test_inflate_gives_pages_back_whatever_their_order(driver: FakeDriver) -> None:
    for page in range(512, 520):
        driver.memory.write(page << 12, b"x")
    driver.queues[INFLATE].add([pfns(515, 513, 514, 518, 513)])
    before = resident(driver)
    driver.kick(INFLATE)
    assert len(driver.queues[INFLATE].collect()) == 1
    assert before - resident(driver) == 4 * 4096
    assert driver.memory.read(513 << 12, 1) + driver.memory.read(512 << 12, 1) == b"\0x"
    assert balloon(driver).discarded_bytes == 4 * 4096
    driver.request(DEFLATE, [pfns(513)])
    driver.memory.write(513 << 12, b"y")
    assert driver.memory.read(513 << 12, 1) == b"y"


def test_inflate_announces_pages_because_code_in_them_is_gone(driver: FakeDriver) -> None:
    seen: list[tuple[int, int]] = []
    sent = driver.queues[INFLATE].add([pfns(600, 601)])
    driver.memory.on_write(lambda gpa, size: seen.append((gpa, size)))
    driver.kick(INFLATE)
    assert driver.queues[INFLATE].collect() == [sent]
    assert (600 << 12, 0x2000) in seen


def test_inflate_page_outside_of_memory_is_ignored_and_counted(driver: FakeDriver) -> None:
    driver.request(INFLATE, [pfns(MEMORY >> 12, 0xFFFF_FFFF)])
    assert (balloon(driver).ignored_pages, balloon(driver).discarded_bytes) == (2, 0)


@pytest.mark.parametrize("data", [b"abc", bytes(MAX_PFN_BYTES + 4)])
def test_inflate_malformed_list_stops_the_device(driver: FakeDriver, data: bytes) -> None:
    driver.queues[INFLATE].add([data])
    driver.kick(INFLATE)
    assert "balloon request" in str(driver.errors[0])


def test_report_gives_whole_pages_back(driver: FakeDriver) -> None:
    driver.memory.write(600 << 12, b"x" * 0x4000)
    before = resident(driver)
    driver.queues[REPORTING].add_parts(
        [(600 << 12, 0x2000, VRING_DESC_F_WRITE), ((602 << 12) + 16, 0x1800, VRING_DESC_F_WRITE)], []
    )
    driver.kick(REPORTING)
    assert len(driver.queues[REPORTING].collect()) == 1
    assert before - resident(driver) == 2 * 4096


def test_report_under_poisoning_keeps_content(driver: FakeDriver) -> None:
    driver.device.write_config(abi.POISON_OFFSET, 4, 0xAAAA_AAAA)
    driver.memory.write(600 << 12, b"\xaa" * 0x1000)
    driver.queues[REPORTING].add_parts([(600 << 12, 0x1000, VRING_DESC_F_WRITE)], [])
    driver.kick(REPORTING)
    assert driver.memory.read(600 << 12, 4) == b"\xaa" * 4


def test_reporting_queue_moves_up_without_statistics() -> None:
    features = 1 << abi.VIRTIO_BALLOON_F_REPORTING
    with FakeDriver(Balloon(MEMORY), memory_bytes=MEMORY, features=features) as driver:
        driver.memory.write(600 << 12, b"x")
        driver.queues[2].add_parts([(600 << 12, 0x1000, VRING_DESC_F_WRITE)], [])
        driver.kick(2)
        assert driver.memory.read(600 << 12, 1) == b"\0"
        driver.kick(3)
        assert driver.errors == []


def test_statistics_are_taken_when_asked_for(driver: FakeDriver) -> None:
    device, told = balloon(driver), []
    device.on_statistics = lambda: told.append(dict(device.statistics))
    assert device.ask_statistics() is False
    first = driver.queues[STATS].add([abi.STATISTIC.pack(4, 100) + abi.STATISTIC.pack(99, 1)])
    driver.kick(STATS)
    assert (driver.queues[STATS].collect(), told) == ([], [{"free_memory": 100}])
    assert device.ask_statistics() is True
    assert (driver.queues[STATS].collect(), driver.interrupts[STATS]) == ([first], 1)
    assert device.ask_statistics() is False
    driver.queues[STATS].add([abi.STATISTIC.pack(5, 7)])
    driver.kick(STATS)
    assert device.statistics == {"total_memory": 7}


def test_statistics_given_before_the_driver_was_ready_are_looked_for(driver: FakeDriver) -> None:
    device = balloon(driver)
    again: list[int] = []
    device.kick_again = again.append
    device.reset()

    device.activate(driver.virtqueues, 1 << abi.VIRTIO_BALLOON_F_STATS_VQ)

    assert again == [STATS]


def test_target_is_shown_in_pages_and_bounded(driver: FakeDriver) -> None:
    device = balloon(driver)
    device.set_target(3 * MIB)
    assert (device.read_config(0, 4), driver.config_changes) == (256, 1)
    device.set_target(-5)
    assert device.read_config(0, 4) == MEMORY >> 12
    device.set_target(1 << 60)
    assert device.read_config(0, 4) == 0


def test_driver_writes_what_it_has_and_reset_forgets_it_but_not_the_target(driver: FakeDriver) -> None:
    device = balloon(driver)
    device.set_target(3 * MIB)
    device.write_config(abi.ACTUAL_OFFSET, 4, 17)
    device.write_config(0, 4, 99)
    assert (device.actual_bytes, device.read_config(0, 4)) == (17 << 12, 256)
    other = Balloon(MEMORY)
    other.restore(device.save())
    assert other.read_config(0, 8) == 17 << 32 | 256
    device.reset()
    assert device.read_config(0, 8) == 256

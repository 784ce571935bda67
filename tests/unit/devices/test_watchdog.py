"""The watchdog: when it fires, what feeds it, and that a saved one begins with all of its time."""

from __future__ import annotations

import pytest

from ostler.devices.acpi.watchdog import CONTROL, COUNT, LEFT, NS_PER_PERIOD, RELOAD, STATUS, Watchdog
from ostler.errors import StateError
from ostler.testing.fakes import FakeClock, FakeTimer


class Bench:
    def __init__(self) -> None:
        self.clock, self.timer = FakeClock(), FakeTimer()
        self.fired = 0
        self.device = Watchdog(clock=self.clock, timer=self.timer, fired=self._fire)

    def _fire(self) -> None:
        self.fired += 1

    def write(self, offset: int, value: int) -> None:
        self.device.write(offset, 4, value)

    def read(self, offset: int) -> int:
        return self.device.read(offset, 4)


def test_watchdog_that_was_not_started_never_has_a_deadline() -> None:
    bench = Bench()
    bench.write(COUNT, 20)
    bench.write(RELOAD, 1)
    assert bench.timer.deadline_ns is None
    bench.device.expired()
    assert (bench.fired, bench.read(STATUS)) == (0, 0)


def test_watchdog_fires_once_its_count_is_over_unless_it_is_fed() -> None:
    bench = Bench()
    bench.write(COUNT, 20)
    bench.write(CONTROL, 1)
    assert bench.timer.deadline_ns == 20 * NS_PER_PERIOD
    bench.clock.now_ns = 15 * NS_PER_PERIOD
    assert bench.read(LEFT) == 5
    bench.write(RELOAD, 1)
    assert bench.timer.deadline_ns == 35 * NS_PER_PERIOD
    bench.clock.now_ns = 35 * NS_PER_PERIOD
    bench.device.expired()
    assert (bench.fired, bench.read(STATUS), bench.read(LEFT)) == (1, 1, 0)
    bench.write(STATUS, 1)
    assert bench.read(STATUS) == 0
    bench.write(CONTROL, 0)
    assert bench.timer.deadline_ns is None


@pytest.mark.parametrize(("written", "kept"), [(0, 1), (0xFFFF_FFFF, 0xFFFF), (300, 300)])
def test_watchdog_count_is_bounded(written: int, kept: int) -> None:
    bench = Bench()
    bench.write(COUNT, written)
    assert bench.read(COUNT) == kept
    assert bench.device.read(COUNT + 1, 1) == kept >> 8


def test_watchdog_ignores_parts_of_registers_and_what_it_has_not_got() -> None:
    bench = Bench()
    bench.device.write(CONTROL, 1, 1)
    bench.device.write(CONTROL + 2, 4, 1)
    bench.write(0x40, 1)
    assert not bench.device.is_running
    assert bench.read(0x40) == 0


def test_watchdog_saved_goes_on_with_all_of_its_time() -> None:
    bench, other = Bench(), Bench()
    bench.write(COUNT, 50)
    bench.write(CONTROL, 1)
    bench.clock.now_ns = 49 * NS_PER_PERIOD
    other.device.restore(bench.device.save())
    assert other.timer.deadline_ns == 50 * NS_PER_PERIOD
    with pytest.raises(StateError, match="count"):
        other.device.restore({"count": 1 << 16, "control": 0, "status": 0})
    assert other.device.is_running

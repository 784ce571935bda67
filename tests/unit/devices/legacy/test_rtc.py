"""Real-time clock: formats, setting, the three interrupts, hostile state."""

from __future__ import annotations

import calendar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.devices.legacy import rtc
from ostler.devices.legacy.rtc import Rtc
from ostler.devices.legacy.rtc_registers import A, B, C
from ostler.devices.wiring import NS_PER_SECOND
from ostler.errors import StateError
from ostler.testing.fakes import FakeClock, FakeTimer, RecordedLine

START = calendar.timegm((2026, 11, 22, 21, 58, 57)) * NS_PER_SECOND


class Board:
    """A clock chip and everything around it."""

    def __init__(self) -> None:
        self.clock, self.timer, self.irq = FakeClock(START), FakeTimer(), RecordedLine()
        self.rtc = Rtc(clock=self.clock, timer=self.timer, irq=self.irq.line, cmos={0x15: 0x80})

    def get(self, index: int) -> int:
        self.rtc.write(0, 1, index)
        return self.rtc.read(1, 1)

    def put(self, index: int, value: int) -> None:
        self.rtc.write(0, 1, index)
        self.rtc.write(1, 1, value)

    def pass_ns(self, duration_ns: int) -> None:
        """Move time and let the timer expire where it must."""
        end = self.clock.now_ns + duration_ns
        while self.timer.deadline_ns is not None and self.timer.deadline_ns <= end:
            self.clock.now_ns = max(self.clock.now_ns, self.timer.deadline_ns)
            self.timer.deadline_ns = None
            self.rtc.expired()
        self.clock.now_ns = end


def test_time_reads_bcd_24_hours_with_century() -> None:
    board = Board()
    shown = [board.get(index) for index in (rtc.CENTURY, rtc.YEAR, rtc.MONTH, rtc.DAY, rtc.HOURS, rtc.MINUTES)]
    assert shown == [0x20, 0x26, 0x11, 0x22, 0x21, 0x58]
    assert board.get(rtc.DAY_OF_WEEK) == 1
    assert board.get(rtc.REG_D) == 0x80
    assert board.get(0x15) == 0x80


def test_time_binary_12_hours_marks_afternoon() -> None:
    board = Board()
    board.put(rtc.REG_B, B.BINARY)
    assert board.get(rtc.HOURS) == 0x80 | 9
    assert board.get(rtc.SECONDS) == 57


def test_set_time_under_set_bit_moves_clock() -> None:
    board = Board()
    board.put(rtc.REG_B, B.SET | B.HOURS_24 | B.BINARY)
    for index, value in ((rtc.CENTURY, 19), (rtc.YEAR, 99), (rtc.MONTH, 12), (rtc.DAY, 31), (rtc.HOURS, 23)):
        board.put(index, value)
    board.put(rtc.MINUTES, 59)
    board.put(rtc.SECONDS, 59)
    board.put(rtc.REG_B, B.HOURS_24 | B.BINARY)
    board.pass_ns(NS_PER_SECOND)
    assert [board.get(i) for i in (rtc.CENTURY, rtc.YEAR, rtc.MONTH, rtc.DAY, rtc.SECONDS)] == [20, 0, 1, 1, 0]


def test_update_in_progress_before_second_ends() -> None:
    board = Board()
    assert not board.get(rtc.REG_A) & A.UPDATE_IN_PROGRESS
    board.pass_ns(NS_PER_SECOND - 1000)
    assert board.get(rtc.REG_A) & A.UPDATE_IN_PROGRESS


def test_update_interrupt_once_until_acknowledged() -> None:
    board = Board()
    board.put(rtc.REG_B, B.HOURS_24 | B.UPDATE)
    board.pass_ns(5 * NS_PER_SECOND)
    assert board.irq.levels == [1]
    assert board.get(rtc.REG_C) == C.IRQ | C.UPDATE | C.PERIODIC
    assert board.get(rtc.REG_C) == 0
    board.pass_ns(NS_PER_SECOND)
    assert board.irq.levels == [1, 0, 1]


def test_alarm_with_wildcards_fires_at_next_match() -> None:
    board = Board()
    board.put(rtc.HOURS_ALARM, 0xFF)
    board.put(rtc.MINUTES_ALARM, 0x59)
    board.put(rtc.SECONDS_ALARM, 0x10)
    board.put(rtc.REG_B, B.HOURS_24 | B.ALARM)
    assert board.timer.deadline_ns == 13 * NS_PER_SECOND
    board.pass_ns(13 * NS_PER_SECOND)
    assert board.get(rtc.REG_C) & C.ALARM


def test_alarm_in_past_of_day_waits_for_tomorrow_and_impossible_never() -> None:
    board = Board()
    for index in (rtc.HOURS_ALARM, rtc.MINUTES_ALARM, rtc.SECONDS_ALARM):
        board.put(index, 0x01)
    board.put(rtc.REG_B, B.HOURS_24 | B.ALARM)
    tomorrow = calendar.timegm((2026, 11, 23, 1, 1, 1)) * NS_PER_SECOND
    assert board.timer.deadline_ns == tomorrow - START
    board.put(rtc.HOURS_ALARM, 0x30)
    assert board.timer.deadline_ns is None


def test_periodic_rate_sets_deadline_and_missed_periods_merge() -> None:
    board = Board()
    board.put(rtc.REG_A, 0x26)
    board.put(rtc.REG_B, B.HOURS_24 | B.PERIODIC)
    assert board.timer.deadline_ns is not None
    assert 0 < board.timer.deadline_ns <= NS_PER_SECOND // 1024 + 1
    board.clock.now_ns = NS_PER_SECOND
    board.rtc.expired()
    assert board.irq.levels == [1]
    assert board.timer.deadline_ns is None


def test_restore_saved_state_keeps_guest_time() -> None:
    board, other = Board(), Board()
    board.put(rtc.YEAR, 0x30)
    board.put(0x40, 0x99)
    other.rtc.restore(board.rtc.save())
    assert (other.get(rtc.YEAR), other.get(0x40)) == (0x30, 0x99)


@pytest.mark.parametrize("change", [{"cmos": b"short"}, {"offset_ns_biased": 0}, {"index": 128}, {"reg_a": None}])
def test_restore_impossible_state_raises(change: dict[str, object]) -> None:
    board = Board()
    with pytest.raises(StateError, match="real-time clock"):
        board.rtc.restore({**board.rtc.save(), **change})


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 3 * NS_PER_SECOND)), max_size=30))
def test_any_register_traffic_keeps_bytes_and_bounded_timers(traffic: list[tuple[int, int, int]]) -> None:
    board = Board()
    for index, value, pause_ns in traffic:
        board.put(index, value)
        assert 0 <= board.get(index) <= 0xFF
        board.clock.now_ns += pause_ns
        board.rtc.expired()
    Board().rtc.restore(board.rtc.save())

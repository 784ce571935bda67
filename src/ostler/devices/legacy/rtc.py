"""MC146818 real-time clock and CMOS memory, ports 0x70 and 0x71.

Time is the injected wall clock plus an offset the guest sets; nothing ticks by itself. Flags
are computed when they are looked at, and the timer is armed only for an interrupt that is
enabled and not yet pending, so a guest that stops acknowledging stops costing anything, and
one that slept through a thousand periods gets one interrupt.

Left out on purpose: daylight saving, the square wave, time before 1970.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ostler.devices.legacy.rtc_registers import A, B, C
from ostler.devices.state import Saved, blob, load, save, uint
from ostler.devices.wiring import NS_PER_SECOND, Clock, IrqLine, Timer
from ostler.errors import StateError

CMOS_SIZE = 128

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
DAY_OF_WEEK, DAY, MONTH, YEAR, REG_A, REG_B, REG_C, REG_D = range(6, 14)
CENTURY = 0x32
TIME_REGISTERS = frozenset((SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY, MONTH, YEAR, CENTURY))

# UIP is up while an update is near or under way: 244 us before and 1984 us during.
UPDATE_NS = 2_228_000
# The latest second that still has a four-digit year.
LATEST_SECOND = calendar.timegm((9999, 12, 31, 23, 59, 59))
OFFSET_BIAS = 1 << 69
VALID_RAM_AND_TIME = 0x80


@dataclass(slots=True)
class RtcState:
    """CMOS as the guest wrote it, the clock's offset, and how far the flags are computed."""

    index: int = uint(7)
    cmos: bytes = blob(CMOS_SIZE)
    offset_ns_biased: int = uint(70, OFFSET_BIAS)
    flags_until_ns: int = uint(70)
    reg_a: int = uint(7, 0x26)
    reg_b: int = uint(8, B.HOURS_24)
    reg_c: int = uint(8)


class Rtc:
    """The clock and its 128 bytes of memory. Calls must be serialised by the owner."""

    def __init__(self, *, clock: Clock, timer: Timer, irq: IrqLine, cmos: Mapping[int, int]) -> None:
        """`cmos` holds what firmware would have left in the memory, by index."""
        self._clock = clock
        self._timer = timer
        self._irq = irq
        self._cmos = bytearray(CMOS_SIZE)
        for index, value in cmos.items():
            self._cmos[index] = value
        self._index = 0
        self._offset_ns = 0
        self._a, self._b, self._c = 0x26, int(B.HOURS_24), 0
        self._flags_until_ns = self._now_ns()

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002 - the bus makes it one byte
        return self._read_register() if offset else 0xFF

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        if offset:
            self._write_register(value & 0xFF)
        else:
            # The top bit of the index port masks NMI on a PC; nothing here raises one.
            self._index = value & 0x7F

    def expired(self) -> None:
        """The timer's deadline has come."""
        self._advance_flags()
        self._update()

    def save(self) -> Saved:
        state = RtcState(
            index=self._index, cmos=bytes(self._cmos), offset_ns_biased=self._offset_ns + OFFSET_BIAS,
            flags_until_ns=self._flags_until_ns, reg_a=self._a, reg_b=self._b, reg_c=self._c,
        )  # fmt: skip
        return save(state)

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing."""
        state = load(RtcState, "real-time clock", data)
        offset_ns = state.offset_ns_biased - OFFSET_BIAS
        now_s = (self._clock.wall_ns() + offset_ns) // NS_PER_SECOND
        if len(state.cmos) != CMOS_SIZE or not 0 <= now_s <= LATEST_SECOND:
            raise StateError(f"real-time clock: saved time or memory is impossible: second {now_s}")
        self._index, self._cmos = state.index, bytearray(state.cmos)
        self._offset_ns = offset_ns
        # Whatever was missed while saved counts as one lapse, however long it was.
        self._flags_until_ns = min(state.flags_until_ns, self._now_ns())
        self._a, self._b, self._c = state.reg_a, state.reg_b, state.reg_c & ~C.IRQ
        self._update()

    # -- registers --------------------------------------------------------------------------

    def _read_register(self) -> int:
        index = self._index
        if index in TIME_REGISTERS:
            return self._cmos[index] if self._b & B.SET else self._time_registers()[index]
        if index == REG_A:
            in_second_ns = self._now_ns() % NS_PER_SECOND
            updating = not self._b & B.SET and in_second_ns >= NS_PER_SECOND - UPDATE_NS
            return self._a | (A.UPDATE_IN_PROGRESS if updating else 0)
        if index == REG_B:
            return self._b
        if index == REG_C:
            return self._acknowledge()
        return VALID_RAM_AND_TIME if index == REG_D else self._cmos[index]

    def _acknowledge(self) -> int:
        self._advance_flags()
        value = self._c | (C.IRQ if self._c & self._b & 0x70 else 0)
        self._c = 0
        self._update()
        return value

    def _write_register(self, value: int) -> None:
        index = self._index
        if index in TIME_REGISTERS:
            self._write_time(index, value)
        elif index == REG_A:
            self._advance_flags()
            self._a = value & 0x7F
            self._update()
        elif index == REG_B:
            self._write_b(value)
        elif index in (REG_C, REG_D):
            return
        else:
            self._cmos[index] = value
            if index in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
                self._advance_flags()
                self._update()

    def _write_time(self, index: int, value: int) -> None:
        if not self._b & B.SET:
            # Without SET the other registers go on from what they show now.
            for register, shown in self._time_registers().items():
                self._cmos[register] = shown
        self._cmos[index] = value
        if not self._b & B.SET:
            self._take_time()

    def _write_b(self, value: int) -> None:
        self._advance_flags()
        if value & B.SET and not self._b & B.SET:
            for register, shown in self._time_registers().items():
                self._cmos[register] = shown
            # The data sheet: setting SET clears the update-ended interrupt enable.
            value &= ~B.UPDATE
        leaving_set = self._b & B.SET and not value & B.SET
        self._b = value
        if leaving_set:
            self._take_time()
        self._update()

    # -- time -------------------------------------------------------------------------------

    def _now_ns(self) -> int:
        return max(self._clock.wall_ns() + self._offset_ns, 0)

    def _encode(self, value: int) -> int:
        return value if self._b & B.BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._b & B.BINARY else (value >> 4) * 10 + (value & 0x0F)

    def _encode_hours(self, hours: int) -> int:
        if self._b & B.HOURS_24:
            return self._encode(hours)
        return self._encode(hours % 12 or 12) | (0x80 if hours >= 12 else 0)

    def _decode_hours(self, value: int) -> int:
        if self._b & B.HOURS_24:
            return self._decode(value)
        return self._decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)

    def _time_registers(self) -> dict[int, int]:
        now = time.gmtime(min(self._now_ns() // NS_PER_SECOND, LATEST_SECOND))
        return {
            SECONDS: self._encode(min(now.tm_sec, 59)),
            MINUTES: self._encode(now.tm_min),
            HOURS: self._encode_hours(now.tm_hour),
            DAY_OF_WEEK: self._encode((now.tm_wday + 1) % 7 + 1),
            DAY: self._encode(now.tm_mday),
            MONTH: self._encode(now.tm_mon),
            YEAR: self._encode(now.tm_year % 100),
            CENTURY: self._encode(now.tm_year // 100),
        }

    def _take_time(self) -> None:
        """Turn the registers into an offset. Impossible dates are cut to possible ones."""
        cmos = self._cmos
        year = self._decode(cmos[CENTURY]) * 100 + self._decode(cmos[YEAR])
        month = min(max(self._decode(cmos[MONTH]), 1), 12)
        first = calendar.timegm((min(max(year, 1970), 9999), month, 1, 0, 0, 0))
        second = (
            first
            + (min(max(self._decode(cmos[DAY]), 1), 31) - 1) * 86400
            + min(self._decode_hours(cmos[HOURS]), 23) * 3600
            + min(self._decode(cmos[MINUTES]), 59) * 60
            + min(self._decode(cmos[SECONDS]), 59)
        )
        self._offset_ns = min(second, LATEST_SECOND) * NS_PER_SECOND - self._clock.wall_ns()
        self._flags_until_ns = self._now_ns()
        self._update()

    # -- interrupts -------------------------------------------------------------------------

    def _period_ns(self) -> int | None:
        """None when the periodic rate is off. Rates 1 and 2 repeat 8 and 9 by the data sheet."""
        rate = A.RATE.get(self._a)
        if not rate:
            return None
        shift = (rate if rate > 2 else rate + 7) - 1
        return NS_PER_SECOND * (1 << shift) // 32768

    def _next_alarm_ns(self, after_ns: int) -> int | None:
        """The first second behind `after_ns` that matches the alarm; None for no such time."""
        choices = []
        for register, limit, decode in (
            (HOURS_ALARM, 24, self._decode_hours), (MINUTES_ALARM, 60, self._decode), (SECONDS_ALARM, 60, self._decode),
        ):  # fmt: skip
            raw = self._cmos[register]
            wanted = range(limit) if raw >= 0xC0 else [n for n in (decode(raw),) if n < limit]
            choices.append(wanted)
        second = after_ns // NS_PER_SECOND + 1
        day_start, in_day = second - second % 86400, second % 86400
        for start, floor in ((day_start, in_day), (day_start + 86400, 0)):
            found = _first_match(choices[0], choices[1], choices[2], floor)
            if found is not None:
                return (start + found) * NS_PER_SECOND
        return None

    def _next_events(self, after_ns: int) -> dict[int, int]:
        """When each flag will next be raised, strictly behind `after_ns`."""
        events = {}
        period_ns = self._period_ns()
        if period_ns is not None:
            events[int(C.PERIODIC)] = after_ns - after_ns % period_ns + period_ns
        if not self._b & B.SET:
            events[int(C.UPDATE)] = after_ns - after_ns % NS_PER_SECOND + NS_PER_SECOND
            alarm_ns = self._next_alarm_ns(after_ns)
            if alarm_ns is not None:
                events[int(C.ALARM)] = alarm_ns
        return events

    def _advance_flags(self) -> None:
        now_ns = self._now_ns()
        for flag, when_ns in self._next_events(self._flags_until_ns).items():
            if when_ns <= now_ns:
                self._c |= flag
        self._flags_until_ns = max(self._flags_until_ns, now_ns)

    def _update(self) -> None:
        enabled = self._b & 0x70
        self._irq.set(1 if self._c & enabled else 0)
        waiting = enabled & ~self._c
        due = [when for flag, when in self._next_events(self._flags_until_ns).items() if flag & waiting]
        if due:
            self._timer.arm(self._clock.monotonic_ns() + max(min(due) - self._now_ns(), 0))
        else:
            self._timer.disarm()


def _first_match(
    hours: range | list[int], minutes: range | list[int], seconds: range | list[int], floor: int
) -> int | None:
    """The smallest second of a day, not below `floor`, made of the given hours, minutes and seconds."""
    if not minutes or not seconds:
        return None
    for hour in hours:
        if hour * 3600 + minutes[-1] * 60 + seconds[-1] < floor:
            continue
        for minute in minutes:
            base = hour * 3600 + minute * 60
            if base + seconds[-1] >= floor:
                return next(base + second for second in seconds if base + second >= floor)
    return None

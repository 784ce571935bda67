"""Registers A, B and C of the MC146818 real-time clock."""

from __future__ import annotations

from ostler.registers import Register, bit, field


class A(Register):
    """Register A: divider and periodic rate."""

    RATE = field(0, 4)
    DIVIDER = field(4, 3)
    UPDATE_IN_PROGRESS = bit(7)


class B(Register):
    """Register B: formats and interrupt enables."""

    DAYLIGHT = bit(0)
    HOURS_24 = bit(1)
    BINARY = bit(2)
    SQUARE_WAVE = bit(3)
    UPDATE = bit(4)
    ALARM = bit(5)
    PERIODIC = bit(6)
    SET = bit(7)


class C(Register):
    """Register C: interrupt flags, cleared by reading. Their places match those in B."""

    UPDATE = bit(4)
    ALARM = bit(5)
    PERIODIC = bit(6)
    IRQ = bit(7)

"""16550: registers, FIFO, interrupts, loopback, back-pressure, saved state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.devices.legacy.serial import FIFO_SIZE, Serial
from ostler.devices.legacy.serial_registers import (
    FCR,
    IER,
    IIR_LINE,
    IIR_MODEM,
    IIR_NONE,
    IIR_RX_DATA,
    IIR_THR_EMPTY,
    IIR_TIMEOUT,
    LCR,
    LSR,
    MCR,
    MSR,
)
from ostler.errors import StateError
from ostler.testing.fakes import RecordedLine

DATA, IER_AT, IIR_AT, LCR_AT, MCR_AT, LSR_AT, MSR_AT, SCR_AT = range(8)


class Port:
    """A UART with its wires in hand."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.rooms = 0
        self.irq = RecordedLine()
        self.uart = Serial(irq=self.irq.line, sink=self.sent.append, on_room=self._room)

    def _room(self) -> None:
        self.rooms += 1

    def get(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def put(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    def enable(self, interrupts: int, *, fifo: int = 0) -> None:
        self.put(MCR_AT, MCR.OUT2 | MCR.RTS)
        self.put(MSR_AT, 0)
        self.put(IIR_AT, fifo)
        self.put(IER_AT, interrupts)


def test_write_thr_reaches_sink_and_transmitter_stays_empty() -> None:
    port = Port()
    for byte in b"hello":
        port.put(DATA, byte)
    assert bytes(port.sent) == b"hello"
    assert port.get(LSR_AT) == LSR.THR_EMPTY | LSR.TX_IDLE


def test_divisor_latch_hides_data_and_ier() -> None:
    port = Port()
    port.put(IER_AT, 0x05)
    port.put(LCR_AT, LCR.DLAB | 3)
    port.put(DATA, 0x34)
    port.put(IER_AT, 0x12)
    assert (port.get(DATA), port.get(IER_AT)) == (0x34, 0x12)
    port.put(LCR_AT, 3)
    assert port.get(IER_AT) == 0x05
    assert not port.sent


def test_scratch_keeps_and_ier_reserved_bits_read_zero() -> None:
    port = Port()
    port.put(SCR_AT, 0xA5)
    port.put(IER_AT, 0xFF)
    assert port.get(SCR_AT) == 0xA5
    assert port.get(IER_AT) == 0x0F


def test_thr_interrupt_enabling_raises_and_identification_acknowledges() -> None:
    port = Port()
    port.enable(IER.THR_EMPTY)
    assert port.get(IIR_AT) == IIR_THR_EMPTY
    assert port.get(IIR_AT) == IIR_NONE
    port.put(DATA, 0x41)
    assert port.irq.levels == [1, 0, 1]


def test_receive_without_fifo_takes_one_byte_and_raises() -> None:
    port = Port()
    port.enable(IER.RX_DATA)
    assert port.uart.receive(b"ab") == 1
    assert port.get(IIR_AT) == IIR_RX_DATA
    assert port.get(LSR_AT) & LSR.DATA_READY
    assert port.get(DATA) == 0x61
    assert port.rooms == 2
    assert port.irq.levels == [1, 0]


def test_receive_below_trigger_identifies_timeout_then_data() -> None:
    port = Port()
    port.enable(IER.RX_DATA, fifo=FCR.ENABLE | 2 << 6)
    port.uart.receive(b"1234567")
    assert port.get(IIR_AT) == 0xC0 | IIR_TIMEOUT
    port.uart.receive(b"8")
    assert port.get(IIR_AT) == 0xC0 | IIR_RX_DATA


def test_receive_full_fifo_refuses_rest_and_reports_room_when_empty() -> None:
    port = Port()
    port.put(IIR_AT, FCR.ENABLE)
    assert port.uart.receive(b"nobody listens") == 0
    port.put(MCR_AT, MCR.RTS)
    assert port.rooms == 1
    data = bytes(range(FIFO_SIZE + 4))
    assert port.uart.receive(data) == FIFO_SIZE
    assert port.uart.room == 0
    assert bytes(port.get(DATA) for _ in range(FIFO_SIZE)) == data[:FIFO_SIZE]
    assert port.rooms == 2
    assert not port.get(LSR_AT) & LSR.OVERRUN


def test_loopback_returns_data_and_modem_lines() -> None:
    port = Port()
    port.put(MCR_AT, MCR.LOOP | MCR.RTS | MCR.OUT1)
    port.put(DATA, 0x77)
    assert port.get(DATA) == 0x77
    assert not port.sent
    assert port.get(MSR_AT) & 0xF0 == MSR.CTS | MSR.RI
    assert port.uart.room == 0


def test_loopback_overrun_is_reported_once() -> None:
    port = Port()
    port.put(MCR_AT, MCR.LOOP)
    port.put(DATA, 1)
    port.put(DATA, 2)
    assert port.get(LSR_AT) & LSR.OVERRUN
    assert not port.get(LSR_AT) & LSR.OVERRUN
    assert port.get(DATA) == 1


def test_line_status_interrupt_has_priority_and_modem_the_lowest() -> None:
    port = Port()
    port.enable(0x0F)
    port.get(IIR_AT)
    port.put(MCR_AT, MCR.OUT2 | MCR.LOOP)
    port.uart.receive_break()
    assert port.get(IIR_AT) == IIR_LINE
    assert port.get(LSR_AT) & LSR.BREAK
    assert port.get(IIR_AT) == IIR_RX_DATA
    port.get(DATA)
    assert port.get(IIR_AT) == IIR_MODEM
    assert port.get(MSR_AT) & 0x0F
    assert port.get(IIR_AT) == IIR_NONE


def test_interrupt_without_out2_stays_off_the_line() -> None:
    port = Port()
    port.put(IER_AT, IER.RX_DATA)
    port.put(MCR_AT, MCR.RTS)
    port.uart.receive(b"x")
    assert port.irq.levels == []
    port.put(MCR_AT, MCR.RTS | MCR.OUT2)
    assert port.irq.levels == [1]


def test_restore_saved_state_continues() -> None:
    port, other = Port(), Port()
    port.enable(IER.RX_DATA, fifo=FCR.ENABLE)
    port.uart.receive(b"abc")
    port.put(SCR_AT, 9)
    other.uart.restore(port.uart.save())
    assert bytes(other.get(DATA) for _ in range(3)) == b"abc"
    assert other.irq.levels == [1, 0]
    assert other.get(SCR_AT) == 9


@pytest.mark.parametrize(
    "change",
    [{"ier": 0x10}, {"rx": bytes(FIFO_SIZE + 1)}, {"rx": 3}, {"lcr": -1}, {"mcr": True}, {"extra": 0}],
)
def test_restore_impossible_state_raises_and_keeps_old(change: dict[str, object]) -> None:
    port = Port()
    port.put(SCR_AT, 0x5A)
    with pytest.raises(StateError, match="serial port"):
        port.uart.restore({**port.uart.save(), **change})
    assert port.get(SCR_AT) == 0x5A


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 255)), max_size=60), st.binary(max_size=20))
def test_any_register_traffic_stays_in_bounds(traffic: list[tuple[bool, int, int]], data: bytes) -> None:
    port = Port()
    for is_write, offset, value in traffic:
        if is_write:
            port.put(offset, value)
        else:
            assert 0 <= port.get(offset) <= 0xFF
        assert 0 <= port.uart.receive(data) <= FIFO_SIZE
    Port().uart.restore(port.uart.save())

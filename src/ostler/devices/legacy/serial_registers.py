"""Registers of the 16550A UART: National PC16550D data sheet, section 8."""

from __future__ import annotations

from ostler.registers import Register, bit, field


class IER(Register):
    """Interrupt enable, offset 1 with DLAB 0."""

    RX_DATA = bit(0)
    THR_EMPTY = bit(1)
    LINE_STATUS = bit(2)
    MODEM_STATUS = bit(3)


class IIR(Register):
    """Interrupt identification, offset 2, read."""

    NONE_PENDING = bit(0)
    SOURCE = field(1, 3)
    FIFOS = field(6, 2)


class FCR(Register):
    """FIFO control, offset 2, write."""

    ENABLE = bit(0)
    CLEAR_RX = bit(1)
    CLEAR_TX = bit(2)
    DMA_MODE = bit(3)
    TRIGGER = field(6, 2)


class LCR(Register):
    """Line control, offset 3."""

    FORMAT = field(0, 6)
    BREAK = bit(6)
    DLAB = bit(7)


class MCR(Register):
    """Modem control, offset 4. On a PC, OUT2 connects the interrupt output to its line."""

    DTR = bit(0)
    RTS = bit(1)
    OUT1 = bit(2)
    OUT2 = bit(3)
    LOOP = bit(4)


class LSR(Register):
    """Line status, offset 5."""

    DATA_READY = bit(0)
    OVERRUN = bit(1)
    PARITY = bit(2)
    FRAMING = bit(3)
    BREAK = bit(4)
    THR_EMPTY = bit(5)
    TX_IDLE = bit(6)
    FIFO_ERROR = bit(7)


class MSR(Register):
    """Modem status, offset 6; the low half says what changed since the last read."""

    DELTA_CTS = bit(0)
    DELTA_DSR = bit(1)
    TRAILING_RI = bit(2)
    DELTA_DCD = bit(3)
    CTS = bit(4)
    DSR = bit(5)
    RI = bit(6)
    DCD = bit(7)


IIR_NONE, IIR_MODEM, IIR_THR_EMPTY, IIR_RX_DATA, IIR_LINE, IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C

"""16550A UART, National PC16550D data sheet (register descriptions in section 8).

Transmission takes no time: a byte goes to the sink when it is written, and the transmitter is
empty again at once. Reception has the data sheet's 16-byte FIFO and stops taking bytes when it
is full, so that a guest that does not read loses nothing: whoever feeds it asks `room` and is
told by `on_room` when to go on. The four-character time-out of the FIFO fires at once.

Left out on purpose: baud rates and frame formats have no effect; DMA mode is stored only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
from ostler.devices.state import Saved, blob, load, save, uint
from ostler.devices.wiring import IrqLine

FIFO_SIZE = 16
PORT_COUNT = 8
TX_EMPTY = LSR.THR_EMPTY | LSR.TX_IDLE
LINE_ERRORS = LSR.OVERRUN | LSR.PARITY | LSR.FRAMING | LSR.BREAK
# A null modem: the other side is there and ready.
IDLE_MODEM = MSR.CTS | MSR.DSR | MSR.DCD
TRIGGER_LEVELS = (1, 4, 8, 14)


@dataclass(slots=True)
class SerialState:
    """Every register and the receive FIFO."""

    ier: int = uint(4)
    fcr: int = uint(8)
    lcr: int = uint(8, 0x03)
    mcr: int = uint(5)
    lsr: int = uint(8, TX_EMPTY)
    msr: int = uint(8, IDLE_MODEM)
    scr: int = uint(8)
    divisor: int = uint(16, 12)
    thr_pending: int = uint(1)
    rx: bytes = blob(FIFO_SIZE)


class Serial:
    """One UART of eight ports. Calls must be serialised by the owner."""

    def __init__(self, *, irq: IrqLine, sink: Callable[[int], None], on_room: Callable[[], None]) -> None:
        """`sink` takes each transmitted byte; `on_room` is told when reception can go on."""
        self._irq = irq
        self._sink = sink
        self._on_room = on_room
        self._state = SerialState()
        self._rx: deque[int] = deque()
        self._readers = (
            self._read_data, self._read_ier, self._read_iir, self._read_lcr,
            self._read_mcr, self._read_lsr, self._read_msr, self._read_scr,
        )  # fmt: skip
        self._writers = (
            self._write_data, self._write_ier, self._write_fcr, self._write_lcr,
            self._write_mcr, self._write_nothing, self._write_msr, self._write_scr,
        )  # fmt: skip

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002 - the bus makes it one byte
        return self._readers[offset]()

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        self._writers[offset](value & 0xFF)

    # -- the outside of the wire -----------------------------------------------------------

    @property
    def room(self) -> int:
        """How many bytes `receive` would take now.

        The other side waits for RTS, as hardware flow control has it: a driver that only probes the
        port clears the FIFO again and again, and what was typed ahead with it. In loopback the wire
        is cut.
        """
        if self._state.mcr & (MCR.LOOP | MCR.RTS) != MCR.RTS:
            return 0
        return max(self._depth - len(self._rx), 0)

    def receive(self, data: bytes) -> int:
        """Bytes from the other side; returns how many fitted."""
        taken = min(len(data), self.room)
        if taken:
            self._rx.extend(data[:taken])
            self._update()
        return taken

    def receive_break(self) -> None:
        """A break condition: a zero byte marked as such."""
        self._state.lsr |= LSR.BREAK
        self._push(0)

    # -- state ------------------------------------------------------------------------------

    def save(self) -> Saved:
        self._state.rx = bytes(self._rx)
        return save(self._state)

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing."""
        state = load(SerialState, "serial port", data)
        # Bits that follow from others are computed, never believed.
        state.lsr = state.lsr & LINE_ERRORS | TX_EMPTY
        self._state = state
        self._rx = deque(state.rx)
        self._update()

    # -- reads ------------------------------------------------------------------------------

    def _read_data(self) -> int:
        state = self._state
        if state.lcr & LCR.DLAB:
            return state.divisor & 0xFF
        if not self._rx:
            return 0
        byte = self._rx.popleft()
        self._update()
        if not self._rx:
            self._on_room()
        return byte

    def _read_ier(self) -> int:
        return self._state.divisor >> 8 if self._state.lcr & LCR.DLAB else self._state.ier

    def _read_iir(self) -> int:
        source = self._source()
        if source == IIR_THR_EMPTY:
            # Reading the identification is what acknowledges this one source.
            self._state.thr_pending = 0
            self._update()
        return source | (0xC0 if self._state.fcr & FCR.ENABLE else 0)

    def _read_lcr(self) -> int:
        return self._state.lcr

    def _read_mcr(self) -> int:
        return self._state.mcr

    def _read_lsr(self) -> int:
        state = self._state
        value = state.lsr | (LSR.DATA_READY if self._rx else 0)
        if value & LINE_ERRORS:
            state.lsr &= ~LINE_ERRORS
            self._update()
        return value

    def _read_msr(self) -> int:
        state = self._state
        value = state.msr if not state.mcr & MCR.LOOP else state.msr & 15 | self._looped_modem()
        if state.msr & 0x0F:
            state.msr &= 0xF0
            self._update()
        return value

    def _read_scr(self) -> int:
        return self._state.scr

    # -- writes -----------------------------------------------------------------------------

    def _write_data(self, value: int) -> None:
        state = self._state
        if state.lcr & LCR.DLAB:
            state.divisor = state.divisor & 0xFF00 | value
            return
        if state.mcr & MCR.LOOP:
            self._push(value)
        else:
            self._sink(value)
        state.thr_pending = 1
        if state.ier or self._irq.level:
            self._update()

    def _write_ier(self, value: int) -> None:
        state = self._state
        if state.lcr & LCR.DLAB:
            state.divisor = state.divisor & 0x00FF | value << 8
            return
        if value & IER.THR_EMPTY and not state.ier & IER.THR_EMPTY:
            # The transmitter is always empty, and enabling announces it.
            state.thr_pending = 1
        state.ier = value & IER.declared()
        self._update()

    def _write_fcr(self, value: int) -> None:
        state = self._state
        if (value ^ state.fcr) & FCR.ENABLE or value & FCR.CLEAR_RX:
            had_data = bool(self._rx)
            self._rx.clear()
            if had_data:
                self._on_room()
        state.fcr = value & ~(FCR.CLEAR_RX | FCR.CLEAR_TX) if value & FCR.ENABLE else 0
        self._update()

    def _write_lcr(self, value: int) -> None:
        self._state.lcr = value

    def _write_mcr(self, value: int) -> None:
        state = self._state
        before = self._looped_modem() if state.mcr & MCR.LOOP else state.msr & 0xF0
        had_room = self.room
        state.mcr = value & MCR.declared()
        after = self._looped_modem() if state.mcr & MCR.LOOP else state.msr & 0xF0
        changed = (before ^ after) >> 4
        # Ring indication reports its trailing edge alone.
        if not before & ~after & MSR.RI:
            changed &= ~MSR.TRAILING_RI
        state.msr |= changed
        self._update()
        if self.room and not had_room:
            self._on_room()

    def _write_msr(self, value: int) -> None:
        """Read-only on the wire side; the delta bits can be written for tests."""
        self._state.msr = self._state.msr & 0xF0 | value & 0x0F
        self._update()

    def _write_scr(self, value: int) -> None:
        self._state.scr = value

    def _write_nothing(self, value: int) -> None:
        """LSR: the data sheet keeps writes for factory tests."""

    # -- inside -----------------------------------------------------------------------------

    @property
    def _depth(self) -> int:
        return FIFO_SIZE if self._state.fcr & FCR.ENABLE else 1

    def _push(self, byte: int) -> None:
        if len(self._rx) >= self._depth:
            self._state.lsr |= LSR.OVERRUN
        else:
            self._rx.append(byte)
        self._update()

    def _looped_modem(self) -> int:
        """In loopback the four outputs are the four inputs."""
        mcr = self._state.mcr
        return (
            (MSR.CTS if mcr & MCR.RTS else 0)
            | (MSR.DSR if mcr & MCR.DTR else 0)
            | (MSR.RI if mcr & MCR.OUT1 else 0)
            | (MSR.DCD if mcr & MCR.OUT2 else 0)
        )

    def _source(self) -> int:
        """The pending interrupt of the highest priority, data sheet table IV."""
        state = self._state
        if state.ier & IER.LINE_STATUS and state.lsr & LINE_ERRORS:
            return IIR_LINE
        if state.ier & IER.RX_DATA and self._rx:
            if not state.fcr & FCR.ENABLE or len(self._rx) >= TRIGGER_LEVELS[FCR.TRIGGER.get(state.fcr)]:
                return IIR_RX_DATA
            return IIR_TIMEOUT
        if state.ier & IER.THR_EMPTY and state.thr_pending:
            return IIR_THR_EMPTY
        if state.ier & IER.MODEM_STATUS and state.msr & 0x0F:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        pending = self._source() != IIR_NONE and self._state.mcr & MCR.OUT2
        self._irq.set(1 if pending else 0)

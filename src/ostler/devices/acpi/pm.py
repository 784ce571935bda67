"""ACPI power-management registers: PM1a event and control block, PM timer.

ACPI 6.5 section 4.8.3. There is no SMI command port, so the hardware is in ACPI mode from the
start and SCI_EN always reads one. Soft-off is sleep type 0 as on QEMU's boards, so that small
programs that write 0x2000 to the control port power off here too; other sleep states are not
offered by the tables, and a request for one is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ostler.devices.state import Saved, load, save, uint
from ostler.devices.wiring import NS_PER_SECOND, Clock, IrqLine, PowerEvent, PowerSink, Timer
from ostler.registers import Register, bit, field

PM_BASE, PM_SIZE = 0x600, 0x0C
PM1_STATUS_OFFSET, PM1_ENABLE_OFFSET, PM1_CONTROL_OFFSET, PM_TIMER_OFFSET = 0x0, 0x2, 0x4, 0x8
SCI_GSI = 9
SLEEP_TYPE_S5 = 0
PM_TIMER_HZ = 3_579_545
# FADT's TMR_VAL_EXT promises 32 bits; the carry is the change of the highest.
TIMER_BITS = 32


class PM1Status(Register):
    """Written ones clear."""

    TIMER_CARRY = bit(0)
    BUS_MASTER = bit(4)
    GLOBAL_LOCK = bit(5)
    POWER_BUTTON = bit(8)
    SLEEP_BUTTON = bit(9)
    RTC_ALARM = bit(10)
    WAKE = bit(15)


class PM1Control(Register):
    """Sleep type and enable; SCI_EN is fixed."""

    SCI_ENABLE = bit(0)
    BUS_MASTER_RELOAD = bit(1)
    GLOBAL_RELEASE = bit(2)
    SLEEP_TYPE = field(10, 3)
    SLEEP_ENABLE = bit(13)


EVENTS = PM1Status.TIMER_CARRY | PM1Status.GLOBAL_LOCK | PM1Status.POWER_BUTTON | PM1Status.RTC_ALARM


@dataclass(slots=True)
class PowerManagementState:
    """The registers and the timer's count at the moment of saving."""

    status: int = uint(16)
    enable: int = uint(16)
    control: int = uint(16, PM1Control.SCI_ENABLE)
    ticks: int = uint(64)


class PowerManagement:
    """The block of twelve ports. Calls must be serialised by the owner."""

    def __init__(self, *, clock: Clock, timer: Timer, irq: IrqLine, power: PowerSink) -> None:
        self._clock = clock
        self._timer = timer
        self._irq = irq
        self._power = power
        self._state = PowerManagementState()
        self._start_ns = clock.monotonic_ns()
        self._carries_seen = 0
        self.refused_sleeps = 0

    def read(self, offset: int, size: int) -> int:
        if offset >= PM_TIMER_OFFSET:
            return (self._ticks() & ((1 << TIMER_BITS) - 1)) >> ((offset - PM_TIMER_OFFSET) * 8)
        self._note_carry()
        state = self._state
        block = state.status | state.enable << 16 | state.control << 32
        return block >> (offset * 8) & ((1 << size * 8) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= PM_TIMER_OFFSET:
            return
        self._note_carry()
        # A byte or a double word may touch parts of two registers; place it in the block.
        mask = ((1 << size * 8) - 1) << (offset * 8)
        placed = value << (offset * 8) & mask
        state = self._state
        state.status &= ~(placed & 0xFFFF)
        if mask >> 16 & 0xFFFF:
            enable = state.enable & ~(mask >> 16) | placed >> 16
            state.enable = enable & EVENTS
        if mask >> 32 & 0xFFFF:
            self._write_control(state.control & ~(mask >> 32) & 0xFFFF | placed >> 32 & 0xFFFF)
        self._update()

    def press_power_button(self) -> None:
        """Ask the guest to shut down."""
        self._state.status |= PM1Status.POWER_BUTTON
        self._update()

    def expired(self) -> None:
        """The timer's highest bit changed."""
        self._note_carry()
        self._update()

    def save(self) -> Saved:
        self._state.ticks = self._ticks()
        return save(self._state)

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing."""
        state = load(PowerManagementState, "ACPI power management", data)
        state.control = state.control & ~PM1Control.SLEEP_ENABLE | PM1Control.SCI_ENABLE
        state.enable &= EVENTS
        self._state = state
        self._start_ns = self._clock.monotonic_ns() - state.ticks * NS_PER_SECOND // PM_TIMER_HZ
        self._carries_seen = self._ticks() >> (TIMER_BITS - 1)
        self._update()

    def _write_control(self, value: int) -> None:
        if value & PM1Control.SLEEP_ENABLE:
            if PM1Control.SLEEP_TYPE.get(value) == SLEEP_TYPE_S5:
                self._power(PowerEvent.POWER_OFF)
            else:
                self.refused_sleeps += 1
        # The two triggers read as zero.
        kept = PM1Control.SLEEP_TYPE.mask | PM1Control.BUS_MASTER_RELOAD
        self._state.control = value & kept | PM1Control.SCI_ENABLE

    def _ticks(self) -> int:
        return (self._clock.monotonic_ns() - self._start_ns) * PM_TIMER_HZ // NS_PER_SECOND

    def _note_carry(self) -> None:
        carries = self._ticks() >> (TIMER_BITS - 1)
        if carries != self._carries_seen:
            self._carries_seen = carries
            self._state.status |= PM1Status.TIMER_CARRY

    def _update(self) -> None:
        state = self._state
        self._irq.set(1 if state.status & state.enable else 0)
        if state.enable & PM1Status.TIMER_CARRY and not state.status & PM1Status.TIMER_CARRY:
            next_tick = ((self._ticks() >> (TIMER_BITS - 1)) + 1) << (TIMER_BITS - 1)
            # Rounded up: waking one tick early would find no carry and arm again at once.
            self._timer.arm(self._start_ns - (-next_tick * NS_PER_SECOND // PM_TIMER_HZ))
        else:
            self._timer.disarm()

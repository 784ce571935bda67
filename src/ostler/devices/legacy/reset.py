"""The PC's ways to reset: keyboard controller, port 0x92, port 0xCF9; and the POST port.

The keyboard controller exists for its reset line alone: it has no keyboard, says so by an
empty output buffer, and counts every other command. Intel 8042; PIIX3 data sheet for 0xCF9.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ostler.devices.state import Saved, load, save, uint
from ostler.devices.wiring import PowerEvent, PowerSink
from ostler.registers import Register, bit

RESET_PORT = 0xCF9
KBD_DATA_OFFSET, KBD_COMMAND_OFFSET = 0, 4
KBD_PULSE_RESET = 0xFE
KBD_WRITE_OUTPUT_PORT = 0xD1
KBD_STATUS_SYSTEM_FLAG = 0x04


class Port92(Register):
    """System control port A."""

    FAST_RESET = bit(0)
    A20 = bit(1)


class ResetControl(Register):
    """Port 0xCF9."""

    HARD = bit(1)
    RESET = bit(2)
    FULL = bit(3)


@dataclass(slots=True)
class LatchState:
    """These devices remember one byte each."""

    value: int = uint(8)


class KeyboardReset:
    """Ports 0x60 to 0x64 of a controller without a keyboard."""

    def __init__(self, power: PowerSink) -> None:
        self._power = power
        self._expects_output_port = False
        self.ignored_commands: Counter[int] = Counter()

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002 - one byte by the bus
        return KBD_STATUS_SYSTEM_FLAG if offset == KBD_COMMAND_OFFSET else 0

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        if offset == KBD_COMMAND_OFFSET:
            self._expects_output_port = value == KBD_WRITE_OUTPUT_PORT
            # Pulsing any combination of output bits that includes bit 0 resets.
            if value & 0xF1 == 0xF0:
                self._power(PowerEvent.RESET)
            elif not self._expects_output_port:
                self.ignored_commands[value] += 1
        elif offset == KBD_DATA_OFFSET and self._expects_output_port:
            self._expects_output_port = False
            if not value & 1:
                self._power(PowerEvent.RESET)

    def save(self) -> Saved:
        return save(LatchState(int(self._expects_output_port)))

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing."""
        self._expects_output_port = bool(load(LatchState, "keyboard controller", data).value)


class SystemControl:
    """Port 0x92: A20 (always open) and the fast reset, on its rising edge."""

    def __init__(self, power: PowerSink) -> None:
        self._power = power
        self._value = int(Port92.A20)

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        rising = value & ~self._value & Port92.FAST_RESET
        self._value = value & Port92.declared()
        if rising:
            self._power(PowerEvent.RESET)

    def save(self) -> Saved:
        return save(LatchState(self._value))

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing."""
        self._value = load(LatchState, "system control port", data).value & Port92.declared()


class ResetPort:
    """Port 0xCF9: a reset on the rising edge of its bit; also the ACPI reset register.

    The port lies inside the PCI address register at 0xCF8, whose owner (`devices/pci/host.py`) passes
    single bytes on and nothing wider.
    """

    def __init__(self, power: PowerSink) -> None:
        self._power = power
        self._value = 0

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        rising = value & ~self._value & ResetControl.RESET
        self._value = value & (ResetControl.HARD | ResetControl.FULL)
        if rising:
            self._power(PowerEvent.RESET)

    def save(self) -> Saved:
        return save(LatchState(self._value))

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing."""
        self._value = load(LatchState, "reset control port", data).value & (ResetControl.HARD | ResetControl.FULL)


class Scratch:
    """Ports that are written for their delay or for a display nobody looks at (0x80, 0xED).

    Explicitly ignored, so that they are not among the unclaimed; reads give the last value.
    """

    def __init__(self) -> None:
        self.last = 0

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        return self.last

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        self.last = value & 0xFF

    def save(self) -> Saved:
        return save(LatchState(self.last))

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing."""
        self.last = load(LatchState, "scratch port", data).value

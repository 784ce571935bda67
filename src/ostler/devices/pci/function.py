"""One PCI endpoint: configuration space, memory windows, MSI-X and INTA, put together.

What sits behind it (a virtio transport) hands in bus devices for its base address registers and is told
when the guest switches memory decoding or bus mastering, or moves a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ostler.bus import BusDevice
from ostler.devices.pci.config import (
    BAR0,
    BAR_64_BIT,
    BAR_FLAGS,
    COMMAND,
    CONFIG_SIZE,
    INTERRUPT_LINE,
    STATUS,
    Command,
    ConfigSpace,
    ConfigStatus,
    Identity,
)
from ostler.devices.pci.msix import CAPABILITY_ID, ENTRY_SIZE, MAX_VECTORS, Msix
from ostler.devices.state import Saved, blob, load, save

MSIX_CONTROL = 2


@dataclass(frozen=True, slots=True)
class Bar:
    """A window into memory space and what is behind it."""

    index: int
    size_bytes: int
    device: BusDevice
    is_64_bit: bool = False
    prefetchable: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """Where a BAR is decoded now."""

    bar: Bar
    address: int


@dataclass(slots=True)
class FunctionState:
    """What a guest can change of a function."""

    config: bytes = blob(CONFIG_SIZE)
    msix_table: bytes = blob(MAX_VECTORS * ENTRY_SIZE)
    msix_pending: bytes = blob(MAX_VECTORS // 8)


class PciFunction:
    """An endpoint. `config_read` and `config_write` are the host bridge's; offsets below 4096."""

    def __init__(
        self,
        identity: Identity,
        *,
        bars: tuple[Bar, ...],
        msix: Msix,
        msix_bar: int,
        intx: Callable[[int], None],
    ) -> None:
        """`intx(level)` drives INTA."""
        self.bars = bars
        self.msix = msix
        self.config = ConfigSpace(identity, interrupt_pin=1)
        for bar in bars:
            self.config.add_memory_bar(
                bar.index, bar.size_bytes, is_64_bit=bar.is_64_bit, prefetchable=bar.prefetchable
            )
        self._msix_at = self.config.add_capability(CAPABILITY_ID, msix.capability(msix_bar))
        self.config.allow(self._msix_at + MSIX_CONTROL, 2, 0xC000)
        self.changed: Callable[[], None] = _nobody
        """Told when decoding, mastering or a window's place changed; the bridge's."""
        self.moved: Callable[[], None] = _nobody
        """Told when the bridge has followed a change of this or another function."""
        self.is_decoded: Callable[[int], bool] = _nowhere
        """Whether the bridge decodes a window that begins at the address."""
        self._intx = intx
        self._intx_asserted = False
        self._decoding = self._decoded()

    # -- configuration ----------------------------------------------------------------------------

    def config_read(self, offset: int, size: int) -> int:
        return self.config.read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.config.write(offset, size, value)
        if offset < self._msix_at + 4 and offset + size > COMMAND:
            self._follow()

    def _follow(self) -> None:
        """Act on registers that do something."""
        self.msix.control(self.config.get(self._msix_at + MSIX_CONTROL, 2), may_send=self.is_master)
        self._drive_intx()
        decoding = self._decoded()
        if decoding != self._decoding:
            self._decoding = decoding
            self.changed()

    @property
    def command(self) -> int:
        """The command register."""
        return self.config.get(COMMAND, 2)

    @property
    def is_master(self) -> bool:
        """Whether the function may access guest memory."""
        return bool(self.command & Command.MASTER)

    def windows(self) -> list[Window]:
        """Every BAR where it is decoded now; none while memory decoding is off."""
        if not self.command & Command.MEMORY:
            return []
        return [Window(bar, self.bar_address(bar)) for bar in self.bars]

    def bar_address(self, bar: Bar) -> int:
        """What the register says, decoded or not."""
        return self.config.get(BAR0 + 4 * bar.index, 8 if bar.is_64_bit else 4) & ~BAR_FLAGS

    def place_bar(self, bar: Bar, address: int) -> None:
        """Firmware's work: give the window an address."""
        flags = self.config.get(BAR0 + 4 * bar.index, 4) & BAR_FLAGS
        self.config.put(BAR0 + 4 * bar.index, 8 if flags & BAR_64_BIT else 4, address | flags)

    def set_interrupt_line(self, gsi: int) -> None:
        """Firmware's work: note which input INTA reaches."""
        self.config.put(INTERRUPT_LINE, 1, gsi)

    def _decoded(self) -> tuple[Any, ...]:
        return (self.command & (Command.MEMORY | Command.MASTER), *map(self.bar_address, self.bars))

    # -- interrupts -------------------------------------------------------------------------------

    def set_intx(self, *, asserted: bool) -> None:
        """The function's own interrupt condition; the wire also depends on the command register."""
        self._intx_asserted = asserted
        self._drive_intx()

    def _drive_intx(self) -> None:
        status = self.config.get(STATUS, 2) & ~ConfigStatus.INTERRUPT
        pending = self._intx_asserted and not self.msix.enabled
        self.config.put(STATUS, 2, status | (ConfigStatus.INTERRUPT if pending else 0))
        self._intx(1 if pending and not self.command & Command.INTX_DISABLE else 0)

    # -- state ------------------------------------------------------------------------------------

    def save(self) -> Saved:
        table, pending = self.msix.save()
        return save(FunctionState(bytes(self.config.data), table, pending))

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError. What sits behind the function is restored first."""
        state = load(FunctionState, "PCI function", data)
        self.msix.restore(state.msix_table, state.msix_pending)
        self.config.restore(state.config)
        self._follow()


def _nobody() -> None:
    """Nothing depends on where this function is decoded."""


def _nowhere(address: int) -> bool:  # noqa: ARG001
    """A function that is not plugged in."""
    return False

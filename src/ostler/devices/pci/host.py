"""The host bridge: one root bus, its configuration space by ECAM and by ports, and its windows.

PCI Express Base 7.2.2 (ECAM: bus, device, function and register are bits of the address) and PCI Local
Bus 3.0 section 3.2.2.3.2 (ports 0xCF8 and 0xCFC). All functions are number 0 of a device on bus 0.

A guest may put windows anywhere. They are decoded only inside the ranges the bridge forwards, and where two
overlap the lower device number wins: nothing a guest writes there can cover another device of the board.

Port 0xCF9, one byte inside the address register, is the reset port; only double words reach the register.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ostler.bus import BusDevice, MmioBus
from ostler.devices.pci.config import ConfigSpace, Identity
from ostler.devices.pci.function import Bar, PciFunction
from ostler.devices.state import Saved, load, save, uint

MAX_DEVICES = 32
BUS_CONFIG_SIZE = 1 << 20
ADDRESS_PORT, PORT_COUNT, DATA_OFFSET, RESET_OFFSET = 0xCF8, 8, 4, 1
ADDRESS_ENABLE = 1 << 31
BAR_ALIGN = 0x1000
RED_HAT, GENERIC_HOST_BRIDGE, CLASS_HOST_BRIDGE = 0x1B36, 0x0008, 0x06_0000


@dataclass(frozen=True, slots=True)
class PciRange:
    """Addresses the bridge forwards."""

    start: int
    size_bytes: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.size_bytes


@dataclass(slots=True)
class BridgeState:
    """The address register is all the bridge remembers."""

    address: int = uint(32)


class HostBridge:
    """Root bus 0. Owns the claims of every window; calls are serialised by the board's lock."""

    def __init__(self, mmio: MmioBus, *, low: PciRange, high: PciRange) -> None:
        """`low` is the range below 4 GiB, `high` the one above."""
        self._mmio = mmio
        self.low, self.high = low, high
        self._next_low, self._next_high = low.start, high.start
        self._self = ConfigSpace(Identity(RED_HAT, GENERIC_HOST_BRIDGE, CLASS_HOST_BRIDGE))
        self.functions: dict[int, PciFunction] = {}
        self._claimed: list[int] = []
        self.overlaps = 0
        """Windows that were not decoded because another one is there."""

    def free_slot(self) -> int:
        """The next device number. Raises ValueError when the bus is full."""
        slot = len(self.functions) + 1
        if slot >= MAX_DEVICES:
            raise ValueError(f"PCI bus: more than {MAX_DEVICES - 1} devices")
        return slot

    def add(self, slot: int, function: PciFunction, *, gsi: int) -> None:
        """Plug a function in and do firmware's work: addresses for its windows, the number of its line."""
        self.functions[slot] = function
        for bar in function.bars:
            function.place_bar(bar, self._allot(bar))
        function.set_interrupt_line(gsi)
        function.is_decoded = self.is_decoded
        function.changed = self._follow

    def _follow(self) -> None:
        self.remap()
        for function in self.functions.values():
            function.moved()

    def _allot(self, bar: Bar) -> int:
        align = max(bar.size_bytes, BAR_ALIGN)
        if bar.is_64_bit:
            address = -(-self._next_high // align) * align
            self._next_high = address + bar.size_bytes
            return address
        address = -(-self._next_low // align) * align
        self._next_low = address + bar.size_bytes
        if self._next_low > self.low.end:
            raise ValueError(f"PCI bus: no room for a window of {bar.size_bytes} bytes below 4 GiB")
        return address

    def remap(self) -> None:
        """Decode every window where its register says, after one changed."""
        for start in self._claimed:
            self._mmio.release(start)
        self._claimed.clear()
        self.overlaps = 0
        for slot, function in sorted(self.functions.items()):
            for window in function.windows():
                start, end = window.address, window.address + window.bar.size_bytes
                if not any(each.start <= start and end <= each.end for each in (self.low, self.high)):
                    continue
                if not self._mmio.is_free(start, end - start):
                    self.overlaps += 1
                    continue
                self._mmio.claim(f"PCI {slot:02x}.0 BAR {window.bar.index}", start, end - start, window.bar.device)
                self._claimed.append(start)

    def is_decoded(self, address: int) -> bool:
        """Whether a window begins at `address` now."""
        return address in self._claimed

    # -- configuration accesses -------------------------------------------------------------------

    def config_read(self, slot: int, function: int, offset: int, size: int) -> int:
        """All ones where there is no function."""
        if slot == 0 and function == 0:
            return self._self.read(offset, size)
        found = self.functions.get(slot) if function == 0 else None
        return (1 << size * 8) - 1 if found is None else found.config_read(offset, size)

    def config_write(self, slot: int, function: int, offset: int, size: int, value: int) -> None:
        """Into nothing where there is no function."""
        if slot == 0 and function == 0:
            self._self.write(offset, size, value)
            return
        found = self.functions.get(slot) if function == 0 else None
        if found is not None:
            found.config_write(offset, size, value)


class Ecam:
    """Bus 0's configuration space in memory: device in bits 15-19, function in 12-14, register below."""

    def __init__(self, bridge: HostBridge) -> None:
        self._bridge = bridge

    def read(self, offset: int, size: int) -> int:
        return self._bridge.config_read(offset >> 15, offset >> 12 & 7, offset & 0xFFF, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._bridge.config_write(offset >> 15, offset >> 12 & 7, offset & 0xFFF, size, value)


class ConfigPorts:
    """Ports 0xCF8 to 0xCFF: address, data, and the reset port in between."""

    def __init__(self, bridge: HostBridge, reset: BusDevice) -> None:
        self._bridge = bridge
        self._reset = reset
        self._state = BridgeState()

    def read(self, offset: int, size: int) -> int:
        if offset >= DATA_OFFSET:
            target = self._target(offset)
            return (1 << size * 8) - 1 if target is None else self._bridge.config_read(*target, size)
        if (offset, size) == (0, 4):
            return self._state.address
        if (offset, size) == (RESET_OFFSET, 1):
            return self._reset.read(0, 1)
        return (1 << size * 8) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= DATA_OFFSET:
            target = self._target(offset)
            if target is not None:
                self._bridge.config_write(*target, size, value)
        elif (offset, size) == (0, 4):
            # Reserved bits and the two lowest ones do not exist.
            self._state.address = value & 0x80FF_FFFC
        elif (offset, size) == (RESET_OFFSET, 1):
            self._reset.write(0, 1, value)

    def _target(self, offset: int) -> tuple[int, int, int] | None:
        """Device, function and register that the data port stands for; None for another bus."""
        address = self._state.address
        if not address & ADDRESS_ENABLE or address >> 16 & 0xFF:
            return None
        return address >> 11 & 0x1F, address >> 8 & 7, (address & 0xFC) + offset - DATA_OFFSET

    def save(self) -> Saved:
        return save(self._state)

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing."""
        state = load(BridgeState, "PCI address register", data)
        state.address &= 0x80FF_FFFC
        self._state = state

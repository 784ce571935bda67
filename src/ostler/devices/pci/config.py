"""Configuration space of one PCI function, PCI Local Bus 3.0 chapter 6; PCI Express Base 7.5.1.

Every byte carries a mask of the bits a guest may write, so that read-only registers, base address
sizing and capabilities need no code of their own. A header of type 0: an endpoint, not a bridge.

Left out on purpose: expansion ROMs, port-space base addresses, and extended configuration space, which
reads as zeros, as the specification has it for a function without extended capabilities.
"""

from __future__ import annotations

from dataclasses import dataclass

from ostler.registers import Register, bit

HEADER_SIZE = 0x40
CONFIG_SIZE = 0x100
EXTENDED_SIZE = 0x1000
BAR_COUNT = 6

VENDOR, DEVICE, COMMAND, STATUS, REVISION, CLASS_CODE = 0x00, 0x02, 0x04, 0x06, 0x08, 0x09
BAR0, SUBSYSTEM_VENDOR, SUBSYSTEM, CAPABILITIES = 0x10, 0x2C, 0x2E, 0x34
INTERRUPT_LINE, INTERRUPT_PIN = 0x3C, 0x3D

BAR_64_BIT, BAR_PREFETCHABLE = 1 << 2, 1 << 3
BAR_FLAGS = 0xF


class Command(Register):
    """Command register, 6.2.2."""

    IO = bit(0)
    MEMORY = bit(1)
    MASTER = bit(2)
    PARITY = bit(6)
    SERR = bit(8)
    INTX_DISABLE = bit(10)


class ConfigStatus(Register):
    """Status register, 6.2.3."""

    INTERRUPT = bit(3)
    CAPABILITY_LIST = bit(4)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a driver recognises a function by."""

    vendor: int
    device: int
    class_code: int
    """Base class, sub-class and programming interface in 24 bits."""
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


class ConfigSpace:
    """The bytes, their masks, and the list of capabilities."""

    def __init__(self, identity: Identity, *, interrupt_pin: int = 0) -> None:
        """`interrupt_pin` is 0 for none, 1 for INTA."""
        self.data = bytearray(CONFIG_SIZE)
        self.writable = bytearray(CONFIG_SIZE)
        self._next_capability = HEADER_SIZE
        self._last_link = CAPABILITIES
        self.put(VENDOR, 2, identity.vendor)
        self.put(DEVICE, 2, identity.device)
        self.put(REVISION, 1, identity.revision)
        self.put(CLASS_CODE, 3, identity.class_code)
        self.put(SUBSYSTEM_VENDOR, 2, identity.subsystem_vendor)
        self.put(SUBSYSTEM, 2, identity.subsystem)
        self.put(INTERRUPT_PIN, 1, interrupt_pin)
        self.allow(COMMAND, 2, Command.MEMORY | Command.MASTER | Command.SERR | Command.PARITY | Command.INTX_DISABLE)
        self.allow(INTERRUPT_LINE, 1, 0xFF)

    def add_capability(self, kind: int, body: bytes) -> int:
        """Append a capability; `body` follows its two-byte header. Returns its offset."""
        at, size = self._next_capability, 2 + len(body)
        if at + size > CONFIG_SIZE:
            raise ValueError(f"capability {kind:#x} of {size} bytes: no room in configuration space")
        self.data[at] = kind
        self.data[at + 2 : at + size] = body
        self.data[self._last_link] = at
        self._last_link = at + 1
        self._next_capability = at + -(-size // 4) * 4
        self.put(STATUS, 2, self.get(STATUS, 2) | ConfigStatus.CAPABILITY_LIST)
        return at

    def add_memory_bar(self, index: int, size_bytes: int, *, is_64_bit: bool, prefetchable: bool = False) -> None:
        """A base address register; what can be written of it tells its size."""
        if size_bytes < 16 or size_bytes & (size_bytes - 1):
            raise ValueError(f"BAR {index} of {size_bytes} bytes: expected a power of two from 16 on")
        at = BAR0 + 4 * index
        self.put(at, 4, (BAR_64_BIT if is_64_bit else 0) | (BAR_PREFETCHABLE if prefetchable else 0))
        width = 8 if is_64_bit else 4
        self.allow(at, width, -size_bytes & ((1 << width * 8) - 1))

    def get(self, offset: int, size: int) -> int:
        """The register as it is."""
        return int.from_bytes(self.data[offset : offset + size], "little")

    def put(self, offset: int, size: int, value: int) -> None:
        """Set a register from the device's side, whatever its mask."""
        self.data[offset : offset + size] = value.to_bytes(size, "little")

    def allow(self, offset: int, size: int, mask: int) -> None:
        """Say which bits of a register a guest may write."""
        self.writable[offset : offset + size] = mask.to_bytes(size, "little")

    def read(self, offset: int, size: int) -> int:
        """What a guest reads; zero in extended space."""
        return self.get(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write: only bits it may write change."""
        for at in range(offset, min(offset + size, CONFIG_SIZE)):
            mask = self.writable[at]
            if mask:
                self.data[at] = self.data[at] & ~mask | value & mask
            value >>= 8

    def restore(self, data: bytes) -> None:
        """Take from saved bytes what a guest could have written; the rest is this function's own."""
        self.write(0, CONFIG_SIZE, int.from_bytes(data[:CONFIG_SIZE], "little"))

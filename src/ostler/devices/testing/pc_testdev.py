"""The ports and the memory that kvm-unit-tests expect of QEMU's pc-testdev.

0xE0..0xE3      an echo register of four bytes, addressable in pieces
0xE4..0xE7      "flush the page of this address": nothing to do, the write itself is the test
0xE8..0xEB      the same echo register, one byte at a time
0x2000..0x2017  each port drives the interrupt line of that number
0xFF00_0000     64 KiB of memory that is reached by exits only
"""

from __future__ import annotations

from collections.abc import Callable

ECHO_PORT, ECHO_SIZE = 0xE0, 4
FLUSH_PORT, FLUSH_SIZE = 0xE4, 4
ECHO_BYTES_PORT = 0xE8
IRQ_PORT, IRQ_LINES = 0x2000, 24
MEMORY_SIZE = 0x1_0000


class EchoPort:
    """Keeps what was written; pieces of it can be read and written."""

    def __init__(self) -> None:
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        return self._value >> (offset * 8) & ((1 << size * 8) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        mask = ((1 << size * 8) - 1) << (offset * 8)
        self._value = self._value & ~mask & 0xFFFF_FFFF | value << (offset * 8) & mask


class FlushPort:
    """Tells the injected hook the physical address a program wants re-mapped."""

    def __init__(self, flush: Callable[[int], None]) -> None:
        self._flush = flush

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        return 0

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        self._flush(value)


class IrqPorts:
    """Port n drives line n: non-zero raises it."""

    def __init__(self, drive: Callable[[int, int], None]) -> None:
        """`drive(gsi, level)` sets a line."""
        self._drive = drive

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        return 0

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        self._drive(offset, 1 if value else 0)


class ExitMemory:
    """Memory behind exits, for the accelerator's MMIO emulation."""

    def __init__(self) -> None:
        self._bytes = bytearray(MEMORY_SIZE)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self._bytes[offset : offset + size] = value.to_bytes(size, "little")

"""A virtio driver that goes through a board: configuration space, BARs, MSI-X, rings. For tests of the whole stack."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ostler.abi.virtio import pci as abi
from ostler.abi.virtio.common import Status
from ostler.bus import MmioBus
from ostler.devices.pci.config import BAR0, COMMAND, Command
from ostler.devices.virtio.pci_function import COMMON, DEVICE_CONFIG, ISR, NOTIFY, NOTIFY_MULTIPLIER
from ostler.memory import GuestMemory
from ostler.memory.layout import PCI_ECAM_BASE
from ostler.testing.virtio import Arena, DriverQueue, Sent

MESSAGE_ADDRESS = 0xFEE0_0000
MSIX_CAPABILITY = 0x40


class PciDriver:
    """Finds a function by its slot and sets it up as Linux does."""

    def __init__(self, mmio: MmioBus, memory: GuestMemory, slot: int, *, base: int = 0x10_0000) -> None:
        """Rings and buffers go to a mebibyte of guest memory at `base`."""
        self._mmio, self._memory = mmio, memory
        self._config = PCI_ECAM_BASE + (slot << 15)
        self._base = base
        self.queues: list[DriverQueue] = []
        self.bar = self.config(BAR0, 8) & ~0xF

    # -- registers --------------------------------------------------------------------------------

    def config(self, offset: int, size: int, value: int | None = None) -> int:
        """Read a register of configuration space, or write it."""
        if value is None:
            return self._mmio.read(self._config + offset, size)
        self._mmio.write(self._config + offset, size, value)
        return value

    def common(self, offset: int, size: int, value: int | None = None) -> int:
        """Read a register of the common configuration structure, or write it."""
        if value is None:
            return self._mmio.read(self.bar + COMMON + offset, size)
        self._mmio.write(self.bar + COMMON + offset, size, value)
        return value

    def device_config(self, offset: int, size: int) -> int:
        """Read device-specific configuration."""
        return self._mmio.read(self.bar + DEVICE_CONFIG + offset, size)

    def isr(self) -> int:
        """Read and clear the interrupt status."""
        return self._mmio.read(self.bar + ISR, 1)

    @property
    def status(self) -> int:
        """Device status."""
        return self.common(abi.COMMON_STATUS, 1)

    # -- setting up -------------------------------------------------------------------------------

    def enable(self) -> None:
        """Memory decoding and bus mastering."""
        self.config(COMMAND, 2, Command.MEMORY | Command.MASTER)

    def enable_msix(self) -> None:
        """A message of its own for each vector: data is the vector's number."""
        table = self.config(BAR0 + 8, 4) & ~0xF
        for vector in range((self.config(MSIX_CAPABILITY + 2, 2) & 0x7FF) + 1):
            for at, value in ((0, MESSAGE_ADDRESS), (4, 0), (8, vector), (12, 0)):
                self._mmio.write(table + 16 * vector + at, 4, value)
        self.config(MSIX_CAPABILITY + 2, 2, 0x8000)

    def offered(self) -> int:
        """All feature bits on offer."""
        low, high = (self._select(abi.COMMON_DFSELECT, abi.COMMON_DF, half) for half in (0, 1))
        return high << 32 | low

    def _select(self, select: int, register: int, half: int) -> int:
        self.common(select, 4, half)
        return self.common(register, 4)

    def negotiate(self, features: int) -> int:
        """Reset, take features, try FEATURES_OK; returns the status then."""
        self.common(abi.COMMON_STATUS, 1, 0)
        self.common(abi.COMMON_STATUS, 1, Status.ACKNOWLEDGE | Status.DRIVER)
        for half in (0, 1):
            self.common(abi.COMMON_GFSELECT, 4, half)
            self.common(abi.COMMON_GF, 4, features >> 32 * half & 0xFFFF_FFFF)
        self.common(abi.COMMON_STATUS, 1, Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        return self.status

    def start(self, *, features: int | None = None, queue_size: int = 16, msix: bool = True) -> None:
        """Everything up to DRIVER_OK."""
        self.enable()
        if msix:
            self.enable_msix()
        self.negotiate(self.offered() if features is None else features)
        count = self.common(abi.COMMON_NUMQ, 2)
        arena = Arena(self._base + 0x2000 * count, self._base + 0x10_0000)
        self.queues = [
            DriverQueue(self._memory, self._base + 0x2000 * number, queue_size, arena) for number in range(count)
        ]
        self.common(abi.COMMON_MSIX, 2, 0)
        for number, queue in enumerate(self.queues):
            self._place(number, queue)
        self.common(abi.COMMON_STATUS, 1, self.status | Status.DRIVER_OK)

    def _place(self, number: int, queue: DriverQueue) -> None:
        self.common(abi.COMMON_Q_SELECT, 2, number)
        self.common(abi.COMMON_Q_SIZE, 2, queue.size)
        self.common(abi.COMMON_Q_MSIX, 2, number + 1)
        for register, address in (
            (abi.COMMON_Q_DESCLO, queue.table), (abi.COMMON_Q_AVAILLO, queue.avail), (abi.COMMON_Q_USEDLO, queue.used),
        ):  # fmt: skip
            low, high = struct.unpack("<II", address.to_bytes(8, "little"))
            self.common(register, 4, low)
            self.common(register + 4, 4, high)
        self.common(abi.COMMON_Q_ENABLE, 2, 1)

    # -- working ----------------------------------------------------------------------------------

    def kick(self, number: int) -> None:
        """Notify by an exit."""
        self._mmio.write(self.bar + NOTIFY + NOTIFY_MULTIPLIER * number, 2, number)

    def send(self, number: int, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> Sent:
        """Make a chain available and notify."""
        sent = self.queues[number].add(readable, writable)
        self.kick(number)
        return sent

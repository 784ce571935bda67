"""The PCI function of a virtio device: its identity, virtio's capabilities, the layout of BAR 0. Section 4.1.4."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

from ostler.abi.virtio import pci as abi
from ostler.abi.virtio.common import DeviceId
from ostler.devices.pci.config import Identity
from ostler.devices.pci.function import Bar, PciFunction
from ostler.devices.pci.msix import Msix

COMMON, ISR, DEVICE_CONFIG, NOTIFY, BAR_SIZE = 0x0000, 0x1000, 0x2000, 0x3000, 0x4000
PAGE = 0x1000
NOTIFY_MULTIPLIER = 4
VIRTIO_BAR, MSIX_BAR = 0, 2
# Base class and sub-class a generic driver may go by, PCI Code and ID Assignment.
CLASS_CODES = {
    DeviceId.NET: 0x02_0000,
    DeviceId.BLOCK: 0x01_0000,
    DeviceId.CONSOLE: 0x07_8000,
    DeviceId.FS: 0x01_8000,
}
CLASS_OTHER = 0xFF_0000


class Window(Protocol):
    """The transport's registers, as BAR 0 has them."""

    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...


class VirtioFunction(PciFunction):
    """The function with virtio's capabilities, and its window into BAR 0 through configuration space."""

    def __init__(
        self, transport: Window, identity: Identity, bars: tuple[Bar, ...], msix: Msix, intx: Callable[[int], None]
    ) -> None:
        super().__init__(identity, bars=bars, msix=msix, msix_bar=MSIX_BAR, intx=intx)
        self._transport = transport
        self._add(abi.VIRTIO_PCI_CAP_COMMON_CFG, COMMON)
        self._add(abi.VIRTIO_PCI_CAP_NOTIFY_CFG, NOTIFY, struct.pack("<I", NOTIFY_MULTIPLIER))
        self._add(abi.VIRTIO_PCI_CAP_ISR_CFG, ISR)
        self._add(abi.VIRTIO_PCI_CAP_DEVICE_CFG, DEVICE_CONFIG)
        self._access = self._add(abi.VIRTIO_PCI_CAP_PCI_CFG, 0, bytes(4), length=0)
        self.config.allow(self._access + 4, 1, 0xFF)
        self.config.allow(self._access + 8, 8, (1 << 64) - 1)

    def _add(self, kind: int, offset: int, more: bytes = b"", *, length: int = PAGE) -> int:
        body = struct.pack("<BBB3xII", 16 + len(more), kind, VIRTIO_BAR, offset, length) + more
        return self.config.add_capability(abi.CAP_VENDOR, body)

    @property
    def _data(self) -> int:
        return self._access + 16

    def config_read(self, offset: int, size: int) -> int:
        if self._data <= offset < self._data + 4:
            target = self._target()
            if target is not None:
                return self._transport.read(*target)
        return super().config_read(offset, size)

    def config_write(self, offset: int, size: int, value: int) -> None:
        super().config_write(offset, size, value)
        if self._data <= offset < self._data + 4:
            target = self._target()
            if target is not None:
                at, width = target
                self._transport.write(at, width, value & ((1 << 8 * width) - 1))

    def _target(self) -> tuple[int, int] | None:
        """Offset and width the driver chose, section 4.1.4.9; None for what the structure does not allow."""
        bar = self.config.get(self._access + 4, 1)
        at, width = self.config.get(self._access + 8, 4), self.config.get(self._access + 12, 4)
        if bar != VIRTIO_BAR or width not in (1, 2, 4) or at % width or at + width > BAR_SIZE:
            return None
        return at, width


def identity_of(device_type: int) -> Identity:
    # Revision 1 and up says that there is no legacy interface.
    device = abi.MODERN_DEVICE_BASE + device_type
    return Identity(
        abi.VENDOR_REDHAT_QUMRANET, device, CLASS_CODES.get(DeviceId(device_type), CLASS_OTHER), 1,
        abi.VENDOR_REDHAT_QUMRANET, device,
    )  # fmt: skip

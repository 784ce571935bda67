"""The modern PCI transport, virtio 1.2 section 4.1: registers of `VirtioCore` behind a PCI function.

BAR 0 (64 bits wide) holds the four structures, a page each, and BAR 2 the MSI-X table:

    0x0000 common configuration   0x2000 device configuration
    0x1000 interrupt status       0x3000 notifications, four bytes for each queue

A write to a notification address rings a doorbell, which the machine makes an ioeventfd of: the guest then
does not leave its processor for it. A kick is served only while the function may master the bus; one
that came too early is made up for when mastering is switched on.

Left out on purpose: the transitional interface, shared-memory regions, VIRTIO_F_NOTIFICATION_DATA.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from ostler.abi.virtio import pci as abi
from ostler.devices.pci.function import Bar
from ostler.devices.pci.msix import Msix
from ostler.devices.state import Saved, blob, load, save, uint
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.pci_function import (
    BAR_SIZE,
    COMMON,
    DEVICE_CONFIG,
    ISR,
    MSIX_BAR,
    NOTIFY,
    NOTIFY_MULTIPLIER,
    PAGE,
    VIRTIO_BAR,
    VirtioFunction,
    identity_of,
)
from ostler.devices.virtio.transport import MAX_QUEUES, QueueSetup, VirtioCore
from ostler.memory import GuestMemory


class Doorbell(Protocol):
    """One address a guest may write to; whoever made it calls back on the event loop, under the board's lock."""

    def attach(self, address: int) -> None:
        """Ring on a two-byte write to this guest-physical address, without an exit where that can be had."""

    def detach(self) -> None:
        """Stop listening there."""

    def ring(self) -> None:
        """A write that came by an exit."""


@dataclass(frozen=True, slots=True)
class PciWiring:
    """What the board gives to a transport."""

    memory: GuestMemory
    send_msi: Callable[[int, int], None]
    """Deliver a message: address, data."""
    intx: Callable[[int], None]
    """Drive the slot's INTA."""
    new_doorbell: Callable[[Callable[[], None]], Doorbell]


@dataclass(slots=True)
class TransportState:
    """Registers this transport adds."""

    isr: int = uint(8)
    config_vector: int = uint(16, abi.VIRTIO_MSI_NO_VECTOR)
    queue_vectors: bytes = blob(2 * MAX_QUEUES)


class VirtioPci:
    """A virtio device as a PCI function."""

    def __init__(self, device: VirtioDevice, wiring: PciWiring, *, name: str = "") -> None:
        self.name = name
        self.core = VirtioCore(device, wiring.memory, queue_event=self._queue_event, config_event=self._config_event)
        self._queue_count = len(device.queue_sizes)
        self.msix = Msix(self._queue_count + 1, wiring.send_msi)
        bars = (
            Bar(VIRTIO_BAR, BAR_SIZE, self, is_64_bit=True),
            Bar(MSIX_BAR, self.msix.size_bytes, self.msix),
        )
        self.function = VirtioFunction(self, identity_of(device.device_type), bars, self.msix, wiring.intx)
        self.function.moved = self._attach
        self.core.state_changed = self._attach
        self._state = TransportState()
        self._vectors = [abi.VIRTIO_MSI_NO_VECTOR] * self._queue_count
        self._doorbells = [wiring.new_doorbell(self._ringer(index)) for index in range(self._queue_count)]
        device.kick_again = self._kick_again
        self._was_master = False

    # -- events -----------------------------------------------------------------------------------

    def _ringer(self, index: int) -> Callable[[], None]:
        def rung() -> None:
            if self.function.is_master:
                self.core.kick(index)

        return rung

    def _kick_again(self, index: int) -> None:
        self._doorbells[index].ring()

    def _queue_event(self, index: int) -> None:
        if self.msix.enabled:
            self.msix.notify(self._vectors[index])
            return
        self._state.isr |= abi.VIRTIO_PCI_ISR_QUEUE
        self.function.set_intx(asserted=True)

    def _config_event(self) -> None:
        if self.msix.enabled:
            self.msix.notify(self._state.config_vector)
            return
        self._state.isr |= abi.VIRTIO_PCI_ISR_CONFIG
        self.function.set_intx(asserted=True)

    def _attach(self) -> None:
        """Doorbells listen while the device runs and its window is decoded; follows every change of either."""
        window = next((each for each in self.function.windows() if each.bar.index == VIRTIO_BAR), None)
        for index, doorbell in enumerate(self._doorbells):
            enabled = index < len(self.core.running) and self.core.running[index].enabled
            if window is not None and enabled and self.function.is_decoded(window.address):
                doorbell.attach(window.address + NOTIFY + NOTIFY_MULTIPLIER * index)
            else:
                doorbell.detach()
        is_master = self.function.is_master
        for queue in self.core.running:
            queue.paused = not is_master
        if is_master and not self._was_master:
            for doorbell in self._doorbells[: len(self.core.running)]:
                doorbell.ring()
        self._was_master = is_master

    # -- BAR 0 ------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        area, at = offset & ~(PAGE - 1), offset & (PAGE - 1)
        if area == DEVICE_CONFIG:
            return self.core.device.read_config(at, size)
        if area == COMMON:
            return self._read_common(at, size)
        if area == ISR and at == 0:
            value, self._state.isr = self._state.isr, 0
            self.function.set_intx(asserted=False)
            return value
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        area, at = offset & ~(PAGE - 1), offset & (PAGE - 1)
        if area == NOTIFY:
            # The address says which queue, and so must the value; only the former is asked.
            index, odd = divmod(at, NOTIFY_MULTIPLIER)
            if index < self._queue_count and not odd:
                self._doorbells[index].ring()
            else:
                self.core.ignored += 1
        elif area == DEVICE_CONFIG:
            self.core.device.write_config(at, size, value)
        elif area == COMMON:
            self._write_common(at, size, value)

    # -- common configuration, section 4.1.4.3 ------------------------------------------------------

    def _read_common(self, offset: int, size: int) -> int:
        image = self._common_image() if offset < abi.COMMON_SIZE else b""
        return int.from_bytes(image[offset : offset + size], "little")

    def _common_image(self) -> bytes:
        """The whole structure: it is read a few dozen times in a boot, and in any width this way."""
        core, state = self.core, self.core.state
        queue = core.selected()
        # "0x0 if the queue is unavailable": a size of zero, and the driver leaves it alone.
        shown = queue or QueueSetup(0)
        vector = self._vectors[state.queue_select] if queue else abi.VIRTIO_MSI_NO_VECTOR
        return struct.pack(
            "<IIIIHHBBHHHHHQQQ",
            state.device_feature_select,
            core.device_features(),
            state.driver_feature_select,
            core.driver_features(),
            self._state.config_vector,
            self._queue_count,
            state.status,
            state.config_generation,
            state.queue_select,
            shown.size,
            vector,
            shown.enabled,
            state.queue_select if queue else 0,
            shown.descriptors,
            shown.driver,
            shown.device,
        )

    def _write_common(self, offset: int, size: int, value: int) -> None:
        state = self.core.state
        match offset, size:
            case abi.COMMON_STATUS, 1:
                self._write_status(value)
            case abi.COMMON_DFSELECT, 4:
                state.device_feature_select = value
            case abi.COMMON_GFSELECT, 4:
                state.driver_feature_select = value
            case abi.COMMON_GF, 4:
                self.core.write_driver_features(value)
            case abi.COMMON_MSIX, 2:
                self._state.config_vector = self._valid_vector(value)
            case abi.COMMON_Q_SELECT, 2:
                state.queue_select = value
            case _:
                self._write_queue(offset, size, value)

    def _write_status(self, value: int) -> None:
        self.core.write_status(value)
        if value == 0:
            self._state = TransportState()
            self._vectors = [abi.VIRTIO_MSI_NO_VECTOR] * self._queue_count
            self.function.set_intx(asserted=False)

    def _write_queue(self, offset: int, size: int, value: int) -> None:
        if (offset, size) == (abi.COMMON_Q_MSIX, 2):
            # Unlike the rest, a vector may be changed while the queue is in use.
            if self.core.selected() is not None:
                self._vectors[self.core.state.queue_select] = self._valid_vector(value)
            return
        queue = self.core.queue_to_set_up()
        if queue is None:
            return
        if (offset, size) == (abi.COMMON_Q_SIZE, 2):
            most = self.core.device.queue_sizes[self.core.state.queue_select]
            queue.size = min(value, most)
        elif (offset, size) == (abi.COMMON_Q_ENABLE, 2):
            queue.enabled = int(value == 1)
        else:
            self._write_address(queue, offset, size, value)

    def _write_address(self, queue: QueueSetup, offset: int, size: int, value: int) -> None:
        names = {abi.COMMON_Q_DESCLO: "descriptors", abi.COMMON_Q_AVAILLO: "driver", abi.COMMON_Q_USEDLO: "device"}
        name = names.get(offset & ~7)
        if name is None or (size, offset & 7) not in ((4, 0), (4, 4), (8, 0)):
            self.core.ignored += 1
            return
        shift = 8 * (offset & 7)
        mask = (1 << 8 * size) - 1 << shift
        setattr(queue, name, getattr(queue, name) & ~mask | value << shift)

    def _valid_vector(self, value: int) -> int:
        """A vector that does not exist reads back as none, which is how a driver learns of it."""
        return value if value < self.msix.vectors else abi.VIRTIO_MSI_NO_VECTOR

    # -- state ------------------------------------------------------------------------------------

    def save(self) -> Saved:
        core = {f"virtio.{key}": value for key, value in self.core.save().items()}
        function = {f"pci.{key}": value for key, value in self.function.save().items()}
        self._state.queue_vectors = struct.pack(f"<{self._queue_count}H", *self._vectors)
        return {**core, **function, **save(self._state)}

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError. The driver's kicks that were lost on the way are made up for."""
        parts: dict[str, dict[str, object]] = {"virtio": {}, "pci": {}, "": {}}
        for key, value in data.items():
            prefix, dot, rest = key.partition(".")
            parts[prefix if dot and prefix in parts else ""][rest if dot and prefix in parts else key] = value
        state = load(TransportState, "virtio transport", parts[""])
        vectors = state.queue_vectors.ljust(2 * self._queue_count, b"\xff")[: 2 * self._queue_count]
        self._vectors = [self._valid_vector(each) for each in struct.unpack(f"<{self._queue_count}H", vectors)]
        state.config_vector = self._valid_vector(state.config_vector)
        self._state = state
        self.core.restore(parts["virtio"])
        self.function.restore(parts["pci"])
        self.function.set_intx(asserted=bool(state.isr))
        for doorbell in self._doorbells[: len(self.core.running)]:
            doorbell.ring()

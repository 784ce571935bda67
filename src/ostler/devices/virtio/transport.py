"""What every virtio transport has in common: status, features, queue set-up; virtio 1.2 sections 2.1, 2.2, 3.1.

A transport (PCI here, MMIO some day) decodes registers into these properties and calls, and gives the device's
events a way out. The rules a driver must keep are enforced here: features are taken before FEATURES_OK
and no wider than the offer, queues are placed before DRIVER_OK, everything else is ignored and counted.
A driver that breaks a ring finds DEVICE_NEEDS_RESET set, and the device idle until it is reset.

Left out on purpose: resetting a single queue (VIRTIO_F_RING_RESET is not offered).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from ostler.abi.virtio.common import (
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC,
    Status,
)
from ostler.devices.state import Saved, blob, load, save, uint
from ostler.devices.virtio.chain import QueueError
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.queue import QueueLayout, Virtqueue
from ostler.errors import StateError
from ostler.memory import GuestMemory

RING_FEATURES = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
MAX_QUEUES = 512
DRIVER_STATUS = Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK | Status.FEATURES_OK | Status.FAILED


@dataclass(slots=True)
class QueueSetup:
    """A queue as the driver is describing it, and where it was left off when state was saved."""

    size: int
    enabled: int = 0
    descriptors: int = 0
    driver: int = 0
    device: int = 0
    next_avail: int = 0
    next_used: int = 0

    PACKED = struct.Struct("<HHQQQHH")

    def pack(self) -> bytes:
        """For saved state."""
        return self.PACKED.pack(*asdict(self).values())

    @property
    def layout(self) -> QueueLayout:
        """For the virtqueue."""
        return QueueLayout(self.size, self.descriptors, self.driver, self.device, self.next_avail, self.next_used)


@dataclass(slots=True)
class CoreState:
    """Registers every transport has."""

    status: int = uint(8)
    driver_features: int = uint(64)
    device_feature_select: int = uint(32)
    driver_feature_select: int = uint(32)
    queue_select: int = uint(16)
    config_generation: int = uint(8)
    queues: bytes = blob(MAX_QUEUES * QueueSetup.PACKED.size)


class VirtioCore:
    """A device and the driver's view of it. Calls are serialised by the board's lock."""

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        *,
        queue_event: Callable[[int], None],
        config_event: Callable[[], None],
    ) -> None:
        """`queue_event(index)` and `config_event()` interrupt the driver."""
        if not 0 < len(device.queue_sizes) <= MAX_QUEUES:
            raise ValueError(f"virtio device of {len(device.queue_sizes)} queues: expected 1 to {MAX_QUEUES}")
        self.device = device
        self.name = type(device).__name__
        self.offered = device.features | RING_FEATURES
        self.state = CoreState()
        self.queues = [QueueSetup(size) for size in device.queue_sizes]
        self.running: list[Virtqueue] = []
        self.last_error = ""
        """Why the device last asked for a reset."""
        self.ignored = 0
        """Writes that no driver should make at that time."""
        self.state_changed: Callable[[], None] = _nobody
        """Told when the device starts or stops."""
        self._memory = memory
        self._queue_event = queue_event
        self._config_event = config_event
        device.config_changed = self.config_changed
        device.broken = self.broken

    # -- registers --------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        """Between DRIVER_OK and reset, and not broken."""
        return bool(self.running)

    def device_features(self) -> int:
        """The selected 32 bits of the offer."""
        select = self.state.device_feature_select
        return self.offered >> 32 * select & 0xFFFF_FFFF if select < 2 else 0

    def driver_features(self) -> int:
        """The selected 32 bits of what the driver took."""
        select = self.state.driver_feature_select
        return self.state.driver_features >> 32 * select & 0xFFFF_FFFF if select < 2 else 0

    def write_driver_features(self, value: int) -> None:
        """Take 32 bits; only before FEATURES_OK."""
        select = self.state.driver_feature_select
        if self.state.status & Status.FEATURES_OK or select > 1:
            self.ignored += 1
            return
        others = self.state.driver_features & ~(0xFFFF_FFFF << 32 * select)
        self.state.driver_features = others | (value & 0xFFFF_FFFF) << 32 * select

    def selected(self) -> QueueSetup | None:
        """The queue that queue_select names; None for one that does not exist."""
        index = self.state.queue_select
        return self.queues[index] if index < len(self.queues) else None

    def queue_to_set_up(self) -> QueueSetup | None:
        """The selected queue while the driver may still describe it."""
        queue = self.selected()
        if queue is None or queue.enabled or self.state.status & Status.DRIVER_OK:
            self.ignored += 1
            return None
        return queue

    def write_status(self, value: int) -> None:
        """Zero resets; otherwise bits are added. Raises nothing: a refused bit stays clear."""
        if value == 0:
            self.reset()
            return
        before = self.state.status
        wanted = before | value & DRIVER_STATUS
        if wanted & ~before & Status.FEATURES_OK and not self._features_acceptable():
            wanted &= ~Status.FEATURES_OK
        if wanted & Status.DRIVER_OK and not wanted & Status.FEATURES_OK:
            # A legacy driver, which this device has no interface for.
            wanted &= ~Status.DRIVER_OK
        self.state.status = wanted
        if wanted & ~before & Status.DRIVER_OK:
            self._activate()

    def _features_acceptable(self) -> bool:
        taken = self.state.driver_features
        return not taken & ~self.offered and bool(taken >> VIRTIO_F_VERSION_1 & 1)

    def _activate(self) -> None:
        features = self.state.driver_features
        try:
            self.running = [self._start(index, features) for index in range(len(self.queues))]
            self.device.activate(self.running, features)
        except QueueError as error:
            self.broken(error)
        self.state_changed()

    def _start(self, index: int, features: int) -> Virtqueue:
        setup = self.queues[index]
        if not setup.enabled:
            return Virtqueue.unused(self._memory)

        def interrupt() -> None:
            self._queue_event(index)

        return Virtqueue(
            self._memory,
            setup.layout,
            interrupt=interrupt,
            event_idx=bool(features >> VIRTIO_RING_F_EVENT_IDX & 1),
            indirect=bool(features >> VIRTIO_RING_F_INDIRECT_DESC & 1),
        )

    # -- events -----------------------------------------------------------------------------------

    def kick(self, index: int) -> None:
        """The driver notified a queue."""
        if index >= len(self.running):
            self.ignored += 1
            return
        try:
            self.device.kicked(index)
        except QueueError as error:
            self.broken(error)

    def kick_all(self) -> None:
        """Have the device look at every queue: after restoring, or when it may access memory again."""
        for index in range(len(self.running)):
            self.kick(index)

    def config_changed(self) -> None:
        """The device's configuration differs from what the driver may have read."""
        self.state.config_generation = self.state.config_generation + 1 & 0xFF
        if self.state.status & Status.DRIVER_OK:
            self._config_event()

    def broken(self, error: QueueError) -> None:
        """Stop until the driver resets the device."""
        self.last_error = f"{self.name}: {error}"
        self._stop()
        self.state.status |= Status.NEEDS_RESET
        if self.state.status & Status.DRIVER_OK:
            self._config_event()

    def reset(self) -> None:
        """As after power-on."""
        self._stop()
        self.state = CoreState(config_generation=self.state.config_generation)
        self.queues = [QueueSetup(size) for size in self.device.queue_sizes]

    def _stop(self) -> None:
        running, self.running = self.running, []
        # The device first: it may want to give chains back while it still can.
        self.device.reset()
        for queue in running:
            queue.close()
        if running:
            self.state_changed()

    # -- state ------------------------------------------------------------------------------------

    def save(self) -> Saved:
        """Everything but what the transport adds."""
        self.device.drain()
        for setup, queue in zip(self.queues, self.running, strict=False):
            if queue.enabled:
                layout = queue.layout
                setup.next_avail, setup.next_used = layout.next_avail, layout.next_used
        self.state.queues = b"".join(queue.pack() for queue in self.queues)
        own = {f"device.{key}": value for key, value in self.device.save().items()}
        return {**save(self.state), **own}

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError. `kick_all` once the whole machine is restored."""
        own = {key.removeprefix("device."): value for key, value in data.items() if key.startswith("device.")}
        rest = {key: value for key, value in data.items() if not key.startswith("device.")}
        state = load(CoreState, self.name, rest)
        size = QueueSetup.PACKED.size
        if len(state.queues) != size * len(self.queues) or state.driver_features & ~self.offered:
            raise StateError(f"{self.name}: saved with other queues or features than this device has")
        self._stop()
        self.state = state
        self.queues = [QueueSetup(*fields) for fields in QueueSetup.PACKED.iter_unpack(state.queues)]
        if any(queue.size > most for queue, most in zip(self.queues, self.device.queue_sizes, strict=True)):
            raise StateError(f"{self.name}: saved queue is larger than this device has")
        self.device.restore(own)
        state.status &= DRIVER_STATUS | Status.NEEDS_RESET
        if state.status & Status.DRIVER_OK and not state.status & Status.NEEDS_RESET:
            self._activate()


def _nobody() -> None:
    """Nothing depends on the device running."""

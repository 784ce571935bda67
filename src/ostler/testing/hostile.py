"""A guest that means harm: random and mutated descriptors, notifications, and configuration accesses at one device.

    with HostileGuest(device, seeds, random.Random(1)) as guest:
        guest.attack(1_000_000)

Half of what it sends begins as a request the device understands (`seeds`: readable parts, sizes of writable parts, by
queue) and is then damaged, so that attacks reach beyond the first check. Whenever the device asks for a reset it gets
one, as the specification says a driver must; a device that does not ask although its ring is beyond repair, or that
does not come back, is an AssertionError. Everything is kept in bounded memory, so that growth is the device's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from ostler.abi.virtio.common import Status
from ostler.abi.virtio.ring import DESCRIPTOR, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from ostler.bus import MmioBus
from ostler.devices.pci.config import BAR0, COMMAND
from ostler.devices.pci.host import Ecam, HostBridge, PciRange
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.pci import PciWiring, VirtioPci
from ostler.devices.virtio.pci_function import BAR_SIZE, DEVICE_CONFIG, NOTIFY
from ostler.memory import GuestMemory, layout
from ostler.testing.virtio_pci import PciDriver

MEMORY_BYTES = 4 << 20
QUEUE_SIZE = 32
SLOT = 1
Seed = tuple[Sequence[bytes], Sequence[int]]

EDGES = (0, 1, 2, 15, 16, 0xFF, 0x1000, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1)


class _Doorbell:
    """Rings into a set that the guest empties."""

    def __init__(self, rung: set[Callable[[], None]], callback: Callable[[], None]) -> None:
        self._rung, self._callback = rung, callback

    def attach(self, address: int) -> None:
        """Kicks come by exits here."""

    def detach(self) -> None:
        """Kicks come by exits here."""

    def ring(self) -> None:
        self._rung.add(self._callback)


class HostileGuest:
    """One device behind a bridge, and who attacks it. A context manager."""

    def __init__(self, device: VirtioDevice, seeds: Mapping[int, Sequence[Seed]], rng: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        """What was done, by kind."""
        self.interrupts = 0
        self._rng = rng
        self._seeds = {queue: list(each) for queue, each in seeds.items()}
        self._memory = GuestMemory.of_size(MEMORY_BYTES)
        self._rung: set[Callable[[], None]] = set()
        self._mmio = MmioBus()
        bridge = HostBridge(
            self._mmio,
            low=PciRange(layout.PCI_LOW_START, layout.PCI_LOW_SIZE),
            high=PciRange(layout.PCI_HIGH_START, layout.PCI_HIGH_SIZE),
        )
        self._mmio.claim("ECAM", layout.PCI_ECAM_BASE, layout.PCI_ECAM_SIZE, Ecam(bridge), max_width=4)
        self.transport = VirtioPci(
            device,
            PciWiring(self._memory, self._message, lambda _level: None, lambda call: _Doorbell(self._rung, call)),
        )
        bridge.add(SLOT, self.transport.function, gsi=17)
        self._driver = PciDriver(self._mmio, self._memory, SLOT, base=0x1_0000)
        self._bars = [self._driver.config(BAR0 + at, 4) for at in (0, 4, 8)]
        self._actions: list[tuple[int, Callable[[], None]]] = [
            (30, self._damaged_request), (10, self._random_descriptor), (8, self._random_head), (2, self._random_index),
            (20, self._kick), (10, self._access_structures), (10, self._access_config_space), (4, self._access_msix),
            (6, self._access_anywhere),
        ]  # fmt: skip

    def attack(self, count: int) -> None:
        """Do `count` things, and then see that the device can still be used."""
        weights = [weight for weight, _ in self._actions]
        actions = [action for _, action in self._actions]
        done = 0
        while done < count:
            self._recover()
            for action in self._rng.choices(actions, weights, k=min(self._rng.randint(1, 200), count - done)):
                action()
                done += 1
            self._turn()
        self._recover()

    # -- what it does -----------------------------------------------------------------------------

    def _recover(self) -> None:
        """Undo what was done to the function, as firmware would, and set the device up anew."""
        for at, value in zip((0, 4, 8), self._bars, strict=True):
            self._driver.config(BAR0 + at, 4, value)
        self._driver.enable()
        needs_reset = bool(self._driver.status & Status.NEEDS_RESET)
        self.counts["needed reset"] += needs_reset
        assert not (needs_reset and self.transport.core.is_running), "a device that needs a reset still runs"
        offered = self._driver.offered()
        accepted = offered if self._rng.random() < 0.8 else offered & self._rng.getrandbits(64) | 1 << 32
        self._driver.start(features=accepted, queue_size=QUEUE_SIZE)
        wanted = Status.DRIVER_OK | Status.FEATURES_OK
        assert self._driver.status & (wanted | Status.NEEDS_RESET) == wanted, "the device did not come back"

    def _turn(self) -> None:
        """A round of the event loop."""
        for _ in range(4):
            rung = list(self._rung)
            self._rung.clear()
            for callback in rung:
                callback()

    def _queue(self) -> int:
        return self._rng.randrange(len(self._driver.queues))

    def _number(self, bits: int) -> int:
        """Small, at an edge, near memory, or anything."""
        kind = self._rng.randrange(4)
        if kind == 0:
            value = self._rng.randrange(256)
        elif kind == 1:
            value = self._rng.choice(EDGES) + self._rng.randrange(-2, 3)
        elif kind == 2:
            value = self._rng.randrange(MEMORY_BYTES)
        else:
            value = self._rng.getrandbits(bits)
        return value & ((1 << bits) - 1)

    def _damaged(self, data: bytes) -> bytes:
        """Some bytes changed, cut or added; or none."""
        changed = bytearray(data)
        for _ in range(self._rng.choice((0, 0, 1, 1, 2, 8))):
            at = self._rng.randrange(len(changed) + 1)
            width = self._rng.choice((1, 2, 4, 8))
            changed[at : at + width] = self._number(8 * width).to_bytes(width, "little")
        if self._rng.random() < 0.1:
            del changed[self._rng.randrange(len(changed) + 1) :]
        return bytes(changed)

    def _damaged_request(self) -> None:
        """A request of the device's kind, whole or not."""
        queue = self._queue()
        readable, writable = self._rng.choice(self._seeds.get(queue) or [([b"x" * 16], [16])])
        table, ring = 0x8_0000 + 0x1000 * queue, self._driver.queues[queue]
        parts = [(self._damaged(data), 0) for data in readable]
        parts += [(bytes(min(size, 0x4000)), VRING_DESC_F_WRITE) for size in writable]
        indirect = self._rng.random() < 0.5
        start = 0 if indirect else self._rng.randrange(QUEUE_SIZE)
        for number, (data, flags) in enumerate(parts):
            address = 0x10_0000 + 0x8000 * (queue * 8 + number % 8)
            if data and not flags:
                self._memory.write(address, data[:0x8000])
            following = (start + number + 1) % QUEUE_SIZE if number + 1 < len(parts) else 0
            fields = [address, len(data), flags | VRING_DESC_F_NEXT * (number + 1 < len(parts)), following]
            if self._rng.random() < 0.05:
                which = self._rng.randrange(4)
                fields[which] = self._number((64, 32, 16, 16)[which])
            if indirect:
                self._memory.write(table + DESCRIPTOR.size * number, DESCRIPTOR.pack(*fields))
            else:
                ring.raw_descriptor((start + number) % QUEUE_SIZE, *fields)
        if indirect:
            start = self._rng.randrange(QUEUE_SIZE)
            ring.raw_descriptor(start, table, DESCRIPTOR.size * len(parts), VRING_DESC_F_INDIRECT, 0)
        ring.raw_available(start)
        self._driver.kick(queue)
        self.counts["requests"] += 1
        if self._rng.random() < 0.7:
            self._turn()

    def _random_descriptor(self) -> None:
        queue = self._driver.queues[self._queue()]
        index = self._rng.randrange(QUEUE_SIZE)
        flags = self._rng.choice((0, 1, 2, 3, 4, 5, 6, 7, self._rng.getrandbits(16)))
        queue.raw_descriptor(index, self._number(64), self._number(32), flags, self._rng.randrange(QUEUE_SIZE + 2))
        self.counts["descriptors"] += 1

    def _random_head(self) -> None:
        self._driver.queues[self._queue()].raw_available(self._rng.randrange(QUEUE_SIZE + 1))
        self.counts["heads"] += 1

    def _random_index(self) -> None:
        self._driver.queues[self._queue()].raw_index(self._rng.getrandbits(16))
        self.counts["indices"] += 1

    def _kick(self) -> None:
        self._driver.kick(self._queue())
        self.counts["kicks"] += 1
        if self._rng.random() < 0.2:
            self._turn()

    def _access(self, address: int, size: int) -> None:
        if self._rng.random() < 0.5:
            value = self._mmio.read(address, size)
            assert 0 <= value < 1 << 8 * size, f"{size} bytes at {address:#x} read as {value:#x}"
        else:
            self._mmio.write(address, size, self._number(8 * size))
        self.counts["accesses"] += 1

    def _access_structures(self) -> None:
        """Common and device configuration, interrupt status, in any width."""
        area = self._rng.choice((0, 0, 0x1000, DEVICE_CONFIG, NOTIFY))
        offset = self._rng.randrange(64) if self._rng.random() < 0.9 else self._rng.randrange(0x1000)
        self._access(self._driver.bar + min(area + offset, BAR_SIZE - 1), self._rng.choice((1, 2, 4, 8)))

    def _access_config_space(self) -> None:
        offset = self._rng.randrange(0x100) if self._rng.random() < 0.8 else self._rng.randrange(0x1000)
        self._access(layout.PCI_ECAM_BASE + (SLOT << 15) + offset, self._rng.choice((1, 2, 4)))
        if self._rng.random() < 0.7:
            # Mostly put right again, or everything else would go into the void.
            self._driver.config(COMMAND, 2, 6)

    def _access_msix(self) -> None:
        offset = self._rng.randrange(self.transport.msix.size_bytes)
        self._access((self._bars[2] & ~0xF) + offset, self._rng.choice((1, 2, 4, 8)))

    def _access_anywhere(self) -> None:
        base = self._rng.choice((layout.PCI_ECAM_BASE, layout.PCI_LOW_START, self._driver.bar))
        self._access(base + self._rng.randrange(1 << 20), self._rng.randint(1, 8))

    def _message(self, address: int, data: int) -> None:
        assert 0 <= address < 1 << 64
        assert 0 <= data < 1 << 32
        self.interrupts += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.transport.core.reset()
        self._memory.close()

"""Routing of port and memory accesses to devices.

A device claims a range and is called with the offset inside it. The buses decide what real
ones do: a wide access to a narrow device is split into pieces, lowest address first, and what
nobody claims reads as all ones and swallows writes. The latter is counted per address, never
silent: `unclaimed` tells what a guest looked for in vain.

A lookup is on the path of every exit, so both buses keep it to one dictionary or one bisect.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

PORT_COUNT = 0x1_0000
# A guest may touch any address: past this many the counter keeps sums only.
MAX_COUNTED_ADDRESSES = 1024


class BusDevice(Protocol):
    """What both buses call. `offset` is relative to the claim, `value` fits in `size` bytes."""

    def read(self, offset: int, size: int) -> int:
        """The register's value; surplus bits are cut by the bus."""

    def write(self, offset: int, size: int, value: int) -> None:
        """Take the value."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A device's range; accesses wider than `max_width` bytes are split."""

    name: str
    start: int
    end: int
    device: BusDevice
    max_width: int


class UnclaimedLog:
    """Counts accesses nobody claimed, bounded in memory whatever the guest does."""

    def __init__(self) -> None:
        self.by_address: Counter[int] = Counter()
        self.total = 0

    def count(self, address: int) -> None:
        """One more access to `address`."""
        self.total += 1
        if address in self.by_address or len(self.by_address) < MAX_COUNTED_ADDRESSES:
            self.by_address[address] += 1


class PortBus:
    """The 64 Ki x86 I/O ports."""

    def __init__(self) -> None:
        self.unclaimed = UnclaimedLog()
        self._claims: dict[int, Claim] = {}

    def claim(self, name: str, start: int, size: int, device: BusDevice, *, max_width: int = 1) -> None:
        """Give ports to a device. Raises ValueError on an overlap or outside of the port space."""
        if start < 0 or size < 1 or start + size > PORT_COUNT:
            raise ValueError(f"{name}: ports {start:#x}+{size:#x} are outside of the port space")
        claim = Claim(name, start, start + size, device, max_width)
        for port in range(start, start + size):
            if port in self._claims:
                raise ValueError(f"{name}: port {port:#x} belongs to {self._claims[port].name}")
        for port in range(start, start + size):
            self._claims[port] = claim

    def read(self, port: int, size: int) -> int:
        """What IN of `size` bytes yields."""
        claim = self._claims.get(port)
        if claim is not None and size <= claim.max_width and port + size <= claim.end:
            return claim.device.read(port - claim.start, size) & ((1 << size * 8) - 1)
        if size == 1:
            self.unclaimed.count(port)
            return 0xFF
        half = size // 2
        lower = self.read(port, half)
        return lower | self.read((port + half) & 0xFFFF, half) << (half * 8)

    def write(self, port: int, size: int, value: int) -> None:
        """What OUT of `size` bytes does."""
        claim = self._claims.get(port)
        if claim is not None and size <= claim.max_width and port + size <= claim.end:
            claim.device.write(port - claim.start, size, value)
            return
        if size == 1:
            self.unclaimed.count(port)
            return
        half = size // 2
        self.write(port, half, value & ((1 << half * 8) - 1))
        self.write((port + half) & 0xFFFF, half, value >> (half * 8))

    def claims(self) -> list[Claim]:
        """Every claim once, by port."""
        return sorted(set(self._claims.values()), key=lambda claim: claim.start)


class MmioBus:
    """Guest-physical addresses outside of memory slots and of the accelerator's own chips."""

    def __init__(self) -> None:
        self.unclaimed = UnclaimedLog()
        self._starts: list[int] = []
        self._claims: list[Claim] = []

    def claim(self, name: str, start: int, size: int, device: BusDevice, *, max_width: int = 8) -> None:
        """Give addresses to a device. Raises ValueError on an overlap."""
        if not self.is_free(start, size):
            raise ValueError(f"{name}: {start:#x}+{size:#x} is empty or overlaps another claim")
        at = bisect_right(self._starts, start)
        self._starts.insert(at, start)
        self._claims.insert(at, Claim(name, start, start + size, device, max_width))

    def is_free(self, start: int, size: int) -> bool:
        """Whether a claim of `size` bytes, at least one, would be taken."""
        at = bisect_right(self._starts, start)
        before = self._claims[at - 1] if at else None
        after = self._claims[at] if at < len(self._claims) else None
        return size >= 1 and not (before and before.end > start) and not (after and after.start < start + size)

    def release(self, start: int) -> None:
        """Take back the claim that begins at `start`. Raises ValueError when there is none."""
        at = bisect_right(self._starts, start) - 1
        if at < 0 or self._starts[at] != start:
            raise ValueError(f"no claim begins at {start:#x}")
        del self._starts[at], self._claims[at]

    def _find(self, address: int) -> Claim | None:
        at = bisect_right(self._starts, address)
        if at and address < self._claims[at - 1].end:
            return self._claims[at - 1]
        return None

    def read(self, address: int, size: int) -> int:
        """What a load of `size` bytes (1 to 8, also odd ones) yields."""
        claim = self._find(address)
        if claim is None:
            self.unclaimed.count(address)
            return (1 << size * 8) - 1
        step = self._step(claim, address, size)
        if step == size:
            return claim.device.read(address - claim.start, size) & ((1 << size * 8) - 1)
        lower = self.read(address, step)
        return lower | self.read(address + step, size - step) << (step * 8)

    def write(self, address: int, size: int, value: int) -> None:
        """What a store of `size` bytes does."""
        claim = self._find(address)
        if claim is None:
            self.unclaimed.count(address)
            return
        step = self._step(claim, address, size)
        if step == size:
            claim.device.write(address - claim.start, size, value)
            return
        self.write(address, step, value & ((1 << step * 8) - 1))
        self.write(address + step, size - step, value >> (step * 8))

    @staticmethod
    def _step(claim: Claim, address: int, size: int) -> int:
        """The widest power-of-two piece that the device takes at this address."""
        room = min(size, claim.end - address, claim.max_width)
        return 1 << (room.bit_length() - 1)

    def claims(self) -> list[Claim]:
        """Every claim, by address."""
        return list(self._claims)

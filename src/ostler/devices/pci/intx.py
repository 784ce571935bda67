"""INTx: the four wires that functions without messages share, PCI Local Bus 3.0 section 2.2.6.

A wire is up while any function asserts it. Only drivers that refuse MSI-X ever use one.
"""

from __future__ import annotations

from ostler.devices.wiring import IrqLine

WIRES = 4


class SharedWire:
    """One interrupt line with several drivers, or-ed together."""

    def __init__(self, line: IrqLine) -> None:
        self._line = line
        self._asserting: set[int] = set()

    def set(self, slot: int, level: int) -> None:
        """The function in `slot` asserts or releases the wire."""
        if level:
            self._asserting.add(slot)
        else:
            self._asserting.discard(slot)
        self._line.set(1 if self._asserting else 0)


class IntxPins:
    """INTA of every slot, spread over the wires by slot number."""

    def __init__(self, lines: tuple[IrqLine, ...]) -> None:
        self._wires = tuple(SharedWire(line) for line in lines)

    def set(self, slot: int, level: int) -> None:
        """Drive INTA of a slot."""
        self._wires[slot % len(self._wires)].set(slot, level)

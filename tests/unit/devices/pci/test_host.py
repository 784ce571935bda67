"""The host bridge: configuration accesses both ways, windows sized, moved, switched, overlapping."""

from __future__ import annotations

from ostler.bus import MmioBus, PortBus
from ostler.devices.legacy.reset import ResetPort
from ostler.devices.pci.config import COMMAND, Command, Identity
from ostler.devices.pci.function import Bar, PciFunction
from ostler.devices.pci.host import ConfigPorts, Ecam, HostBridge, PciRange
from ostler.devices.pci.msix import Msix
from ostler.devices.wiring import PowerEvent
from ostler.testing.fakes import RecordedPower

LOW, HIGH, ECAM = 0xC000_0000, 0x78_0000_0000, 0xE000_0000
ON = Command.MEMORY | Command.MASTER


class Block:
    """Memory behind a window: reads say which."""

    def __init__(self, mark: int) -> None:
        self.mark = mark

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        return self.mark

    def write(self, offset: int, size: int, value: int) -> None:
        """Nothing to keep."""


class Rig:
    """A bridge with two functions, reached through both buses."""

    def __init__(self) -> None:
        self.ports, self.mmio, self.power = PortBus(), MmioBus(), RecordedPower()
        self.bridge = HostBridge(self.mmio, low=PciRange(LOW, 0x2000_0000), high=PciRange(HIGH, 1 << 34))
        self.config_ports = ConfigPorts(self.bridge, ResetPort(self.power))
        self.ports.claim("PCI", 0xCF8, 8, self.config_ports, max_width=4)
        self.mmio.claim("ECAM", ECAM, 1 << 20, Ecam(self.bridge), max_width=4)
        self.levels: list[int] = []
        self.functions = []
        for number in (1, 2):
            function = PciFunction(
                Identity(0x1AF4, 0x1040 + number, 0x01_0000),
                bars=(Bar(0, 0x4000, Block(0x10 * number), is_64_bit=True), Bar(2, 0x1000, Block(0x10 * number + 2))),
                msix=Msix(2, lambda _address, _data: None),
                msix_bar=2,
                intx=self.levels.append,
            )
            self.bridge.add(number, function, gsi=16 + number)
            self.functions.append(function)

    def config(self, slot: int, offset: int, size: int, value: int | None = None) -> int:
        address = ECAM + (slot << 15) + offset
        if value is None:
            return self.mmio.read(address, size)
        self.mmio.write(address, size, value)
        return value


def test_ecam_and_ports_reach_the_same_registers() -> None:
    rig = Rig()
    assert rig.config(1, 0, 4) == 0x1041_1AF4
    rig.ports.write(0xCF8, 4, 0x8000_0000 | 2 << 11)
    assert rig.ports.read(0xCFC, 4) == 0x1042_1AF4
    assert rig.ports.read(0xCFE, 2) == 0x1042
    rig.ports.write(0xCF8, 4, 0x8000_0000 | 2 << 11 | 0x3C)
    rig.ports.write(0xCFC, 1, 0x55)
    assert rig.config(2, 0x3C, 1) == 0x55
    assert rig.ports.read(0xCF8, 4) == 0x8000_0000 | 2 << 11 | 0x3C


def test_absent_functions_and_disabled_address_read_as_ones() -> None:
    rig = Rig()
    assert rig.config(3, 0, 4) == 0xFFFF_FFFF
    assert rig.mmio.read(ECAM + (1 << 15) + (1 << 12), 2) == 0xFFFF
    rig.ports.write(0xCF8, 4, 2 << 11)
    assert rig.ports.read(0xCFC, 4) == 0xFFFF_FFFF
    rig.ports.write(0xCF8, 4, 0x8001_0000)
    assert rig.ports.read(0xCFC, 4) == 0xFFFF_FFFF
    assert rig.config(0, 8, 4) >> 8 == 0x06_0000


def test_address_port_double_word_does_not_reset_and_byte_does() -> None:
    rig = Rig()
    rig.ports.write(0xCF8, 4, 0x8000_0600)
    rig.ports.write(0xCF8, 2, 0x0600)
    assert rig.power.events == []
    rig.ports.write(0xCF9, 1, 0x06)
    assert rig.power.events == [(PowerEvent.RESET, 0)]


def test_read_only_registers_keep_their_values() -> None:
    rig = Rig()
    before = [rig.config(1, at, 4) for at in range(0, 0x100, 4)]
    for at in range(0, 0x1000, 4):
        rig.config(1, at, 4, 0xFFFF_FFFF)
    changed = [4 * n for n, old in enumerate(before) if rig.config(1, 4 * n, 4) != old]
    assert changed == [0x04, 0x10, 0x14, 0x18, 0x3C, 0x40]
    assert (rig.config(1, 0x100, 4), rig.config(1, 0xFFC, 4)) == (0, 0)


def test_bar_written_with_ones_tells_size_and_kind() -> None:
    rig = Rig()
    for at in (0x10, 0x14, 0x18):
        rig.config(1, at, 4, 0xFFFF_FFFF)
    assert rig.config(1, 0x10, 8) == 0xFFFF_FFFF_FFFF_C004
    assert rig.config(1, 0x18, 4) == 0xFFFF_F000


def test_windows_are_decoded_where_firmware_put_them_only_while_memory_is_on() -> None:
    rig = Rig()
    bar0, bar2 = rig.config(1, 0x10, 8) & ~0xF, rig.config(1, 0x18, 4) & ~0xF
    assert (bar0 >= HIGH, LOW <= bar2 < LOW + 0x2000_0000) == (True, True)
    assert rig.mmio.read(bar0, 1) == 0xFF
    rig.config(1, COMMAND, 2, ON)
    assert (rig.mmio.read(bar0, 1), rig.mmio.read(bar2, 1)) == (0x10, 0x12)
    rig.config(1, COMMAND, 2, 0)
    assert rig.mmio.read(bar0, 1) == 0xFF


def test_window_moved_is_decoded_there_and_no_longer_here() -> None:
    rig = Rig()
    old = rig.config(1, 0x10, 8) & ~0xF
    rig.config(1, COMMAND, 2, ON)
    rig.config(1, 0x10, 4, LOW + 0x10_0000)
    rig.config(1, 0x14, 4, 0)
    assert (rig.mmio.read(LOW + 0x10_0000, 1), rig.mmio.read(old, 1)) == (0x10, 0xFF)


def test_window_outside_of_the_ranges_covers_nothing() -> None:
    rig = Rig()
    rig.config(1, COMMAND, 2, ON)
    rig.config(1, 0x18, 4, ECAM)
    assert rig.config(2, 0, 2) == 0x1AF4
    rig.config(1, 0x18, 4, 0xFEE0_0000)
    assert rig.mmio.read(0xFEE0_0000, 1) == 0xFF


def test_overlapping_windows_lower_slot_wins_until_it_moves_away() -> None:
    rig = Rig()
    moved: list[int] = []
    rig.functions[1].moved = lambda: moved.append(1)
    for slot in (1, 2):
        rig.config(slot, 0x18, 4, LOW + 0x5000)
        rig.config(slot, COMMAND, 2, ON)
    assert (rig.mmio.read(LOW + 0x5000, 1), rig.bridge.overlaps) == (0x12, 1)
    moved.clear()
    rig.config(1, 0x18, 4, LOW + 0x9000)
    assert (rig.mmio.read(LOW + 0x5000, 1), rig.bridge.overlaps, moved) == (0x22, 0, [1])


def test_interrupt_wire_follows_condition_disable_bit_and_msix() -> None:
    rig = Rig()
    function = rig.functions[0]
    rig.config(1, COMMAND, 2, ON)
    function.set_intx(asserted=True)
    assert (rig.levels[-1], rig.config(1, 0x06, 2) & 8) == (1, 8)
    rig.config(1, COMMAND, 2, ON | Command.INTX_DISABLE)
    assert (rig.levels[-1], rig.config(1, 0x06, 2) & 8) == (0, 8)
    rig.config(1, COMMAND, 2, ON)
    rig.config(1, 0x42, 2, 0x8000)
    assert (rig.levels[-1], rig.config(1, 0x06, 2) & 8) == (0, 0)


def test_saved_function_and_address_restore_on_another_bridge() -> None:
    rig, other = Rig(), Rig()
    rig.config(1, 0x18, 4, LOW + 0x7_0000)
    rig.config(1, COMMAND, 2, ON)
    rig.ports.write(0xCF8, 4, 0x8000_1234)
    other.functions[0].restore(rig.functions[0].save())
    other.config_ports.restore(rig.config_ports.save())
    assert other.mmio.read(LOW + 0x7_0000, 1) == 0x12
    assert other.ports.read(0xCF8, 4) == 0x8000_1234

"""Reset ports, debug ports, panic port, power management, fw_cfg, test device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.bus import PortBus
from ostler.devices.acpi.pm import PM_BASE, PM_SIZE, PM_TIMER_HZ, PM_TIMER_OFFSET, PM1Status, PowerManagement
from ostler.devices.legacy.debug import DebugConsole, DebugExit, PvPanic
from ostler.devices.legacy.fw_cfg import FILE_DIRECTORY, FIRST_FILE, NB_CPUS, RAM_SIZE, FwCfg
from ostler.devices.legacy.reset import KeyboardReset, ResetPort, Scratch, SystemControl
from ostler.devices.testing.pc_testdev import EchoPort, ExitMemory, IrqPorts
from ostler.devices.wiring import NS_PER_SECOND, PowerEvent
from ostler.errors import StateError
from ostler.testing.fakes import FakeClock, FakeTimer, RecordedLine, RecordedPower

RESET = [(PowerEvent.RESET, 0)]


class PmBoard:
    """The PM block on a bus, as guests reach it."""

    def __init__(self) -> None:
        self.clock, self.timer, self.irq, self.power = FakeClock(), FakeTimer(), RecordedLine(), RecordedPower()
        self.pm = PowerManagement(clock=self.clock, timer=self.timer, irq=self.irq.line, power=self.power)
        self.bus = PortBus()
        self.bus.claim("pm", PM_BASE, PM_SIZE, self.pm, max_width=4)


def test_keyboard_controller_reset_pulse_resets() -> None:
    power = RecordedPower()
    keyboard = KeyboardReset(power)
    keyboard.write(4, 1, 0xAA)
    assert power.events == []
    assert keyboard.ignored_commands == {0xAA: 1}
    keyboard.write(4, 1, 0xFE)
    assert power.events == RESET


def test_keyboard_controller_output_port_bit_0_resets() -> None:
    power = RecordedPower()
    keyboard = KeyboardReset(power)
    keyboard.write(0, 1, 0xFE)
    keyboard.write(4, 1, 0xD1)
    keyboard.write(0, 1, 0xFE)
    assert power.events == RESET
    assert keyboard.read(4, 1) & 3 == 0


@pytest.mark.parametrize("first", [0x02, 0x00])
def test_reset_ports_rising_edge_resets_once(first: int) -> None:
    power = RecordedPower()
    port = ResetPort(power)
    port.write(0, 1, first)
    port.write(0, 1, 0x06)
    assert power.events == RESET
    control = SystemControl(power)
    control.write(0, 1, 0x03)
    control.write(0, 1, 0x03)
    assert power.events == RESET * 2


def test_scratch_port_keeps_last() -> None:
    port = Scratch()
    port.write(0, 1, 0x1AB)
    assert port.read(0, 1) == 0xAB


def test_debug_exit_status_is_odd_byte() -> None:
    power = RecordedPower()
    DebugExit(power).write(0, 4, 0)
    DebugExit(power).write(0, 4, 0xFFFF_FFFF)
    assert power.events == [(PowerEvent.DEBUG_EXIT, 1), (PowerEvent.DEBUG_EXIT, 0xFF)]


def test_debug_console_sinks_bytes_and_identifies() -> None:
    sent = bytearray()
    console = DebugConsole(sent.append)
    console.write(0, 1, 0x41)
    assert sent == b"A"
    assert console.read(0, 1) == 0xE9


@pytest.mark.parametrize(
    ("value", "event"), [(1, PowerEvent.PANIC), (3, PowerEvent.PANIC), (2, PowerEvent.CRASH_LOADED)]
)
def test_pvpanic_write_announces(value: int, event: PowerEvent) -> None:
    power = RecordedPower()
    PvPanic(power).write(0, 1, value)
    PvPanic(power).write(0, 1, 0x80)
    assert power.events == [(event, 0)]


def test_pm_control_soft_off_powers_off_and_sci_enable_is_fixed() -> None:
    board = PmBoard()
    assert board.bus.read(PM_BASE + 4, 2) == 1
    board.bus.write(PM_BASE + 4, 2, 0x0400)
    assert board.power.events == []
    board.bus.write(PM_BASE + 4, 2, 0x2000)
    assert board.power.events == [(PowerEvent.POWER_OFF, 0)]


def test_pm_control_other_sleep_is_counted() -> None:
    board = PmBoard()
    board.bus.write(PM_BASE + 4, 2, 0x2000 | 1 << 10)
    assert board.power.events == []
    assert board.pm.refused_sleeps == 1


def test_pm_power_button_raises_sci_until_cleared() -> None:
    board = PmBoard()
    board.pm.press_power_button()
    assert board.irq.levels == []
    board.bus.write(PM_BASE + 2, 2, PM1Status.POWER_BUTTON)
    assert board.irq.levels == [1]
    board.bus.write(PM_BASE + 1, 1, PM1Status.POWER_BUTTON >> 8)
    assert board.irq.levels == [1, 0]


def test_pm_timer_counts_3_579_545_hz_and_wraps() -> None:
    board = PmBoard()
    board.clock.now_ns = NS_PER_SECOND
    assert board.bus.read(PM_BASE + PM_TIMER_OFFSET, 4) == PM_TIMER_HZ
    board.clock.now_ns = 1300 * NS_PER_SECOND
    assert board.bus.read(PM_BASE + PM_TIMER_OFFSET, 4) == 1300 * PM_TIMER_HZ % (1 << 32)


def test_pm_timer_carry_interrupts_at_its_deadline() -> None:
    board = PmBoard()
    board.bus.write(PM_BASE + 2, 2, PM1Status.TIMER_CARRY)
    assert board.timer.deadline_ns is not None
    board.clock.now_ns = board.timer.deadline_ns
    board.pm.expired()
    assert board.irq.levels == [1]
    assert board.bus.read(PM_BASE, 2) & PM1Status.TIMER_CARRY
    board.bus.write(PM_BASE, 2, PM1Status.TIMER_CARRY)
    assert board.irq.levels == [1, 0]


def test_pm_restore_keeps_timer_and_refuses_wide_values() -> None:
    board, other = PmBoard(), PmBoard()
    board.clock.now_ns = 7 * NS_PER_SECOND
    other.pm.restore(board.pm.save())
    assert other.bus.read(PM_BASE + PM_TIMER_OFFSET, 4) in range(7 * PM_TIMER_HZ - 1, 7 * PM_TIMER_HZ + 1)
    with pytest.raises(StateError, match="status"):
        other.pm.restore({**board.pm.save(), "status": 1 << 16})


@given(
    st.lists(st.tuples(st.integers(0, PM_SIZE - 1), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)), max_size=40)
)
def test_pm_any_traffic_stays_in_registers(traffic: list[tuple[int, int, int]]) -> None:
    board = PmBoard()
    for offset, size, value in traffic:
        board.bus.write(PM_BASE + offset, size, value & ((1 << size * 8) - 1))
        assert 0 <= board.bus.read(PM_BASE + offset, size) < 1 << size * 8
        board.clock.now_ns += value
    PmBoard().pm.restore(board.pm.save())


def read_item(device: FwCfg, key: int, size: int) -> bytes:
    device.write(0, 2, key)
    return bytes(device.read(1, 1) for _ in range(size))


def test_fw_cfg_items_and_zeros_behind_their_end() -> None:
    device = FwCfg(cpus=3, ram_bytes=128 << 20)
    assert read_item(device, 0, 6) == b"QEMU\0\0"
    assert read_item(device, NB_CPUS, 2) == b"\3\0"
    assert int.from_bytes(read_item(device, RAM_SIZE, 8), "little") == 128 << 20
    assert read_item(device, 0x7777, 4) == bytes(4)


def test_fw_cfg_directory_lists_files() -> None:
    device = FwCfg(cpus=1, ram_bytes=0, files={"etc/one": b"data"})
    directory = read_item(device, FILE_DIRECTORY, 68)
    assert directory[:12] == (1).to_bytes(4, "big") + (4).to_bytes(4, "big") + FIRST_FILE.to_bytes(2, "big") + bytes(2)
    assert directory[12:].rstrip(b"\0") == b"etc/one"
    assert read_item(device, FIRST_FILE, 5) == b"data\0"


def test_testdev_echo_keeps_pieces() -> None:
    bus = PortBus()
    bus.claim("echo", 0xE0, 4, EchoPort(), max_width=4)
    bus.write(0xE0, 4, 0x4433_2211)
    bus.write(0xE1, 1, 0xAA)
    assert bus.read(0xE0, 4) == 0x4433_AA11
    assert bus.read(0xE2, 2) == 0x4433


def test_testdev_irq_ports_drive_lines_and_memory_keeps() -> None:
    lines: list[tuple[int, int]] = []
    ports = IrqPorts(lambda gsi, level: lines.append((gsi, level)))
    ports.write(0xE, 1, 1)
    ports.write(0xE, 1, 0)
    assert lines == [(14, 1), (14, 0)]
    memory = ExitMemory()
    memory.write(0x10, 8, 0x1122_3344_5566_7788)
    assert memory.read(0x12, 2) == 0x5566

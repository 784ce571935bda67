"""The board: every device of a guest, wired to buses, lines, timers and the console.

Port map, besides what the accelerator keeps to itself (PIC, PIT, their control ports):

    0x60..0x64 keyboard reset    0x70..0x71 RTC      0x80, 0xED scratch   0x92 reset
    0xE9 debug console           0xF4 debug exit     0x3F8 COM1           0x505 pvpanic
    0x510..0x511 fw_cfg          0x600..0x60B ACPI   0x620..0x633 watchdog
    0xCF8..0xCFF PCI configuration, 0xCF9 reset in it       0xD00..0xD0F Ostler's own calls

One lock serialises all devices. They hold it for microseconds and under the interpreter's own
lock anyway, and devices that meet (timer and register access, console and UART) cannot deadlock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ostler.boot.acpi import AcpiGeneration, AcpiPci, AcpiPlatform, AcpiWatchdog
from ostler.bus import MmioBus, PortBus
from ostler.devices import calls
from ostler.devices.acpi import pm, watchdog
from ostler.devices.legacy import debug, fw_cfg
from ostler.devices.legacy.reset import (
    RESET_PORT,
    KeyboardReset,
    ResetPort,
    Scratch,
    SystemControl,
)
from ostler.devices.legacy.rtc import CENTURY, Rtc
from ostler.devices.legacy.serial import PORT_COUNT as SERIAL_PORTS
from ostler.devices.legacy.serial import Serial
from ostler.devices.pci.host import ADDRESS_PORT as PCI_PORT
from ostler.devices.pci.host import PORT_COUNT as PCI_PORTS
from ostler.devices.pci.host import ConfigPorts, Ecam, HostBridge, PciRange
from ostler.devices.pci.intx import IntxPins
from ostler.devices.state import Saved
from ostler.devices.testing import pc_testdev as testdev
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.pci import Doorbell, PciWiring, VirtioPci
from ostler.devices.wiring import Clock, IrqLine, PowerEvent, PowerSink, Timer
from ostler.errors import BadRequest, StateError
from ostler.memory import GuestMemory, layout
from ostler.memory.layout import IOAPIC_BASE, LAPIC_BASE, LOW_RAM_LIMIT, TEST_MEMORY_BASE

COM1_PORT, COM1_IRQ = 0x3F8, 4
RTC_PORT, RTC_IRQ = 0x70, 8
KEYBOARD_PORT, SYSTEM_CONTROL_PORT = 0x60, 0x92
SCRATCH_PORTS = (0x80, 0xED)
RESET_VALUE = 0x06
IOAPIC_ID = 0
# IOAPIC inputs that a PC's own devices leave alone.
PCI_GSIS = (16, 17, 18, 19)
GENERATION_GSI = 20
# Devices that guests saved by earlier versions have not got; they begin as after power-on.
LATER = frozenset({"watchdog", "calls"})
# The BIOS memory map is older than 4 GiB of memory; CMOS keeps only what fits its fields.
CMOS_KIB_LIMIT = 0xFFFF


# Devices whose state is read off the host's clock, by their names in saved state.
TIMED = ("RTC", "ACPI")


class BoardTimer(Timer, Protocol):
    """An alarm whose expiry runs on the event loop, under the board's lock."""

    def call(self, expired: Callable[[], None]) -> None:
        """Say what to do on expiry; before the first deadline is armed."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """Everything the board is given by the process around it."""

    lock: threading.Lock
    clock: Clock
    new_timer: Callable[[], BoardTimer]
    power: PowerSink
    console_sink: Callable[[int], None]
    console_room: Callable[[], None]
    add_reader: Callable[[int, Callable[[], None]], None]
    """Call back on the event loop while a descriptor is readable; while the machine is being wired only."""
    remove_reader: Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Chipset:
    """What the board reaches of the accelerator: interrupts, doorbells, and re-mapping for tests."""

    drive_gsi: Callable[[int, int], None]
    flush_page: Callable[[int], None]
    send_msi: Callable[[int, int], None]
    new_doorbell: Callable[[Callable[[], None]], Doorbell]


class StatefulDevice(Protocol):
    """A device whose state outlives its process."""

    def save(self) -> Saved:
        """Plain data."""

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError for data the device could not have saved."""


class Board:
    """Buses and devices of one guest. Hold `lock` around every access from outside."""

    def __init__(self, wiring: Wiring, chipset: Chipset, *, cpus: int, memory_bytes: int, test_devices: bool) -> None:
        self.lock = wiring.lock
        self._chipset = chipset
        self.ports = PortBus()
        self.mmio = MmioBus()
        self.serial = Serial(irq=self._line(COM1_IRQ), sink=wiring.console_sink, on_room=wiring.console_room)
        self.rtc = self._make_rtc(wiring, cpus=cpus, memory_bytes=memory_bytes)
        self.pm = self._make_pm(wiring)
        self.watchdog = self._make_watchdog(wiring)
        self._stateful: dict[str, StatefulDevice] = {
            "COM1": self.serial,
            "RTC": self.rtc,
            "ACPI": self.pm,
            "watchdog": self.watchdog,
        }
        self._chipset_pci()
        self._claim_legacy(wiring, cpus=cpus, memory_bytes=memory_bytes)
        if test_devices:
            self._claim_test_devices()
        else:
            self.ports.claim("debug console", debug.DEBUG_CONSOLE_PORT, 1, debug.DebugConsole(wiring.console_sink))
        self._cpus = cpus

    def acpi_platform(self) -> AcpiPlatform:
        """The board as the ACPI tables describe it."""
        return AcpiPlatform(
            apic_ids=tuple(range(self._cpus)),
            lapic_base=LAPIC_BASE,
            ioapic_base=IOAPIC_BASE,
            ioapic_id=IOAPIC_ID,
            pm1_event_port=pm.PM_BASE,
            pm1_control_port=pm.PM_BASE + pm.PM1_CONTROL_OFFSET,
            pm_timer_port=pm.PM_BASE + pm.PM_TIMER_OFFSET,
            sci_gsi=pm.SCI_GSI,
            reset_port=RESET_PORT,
            reset_value=RESET_VALUE,
            sleep_type_s5=pm.SLEEP_TYPE_S5,
            serial_ports=((COM1_PORT, COM1_IRQ),),
            rtc_port=RTC_PORT,
            rtc_irq=RTC_IRQ,
            rtc_century_index=CENTURY,
            pvpanic_port=debug.PVPANIC_PORT,
            pci=AcpiPci(
                ecam_base=layout.PCI_ECAM_BASE,
                ecam_size=layout.PCI_ECAM_SIZE,
                low_start=layout.PCI_LOW_START,
                low_size=layout.PCI_LOW_SIZE,
                high_start=layout.PCI_HIGH_START,
                high_size=layout.PCI_HIGH_SIZE,
                config_port=PCI_PORT,
                pin_gsis=PCI_GSIS,
            ),
            generation=AcpiGeneration(layout.GENERATION_ID, GENERATION_GSI),
            watchdog=AcpiWatchdog(
                count_port=watchdog.WATCHDOG_PORT + watchdog.COUNT,
                left_port=watchdog.WATCHDOG_PORT + watchdog.LEFT,
                control_port=watchdog.WATCHDOG_PORT + watchdog.CONTROL,
                reload_port=watchdog.WATCHDOG_PORT + watchdog.RELOAD,
                status_port=watchdog.WATCHDOG_PORT + watchdog.STATUS,
                period_ms=watchdog.PERIOD_MS,
                min_count=watchdog.MIN_COUNT,
                max_count=watchdog.MAX_COUNT,
            ),
        )

    def plug(self, name: str, device: VirtioDevice, memory: GuestMemory) -> VirtioPci:
        """Add a virtio device as the next PCI function, known as `name` in saved state. Raises BadRequest."""
        try:
            slot = self.pci.free_slot()
        except ValueError as error:
            raise BadRequest(f"device {name}: {error}") from error
        wiring = PciWiring(memory, self._chipset.send_msi, partial(self._pins.set, slot), self._chipset.new_doorbell)
        transport = VirtioPci(device, wiring, name=name)
        self.pci.add(slot, transport.function, gsi=PCI_GSIS[slot % len(PCI_GSIS)])
        self._stateful[f"PCI {slot:02x}.0 {name}"] = transport
        return transport

    def claim_calls(self, device: calls.Calls) -> None:
        """Give the guest Ostler's own calls; before it runs."""
        self.ports.claim("calls", calls.CALL_PORT, calls.CALL_PORT_SIZE, device, max_width=4)
        self._stateful["calls"] = device

    def tell_generation(self) -> None:
        """The generation ID in the guest's memory is another: an edge, under the lock."""
        for level in (1, 0):
            self._chipset.drive_gsi(GENERATION_GSI, level)

    def save(self) -> dict[str, Saved]:
        """The state of every device that has one, by name; under the lock."""
        return {name: device.save() for name, device in self._stateful.items()}

    def restore(self, data: Mapping[str, Mapping[str, object]]) -> None:
        """Raises StateError; the board is of no use then. Under the lock."""
        if set(data) | LATER != set(self._stateful) | LATER:
            odd = sorted(set(data) ^ set(self._stateful))
            raise StateError(f"saved board has missing or unknown devices {odd[:8]}")
        for name, device in self._stateful.items():
            if name in data:
                device.restore(data[name])

    def restart(self, data: Mapping[str, Mapping[str, object]]) -> None:
        """Set what goes by the clock back to what `restore` set it to; the guest has not run since. As `restore`."""
        for name in TIMED:
            self._stateful[name].restore(data[name])

    def _line(self, gsi: int) -> IrqLine:
        return IrqLine(partial(self._chipset.drive_gsi, gsi))

    def _make_rtc(self, wiring: Wiring, *, cpus: int, memory_bytes: int) -> Rtc:
        timer = wiring.new_timer()
        cmos = _cmos(cpus=cpus, memory_bytes=memory_bytes)
        rtc = Rtc(clock=wiring.clock, timer=timer, irq=self._line(RTC_IRQ), cmos=cmos)
        timer.call(rtc.expired)
        return rtc

    def _make_pm(self, wiring: Wiring) -> pm.PowerManagement:
        timer = wiring.new_timer()
        line = self._line(pm.SCI_GSI)
        device = pm.PowerManagement(clock=wiring.clock, timer=timer, irq=line, power=wiring.power)
        timer.call(device.expired)
        return device

    def _make_watchdog(self, wiring: Wiring) -> watchdog.Watchdog:
        timer = wiring.new_timer()
        device = watchdog.Watchdog(clock=wiring.clock, timer=timer, fired=lambda: wiring.power(PowerEvent.HANG))
        timer.call(device.expired)
        return device

    def _chipset_pci(self) -> None:
        self.pci = HostBridge(
            self.mmio,
            low=PciRange(layout.PCI_LOW_START, layout.PCI_LOW_SIZE),
            high=PciRange(layout.PCI_HIGH_START, layout.PCI_HIGH_SIZE),
        )
        self._pins = IntxPins(tuple(self._line(gsi) for gsi in PCI_GSIS))
        self.mmio.claim("ECAM", layout.PCI_ECAM_BASE, layout.PCI_ECAM_SIZE, Ecam(self.pci), max_width=4)

    def _claim_legacy(self, wiring: Wiring, *, cpus: int, memory_bytes: int) -> None:
        power, ports = wiring.power, self.ports
        keyboard, control, reset = KeyboardReset(power), SystemControl(power), ResetPort(power)
        firmware = fw_cfg.FwCfg(cpus=cpus, ram_bytes=memory_bytes)
        self._stateful |= {"keyboard": keyboard, "system control": control, "reset control": reset, "fw_cfg": firmware}
        # Port 0x61 in between is the PIT's and the accelerator's.
        ports.claim("keyboard data", KEYBOARD_PORT, 1, keyboard)
        ports.claim("keyboard command", KEYBOARD_PORT + 4, 1, _Shifted(keyboard, 4))
        ports.claim("RTC", RTC_PORT, 2, self.rtc)
        ports.claim("system control", SYSTEM_CONTROL_PORT, 1, control)
        config_ports = self._stateful["PCI address"] = ConfigPorts(self.pci, reset)
        ports.claim("PCI configuration", PCI_PORT, PCI_PORTS, config_ports, max_width=4)
        ports.claim("fw_cfg", fw_cfg.FW_CFG_PORT, fw_cfg.FW_CFG_PORTS, firmware, max_width=2)
        for port in SCRATCH_PORTS:
            scratch = self._stateful[f"scratch {port:#x}"] = Scratch()
            ports.claim("scratch", port, 1, scratch)
        ports.claim("debug exit", debug.DEBUG_EXIT_PORT, debug.DEBUG_EXIT_SIZE, debug.DebugExit(power), max_width=4)
        ports.claim("COM1", COM1_PORT, SERIAL_PORTS, self.serial)
        ports.claim("pvpanic", debug.PVPANIC_PORT, 1, debug.PvPanic(power))
        ports.claim("ACPI", pm.PM_BASE, pm.PM_SIZE, self.pm, max_width=4)
        ports.claim("watchdog", watchdog.WATCHDOG_PORT, watchdog.WATCHDOG_SIZE, self.watchdog, max_width=4)

    def _claim_test_devices(self) -> None:
        echo = testdev.EchoPort()
        self.ports.claim("test echo", testdev.ECHO_PORT, testdev.ECHO_SIZE, echo, max_width=4)
        self.ports.claim("test echo, bytes", testdev.ECHO_BYTES_PORT, testdev.ECHO_SIZE, echo)
        flush = testdev.FlushPort(self._chipset.flush_page)
        self.ports.claim("test flush", testdev.FLUSH_PORT, testdev.FLUSH_SIZE, flush, max_width=4)
        lines = testdev.IrqPorts(self._chipset.drive_gsi)
        self.ports.claim("test lines", testdev.IRQ_PORT, testdev.IRQ_LINES, lines)
        self.mmio.claim("test memory", TEST_MEMORY_BASE, testdev.MEMORY_SIZE, testdev.ExitMemory())


@dataclass(frozen=True, slots=True)
class _Shifted:
    """A device that claims its ports one by one still sees its own offsets."""

    device: KeyboardReset
    by: int

    def read(self, offset: int, size: int) -> int:
        return self.device.read(offset + self.by, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.device.write(offset + self.by, size, value)


def _cmos(*, cpus: int, memory_bytes: int) -> dict[int, int]:
    """Memory sizes and processors where PC firmware keeps them."""
    low = min(memory_bytes, LOW_RAM_LIMIT)
    extended_kib = min((low >> 10) - 1024, CMOS_KIB_LIMIT)
    above_16m = min(max(low - (16 << 20), 0) >> 16, CMOS_KIB_LIMIT)
    above_4g = (memory_bytes - low) >> 16
    words = {0x15: 640, 0x17: extended_kib, 0x30: extended_kib, 0x34: above_16m, 0x5B: above_4g & 0xFFFF}
    values = {index + half: word >> (half * 8) & 0xFF for index, word in words.items() for half in (0, 1)}
    return {**values, 0x5D: above_4g >> 16 & 0xFF, 0x5F: cpus - 1}

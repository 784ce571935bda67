"""What the tables say about a board: every port, line and processor in one place.

The machine fills this from the devices it wires, so that a table cannot name a port that no
device claims.
"""

from __future__ import annotations

from dataclasses import dataclass

from ostler.boot.acpi.wdat import AcpiWatchdog


@dataclass(frozen=True, slots=True)
class AcpiPci:
    """The host bridge: bus 0, its configuration space and the ranges it forwards."""

    ecam_base: int
    ecam_size: int
    low_start: int
    low_size: int
    high_start: int
    high_size: int
    config_port: int
    pin_gsis: tuple[int, ...]
    """INTA of slot n reaches the input `pin_gsis[n % 4]`."""


@dataclass(frozen=True, slots=True)
class AcpiGeneration:
    """The virtual machine generation ID: where it lies, and the input that says that it has changed."""

    address: int
    gsi: int


@dataclass(frozen=True, slots=True)
class AcpiPlatform:
    """Ports, interrupt lines and processors, as the operating system is to find them."""

    apic_ids: tuple[int, ...]
    lapic_base: int
    ioapic_base: int
    ioapic_id: int
    pm1_event_port: int
    pm1_control_port: int
    pm_timer_port: int
    sci_gsi: int
    reset_port: int
    reset_value: int
    sleep_type_s5: int
    serial_ports: tuple[tuple[int, int], ...]
    """Pairs of first port and ISA interrupt."""
    rtc_port: int
    rtc_irq: int
    rtc_century_index: int
    pvpanic_port: int | None
    pci: AcpiPci | None = None
    generation: AcpiGeneration | None = None
    watchdog: AcpiWatchdog | None = None

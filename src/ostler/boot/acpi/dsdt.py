"""The DSDT of Ostler's board: processors, serial ports, clock, panic port, PCI, soft-off."""

from __future__ import annotations

from ostler.boot.acpi import aml
from ostler.boot.acpi.platform import AcpiGeneration, AcpiPci, AcpiPlatform

STATUS_PRESENT_AND_WORKING = 0x0F
GENERATION_DEVICE, DEVICE_CHANGED = "VGEN", 0x80


def dsdt_body(platform: AcpiPlatform) -> bytes:
    """The definition block behind the table header."""
    devices = [_processor(index) for index in range(len(platform.apic_ids))]
    devices += [_serial(number, *port) for number, port in enumerate(platform.serial_ports, start=1)]
    devices.append(_rtc(platform))
    if platform.pvpanic_port is not None:
        devices.append(_pvpanic(platform.pvpanic_port))
    if platform.generation is not None:
        devices += [_generation_id(platform.generation), _events(platform.generation)]
    if platform.pci is not None:
        devices += [_motherboard(platform.pci), _host_bridge(platform.pci)]
    sleep_type = aml.integer(platform.sleep_type_s5)
    soft_off = aml.name("\\_S5", aml.package(sleep_type, sleep_type, aml.integer(0), aml.integer(0)))
    return soft_off + aml.scope("\\_SB", *devices)


def _processor(uid: int) -> bytes:
    """_UID is what ties the object to its MADT entry."""
    return aml.device(
        f"C{uid:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(uid)), _status()
    )


def _serial(number: int, port: int, irq: int) -> bytes:
    return aml.device(
        f"COM{number}",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(number)),
        _status(),
        aml.name("_CRS", aml.resource_template(aml.io_ports(port, 8), aml.isa_irq(irq))),
    )


def _rtc(platform: AcpiPlatform) -> bytes:
    return aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resource_template(aml.io_ports(platform.rtc_port, 2), aml.isa_irq(platform.rtc_irq))),
    )


def _pvpanic(port: int) -> bytes:
    return aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        _status(),
        aml.name("_CRS", aml.resource_template(aml.io_ports(port, 1))),
    )


def _generation_id(generation: AcpiGeneration) -> bytes:
    """Microsoft's "Virtual Machine Generation ID": a guest whose ID changes is a copy, and seeds its numbers anew."""
    address = aml.package(aml.integer(generation.address & 0xFFFF_FFFF), aml.integer(generation.address >> 32))
    return aml.device(
        GENERATION_DEVICE,
        aml.name("_HID", aml.string("OSTL0001")),
        aml.name("_CID", aml.string("VM_Gen_Counter")),
        aml.name("_DDN", aml.string("VM_Gen_Counter")),
        _status(),
        aml.name("ADDR", address),
    )


def _events(generation: AcpiGeneration) -> bytes:
    """The generic event device (5.6.9): its one interrupt tells the device above."""
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resource_template(aml.interrupt(generation.gsi))),
        aml.method("_EVT", 1, aml.notify(f"\\_SB.{GENERATION_DEVICE}", DEVICE_CHANGED)),
    )


def _motherboard(pci: AcpiPci) -> bytes:
    """Reserves the configuration space, which belongs to no device (PCI Firmware 3.3, note to table 4-2)."""
    return aml.device(
        "MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_CRS", aml.resource_template(aml.memory32(pci.ecam_base, pci.ecam_size))),
    )


def _host_bridge(pci: AcpiPci) -> bytes:
    """Root bus 0; every slot's INTA is wired, though drivers use messages."""
    windows = aml.resource_template(
        aml.bus_range(0, (pci.ecam_size >> 20) - 1),
        aml.io_ports(pci.config_port, 8),
        aml.memory_window32(pci.low_start, pci.low_size),
        aml.memory_window64(pci.high_start, pci.high_size),
    )
    routes = [
        aml.package(
            aml.integer(slot << 16 | 0xFFFF), aml.integer(0), aml.integer(0),
            aml.integer(pci.pin_gsis[slot % len(pci.pin_gsis)]),
        )
        for slot in range(1, 32)
    ]  # fmt: skip
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        # The system may have every feature it asks for: there is no port that could have one.
        aml.method("_OSC", 4, aml.returns(aml.argument(3))),
        aml.name("_CRS", windows),
        aml.name("_PRT", aml.package(*routes)),
    )


def _status() -> bytes:
    return aml.name("_STA", aml.integer(STATUS_PRESENT_AND_WORKING))

"""The fixed ACPI tables: RSDP, RSDT, XSDT, FADT, FACS, MADT, MCFG, WDAT; ACPI 6.5 section 5.2.

The board is not hardware-reduced: it has the PM1 registers and the PM timer, because soft-off,
reset and timer calibration of unmodified kernels rest on them. There is no SMI port, which tells
the kernel that the hardware is in ACPI mode already. The RSDT is for small programs that do not
know the XSDT.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ostler.boot.acpi.dsdt import dsdt_body
from ostler.boot.acpi.platform import AcpiPci, AcpiPlatform
from ostler.boot.acpi.wdat import wdat_body
from ostler.memory import Gpa, GuestMemory
from ostler.memory.layout import ACPI_START, GENERATION_ID

HEADER_SIZE = 36
OEM_ID, OEM_TABLE_ID, CREATOR = b"OSTLER", b"OSTLERPC", b"OSTL"

# IAPC_BOOT_ARCH: ISA devices are there; the 8042 bit stays clear, as there is no keyboard.
BOOT_LEGACY_DEVICES, BOOT_NO_VGA = 1 << 0, 1 << 2
# FADT feature flags.
WBINVD, PROC_C1, SLEEP_BUTTON_ABSENT, TIMER_IS_32_BIT, RESET_SUPPORTED = 1 << 0, 1 << 2, 1 << 5, 1 << 8, 1 << 10
# A latency above the limit says that the state does not exist.
NO_C2_LATENCY, NO_C3_LATENCY = 101, 1001
IO_SPACE = 1

MADT_LOCAL_APIC, MADT_IO_APIC, MADT_OVERRIDE, MADT_LOCAL_NMI, MADT_LOCAL_X2APIC = 0, 1, 2, 4, 9
MADT_PC_COMPATIBLE, MADT_ENABLED = 1, 1
ACTIVE_HIGH_LEVEL = 0x000D
FACS_SIZE = 64


@dataclass(frozen=True, slots=True)
class AcpiTables:
    """Bytes to be placed at `base`, and where the RSDP lies in them."""

    base: Gpa
    data: bytes
    rsdp: Gpa


def build_tables(platform: AcpiPlatform, *, base: Gpa = ACPI_START) -> AcpiTables:
    """Lay all tables out from `base` on; the RSDP comes first, where BIOS scans find it."""
    image = _Image(base)
    rsdp = image.place(bytes(36), align=16)
    facs = image.place(_facs(), align=FACS_SIZE)
    dsdt = image.place(_table(b"DSDT", 2, dsdt_body(platform)))
    fadt = image.place(_fadt(platform, facs=facs, dsdt=dsdt))
    madt = image.place(_madt(platform))
    listed = [fadt, madt]
    if platform.pci is not None:
        listed.append(image.place(_mcfg(platform.pci)))
    if platform.watchdog is not None:
        listed.append(image.place(_table(b"WDAT", 1, wdat_body(platform.watchdog))))
    rsdt = image.place(_table(b"RSDT", 1, struct.pack(f"<{len(listed)}I", *listed)))
    xsdt = image.place(_table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    image.replace(rsdp, _rsdp(rsdt=rsdt, xsdt=xsdt))
    return AcpiTables(base, bytes(image.data), rsdp)


def install_tables(memory: GuestMemory, platform: AcpiPlatform) -> Gpa:
    """Write the tables below 1 MiB; returns the RSDP's address."""
    tables = build_tables(platform)
    if tables.base + len(tables.data) > GENERATION_ID:
        raise ValueError(f"ACPI tables of {len(tables.data)} bytes do not fit below {GENERATION_ID:#x}")
    memory.write(tables.base, tables.data)
    return tables.rsdp


class _Image:
    """Bytes that grow from a base address."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.data = bytearray()

    def place(self, table: bytes, *, align: int = 16) -> Gpa:
        self.data += bytes(-(self.base + len(self.data)) % align)
        address = self.base + len(self.data)
        self.data += table
        return Gpa(address)

    def replace(self, address: int, table: bytes) -> None:
        self.data[address - self.base : address - self.base + len(table)] = table


def _checksum(data: bytes) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = struct.pack(
        "<4sIBB6s8sI4sI", signature, HEADER_SIZE + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR, 1
    )
    return header[:9] + bytes([_checksum(header + body)]) + header[10:] + body


def _rsdp(*, rsdt: int, xsdt: int) -> bytes:
    """Two checksums: of the ACPI 1.0 part and of the whole."""
    first = struct.pack("<8sB6sBI", b"RSD PTR ", 0, OEM_ID, 2, rsdt)
    first = first[:8] + bytes([_checksum(first)]) + first[9:]
    rest = struct.pack("<IQB3x", 36, xsdt, 0)
    return first + rest[:12] + bytes([_checksum(first + rest)]) + rest[13:]


def _facs() -> bytes:
    version = 2
    return struct.pack("<4sIIIIIQB", b"FACS", FACS_SIZE, 0, 0, 0, 0, 0, version).ljust(FACS_SIZE, b"\0")


def _io_register(port: int, size_bytes: int) -> bytes:
    """A Generic Address Structure in port space; access size 1, 2, 3 is byte, word, double word."""
    if not size_bytes:
        return bytes(12)
    return struct.pack("<BBBBQ", IO_SPACE, size_bytes * 8, 0, size_bytes.bit_length(), port)


def _fadt(platform: AcpiPlatform, *, facs: int, dsdt: int) -> bytes:
    event, control, timer = platform.pm1_event_port, platform.pm1_control_port, platform.pm_timer_port
    boot_architecture = BOOT_LEGACY_DEVICES | BOOT_NO_VGA
    flags = WBINVD | PROC_C1 | SLEEP_BUTTON_ABSENT | TIMER_IS_32_BIT | RESET_SUPPORTED
    body = b"".join(
        (
            struct.pack("<IIBBH", facs, dsdt, 0, 0, platform.sci_gsi),
            struct.pack("<IBBBB", 0, 0, 0, 0, 0),  # no SMI command port and none of its values
            struct.pack("<8I", event, 0, control, 0, 0, timer, 0, 0),
            struct.pack("<8B", 4, 2, 0, 4, 0, 0, 0, 0),  # their lengths
            struct.pack("<HHHH", NO_C2_LATENCY, NO_C3_LATENCY, 0, 0),
            struct.pack("<BBBBB", 0, 0, 0, 0, platform.rtc_century_index),
            struct.pack("<HBI", boot_architecture, 0, flags),
            _io_register(platform.reset_port, 1),
            struct.pack("<BHB", platform.reset_value, 0, 5),  # FADT 6.5: the minor revision is here
            struct.pack("<QQ", 0, dsdt),  # the FACS is given by its 32-bit field alone
            _io_register(event, 4),
            _io_register(0, 0),
            _io_register(control, 2),
            _io_register(0, 0),
            _io_register(0, 0),
            _io_register(timer, 4),
            _io_register(0, 0) * 4,  # two GPE blocks, sleep control, sleep status
            b"Ostler\0\0",  # hypervisor vendor identity
        )
    )
    return _table(b"FACP", 6, body)


def _madt(platform: AcpiPlatform) -> bytes:
    entries = [_local_apic(uid, apic_id) for uid, apic_id in enumerate(platform.apic_ids)]
    entries.append(struct.pack("<BBBBII", MADT_IO_APIC, 12, platform.ioapic_id, 0, platform.ioapic_base, 0))
    # The PIT's line is on pin 2, as on every PC with both interrupt controllers.
    entries.append(struct.pack("<BBBBIH", MADT_OVERRIDE, 10, 0, 0, 2, 0))
    sci = platform.sci_gsi
    entries.append(struct.pack("<BBBBIH", MADT_OVERRIDE, 10, 0, sci, sci, ACTIVE_HIGH_LEVEL))
    all_processors = 0xFF
    entries.append(struct.pack("<BBBHB", MADT_LOCAL_NMI, 6, all_processors, 0, 1))
    return _table(b"APIC", 5, struct.pack("<II", platform.lapic_base, MADT_PC_COMPATIBLE) + b"".join(entries))


def _mcfg(pci: AcpiPci) -> bytes:
    """PCI Firmware 3.3 section 4.1.2: segment 0, as many buses as the size holds."""
    last_bus = (pci.ecam_size >> 20) - 1
    return _table(b"MCFG", 1, struct.pack("<8xQHBB4x", pci.ecam_base, 0, 0, last_bus))


def _local_apic(uid: int, apic_id: int) -> bytes:
    """An xAPIC identity has eight bits and 255 is the broadcast: above that only x2APIC can say it."""
    if apic_id < 0xFF:
        return struct.pack("<BBBBI", MADT_LOCAL_APIC, 8, uid, apic_id, MADT_ENABLED)
    return struct.pack("<BBHIII", MADT_LOCAL_X2APIC, 16, 0, apic_id, MADT_ENABLED, uid)

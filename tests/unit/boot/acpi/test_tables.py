"""ACPI tables: checksums, pointers, contents; and what the reference disassembler says."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from ostler.boot.acpi import AcpiGeneration, AcpiPci, AcpiPlatform, build_tables, install_tables
from ostler.boot.acpi.tables import AcpiTables
from ostler.memory import GuestMemory
from ostler.memory.layout import ACPI_LIMIT


def platform(cpus: int = 2) -> AcpiPlatform:
    return AcpiPlatform(
        apic_ids=tuple(range(cpus)),
        lapic_base=0xFEE0_0000,
        ioapic_base=0xFEC0_0000,
        ioapic_id=0,
        pm1_event_port=0x600,
        pm1_control_port=0x604,
        pm_timer_port=0x608,
        sci_gsi=9,
        reset_port=0xCF9,
        reset_value=6,
        sleep_type_s5=0,
        serial_ports=((0x3F8, 4),),
        rtc_port=0x70,
        rtc_irq=8,
        rtc_century_index=0x32,
        pvpanic_port=0x505,
        pci=AcpiPci(
            ecam_base=0xE000_0000, ecam_size=0x10_0000, low_start=0xC000_0000, low_size=0x2000_0000,
            high_start=0x78_0000_0000, high_size=0x8_0000_0000, config_port=0xCF8, pin_gsis=(16, 17, 18, 19),
        ),
        generation=AcpiGeneration(0xF_F000, 20),
    )  # fmt: skip


def at(tables: AcpiTables, address: int, size: int) -> bytes:
    offset = address - tables.base
    assert 0 <= offset <= len(tables.data) - size
    return tables.data[offset : offset + size]


def table(tables: AcpiTables, address: int) -> bytes:
    size = struct.unpack("<I", at(tables, address + 4, 4))[0]
    return at(tables, address, size)


def listed(tables: AcpiTables) -> dict[bytes, bytes]:
    xsdt = table(tables, struct.unpack("<Q", at(tables, tables.rsdp + 24, 8))[0])
    found = {xsdt[:4]: xsdt}
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        entry = table(tables, address)
        found[entry[:4]] = entry
    fadt = found[b"FACP"]
    found[b"DSDT"] = table(tables, struct.unpack_from("<Q", fadt, 140)[0])
    found[b"FACS"] = at(tables, struct.unpack_from("<I", fadt, 36)[0], 64)
    rsdt = table(tables, struct.unpack("<I", at(tables, tables.rsdp + 16, 4))[0])
    found[rsdt[:4]] = rsdt
    return found


def test_every_table_sums_to_zero_and_has_its_size() -> None:
    tables = build_tables(platform())
    found = listed(tables)
    assert set(found) == {b"XSDT", b"RSDT", b"FACP", b"APIC", b"MCFG", b"DSDT", b"FACS"}
    for signature, data in found.items():
        if signature != b"FACS":
            assert sum(data) & 0xFF == 0, signature
    rsdp = at(tables, tables.rsdp, 36)
    assert (sum(rsdp[:20]) & 0xFF, sum(rsdp) & 0xFF, tables.rsdp % 16) == (0, 0, 0)
    assert len(found[b"FACP"]) == 276


def test_rsdt_lists_what_xsdt_lists() -> None:
    found = listed(build_tables(platform()))
    narrow = [entry[0] for entry in struct.iter_unpack("<I", found[b"RSDT"][36:])]
    assert narrow == [entry[0] for entry in struct.iter_unpack("<Q", found[b"XSDT"][36:])]


def test_fadt_names_ports_and_reset() -> None:
    fadt = listed(build_tables(platform()))[b"FACP"]
    assert struct.unpack_from("<3I", fadt, 56) == (0x600, 0, 0x604)
    assert struct.unpack_from("<I", fadt, 76)[0] == 0x608
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 6)
    assert struct.unpack_from("<BBBBQ", fadt, 208) == (1, 32, 0, 3, 0x608)
    assert fadt[108] == 0x32


def test_mcfg_names_the_configuration_space_of_bus_0() -> None:
    mcfg = listed(build_tables(platform()))[b"MCFG"]
    assert struct.unpack_from("<QHBB", mcfg, 44) == (0xE000_0000, 0, 0, 0)
    assert b"MCFG" not in listed(build_tables(replace(platform(), pci=None)))


def test_madt_255_processors_fit_below_1_mib_and_large_ids_are_x2apic() -> None:
    with GuestMemory.of_size(16 << 20) as memory:
        assert install_tables(memory, platform(255)) < ACPI_LIMIT
    madt = listed(build_tables(replace(platform(), apic_ids=(0, 254, 255, 300))))[b"APIC"]
    kinds = []
    offset = 44
    while offset < len(madt):
        kinds.append(madt[offset])
        offset += madt[offset + 1]
    assert kinds == [0, 0, 9, 9, 1, 2, 2, 4]


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (acpica-tools) is not installed")
@pytest.mark.parametrize("signature", [b"DSDT", b"FACP", b"APIC", b"MCFG", b"FACS", b"XSDT"])
def test_reference_disassembler_reads_table(signature: bytes, tmp_path: Path) -> None:
    source = tmp_path / "table.dat"
    source.write_bytes(listed(build_tables(platform()))[signature])
    result = subprocess.run(
        ["iasl", "-d", str(source)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "table.dsl").read_text()
    assert "Error" not in result.stdout + result.stderr
    assert "Invalid" not in text
    if signature == b"DSDT":
        for expected in (
            "ACPI0007",
            "PNP0501",
            "QEMU0001",
            "PNP0B00",
            "_S5",
            "0x03F8",
            "0x0505",
            "PNP0A08",
            "PNP0C02",
            "_PRT",
            "VM_Gen_Counter",
            "0x000FF000",
            "ACPI0013",
            "Notify (\\_SB.VGEN, 0x80)",
            "0x00000014",
        ):
            assert expected in text
        again = subprocess.run(
            ["iasl", "-p", "again", "table.dsl"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert again.returncode == 0, again.stdout + again.stderr
        assert "0 Errors" in again.stdout

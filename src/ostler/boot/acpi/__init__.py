"""ACPI tables for Ostler's board, ACPI specification 6.5."""

from ostler.boot.acpi.platform import AcpiGeneration, AcpiPci, AcpiPlatform
from ostler.boot.acpi.tables import build_tables, install_tables
from ostler.boot.acpi.wdat import AcpiWatchdog

__all__ = ["AcpiGeneration", "AcpiPci", "AcpiPlatform", "AcpiWatchdog", "build_tables", "install_tables"]

"""ACPI tables for Ostler's board, ACPI specification 6.5."""

from ostler.boot.acpi.platform import AcpiPci, AcpiPlatform
from ostler.boot.acpi.tables import build_tables, install_tables

__all__ = ["AcpiPci", "AcpiPlatform", "build_tables", "install_tables"]

"""ACPI tables for Ostler's board, ACPI specification 6.5."""

from ostler.boot.acpi.platform import AcpiPlatform
from ostler.boot.acpi.tables import build_tables, install_tables

__all__ = ["AcpiPlatform", "build_tables", "install_tables"]

"""ACPI's fixed hardware; the tables that describe it are made in ostler.boot.acpi."""

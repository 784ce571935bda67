"""Bringing a guest to its first instruction: kernel formats, boot protocols, ACPI tables."""

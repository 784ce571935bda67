"""The processor's state at a guest's first instruction, as data; the machine applies it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class CpuMode(Enum):
    """How the first processor is set up before the first instruction."""

    PROTECTED_32 = "flat 32-bit protected mode, paging off"
    LONG_64 = "64-bit mode, identity-mapped"


@dataclass(frozen=True, slots=True)
class EntryState:
    """Where and how to start. Registers not named are zero; interrupts are off."""

    mode: CpuMode
    rip: int
    registers: Mapping[str, int] = field(default_factory=dict)
    gdt_base: int = 0
    gdt_size_bytes: int = 0
    page_table: int = 0

"""What a fake processor does, one action after the other.

A script is a generator that yields what its processor does next and receives what reads gave:

    def guest() -> Script:
        status = yield In(0x3FD)
        yield Out(0x3F8, 0x41)
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from ostler.accel.api import ExitReason


@dataclass(frozen=True, slots=True)
class Out:
    """A port write; several items make a string instruction."""

    port: int
    value: int
    size: int = 1
    count: int = 1


@dataclass(frozen=True, slots=True)
class In:
    """A port read, which the script receives as an integer."""

    port: int
    size: int = 1


@dataclass(frozen=True, slots=True)
class Store:
    """A memory write outside of slots."""

    address: int
    value: int
    size: int = 4


@dataclass(frozen=True, slots=True)
class Load:
    """A memory read outside of slots."""

    address: int
    size: int = 4


@dataclass(frozen=True, slots=True)
class Stop:
    """Any other exit."""

    reason: ExitReason
    code: int = 0


@dataclass(frozen=True, slots=True)
class Halt:
    """Wait for an interrupt line that goes up, or for a kick."""


Action = Out | In | Store | Load | Stop | Halt
Script = Generator[Action, int, None]

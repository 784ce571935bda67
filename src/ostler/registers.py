"""Registers declared once; logs and documentation derive from the declaration.

    class LSR(Register):
        "Line status, 16550D data sheet section 8.5."
        DATA_READY = bit(0)
        THR_EMPTY = bit(5)

`LSR.DATA_READY` is the mask 1, so device code stays `value & LSR.DATA_READY`;
`LSR.describe(0x21)` says "DATA_READY|THR_EMPTY". A field of several bits is `field(low, width)`
with `get` and `put`. Masks are int subclasses: arithmetic on them yields plain ints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class Bit(int):
    """A one-bit mask that knows it was declared as one."""


def bit(position: int) -> Bit:
    """Declare one bit."""
    return Bit(1 << position)


@dataclass(frozen=True, slots=True)
class Field:
    """`width` bits from bit `low` on."""

    low: int
    width: int

    @property
    def mask(self) -> int:
        """The field's bits in place."""
        return ((1 << self.width) - 1) << self.low

    def get(self, register: int) -> int:
        """The field's value out of a register's."""
        return (register & self.mask) >> self.low

    def put(self, register: int, value: int) -> int:
        """The register with the field replaced; surplus bits of `value` are cut."""
        return (register & ~self.mask) | ((value << self.low) & self.mask)


def field(low: int, width: int) -> Field:
    """Declare a field of several bits."""
    return Field(low, width)


class Register:
    """Base of a declaration; never instantiated, values are plain ints."""

    bits: ClassVar[dict[str, int]] = {}
    fields: ClassVar[dict[str, Field]] = {}

    def __init_subclass__(cls) -> None:
        """Collect what the body declares, in its order; refuse overlapping fields."""
        own = vars(cls).items()
        cls.bits = {name: int(mask) for name, mask in own if isinstance(mask, Bit)}
        cls.fields = {name: part for name, part in own if isinstance(part, Field)}
        seen = 0
        for mask in (*cls.bits.values(), *(part.mask for part in cls.fields.values())):
            if seen & mask:
                raise TypeError(f"{cls.__name__}: two declarations share bits {seen & mask:#x}")
            seen |= mask

    @classmethod
    def declared(cls) -> int:
        """All bits with a name; the others are reserved."""
        mask = 0
        for part in (*cls.bits.values(), *(f.mask for f in cls.fields.values())):
            mask |= part
        return mask

    @classmethod
    def describe(cls, value: int) -> str:
        """The value in words for a log line; undeclared bits appear as a number."""
        parts = [name for name, mask in cls.bits.items() if value & mask]
        parts += [f"{name}={part.get(value)}" for name, part in cls.fields.items()]
        rest = value & ~cls.declared()
        if rest:
            parts.append(f"{rest:#x}")
        return "|".join(parts) or "0"

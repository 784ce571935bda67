"""Page-table walks from outside: what linear address leads where, by the guest's own tables (SDM volume 3, chapter 4).

32-bit paging (with 4 MiB pages and PSE-36), PAE, 4-level and 5-level paging. A walk reads memory and changes nothing:
accessed and dirty bits stay as they are. The tables are the guest's and hostile: every level is bounded, and a table
that lies outside of memory is a fault of that walk.

Left out on purpose: who may access (CPL, SMAP, protection keys), for a debugger sees everything; translations a
processor still caches; and PDPTE registers, which PAE processors load with CR3 and which are read from memory here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

PRESENT, WRITABLE, USER = 1 << 0, 1 << 1, 1 << 2
ACCESSED, DIRTY, PAGE_SIZE_BIT = 1 << 5, 1 << 6, 1 << 7
EXECUTE_DISABLE = 1 << 63
CR0_PG = 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11
PAGE_BYTES = 0x1000
MAX_PHYSICAL_BITS = 52
NAMES = {5: "PML5E", 4: "PML4E", 3: "PDPTE", 2: "PDE", 1: "PTE"}

ReadMemory = Callable[[int, int], bytes | bytearray | memoryview]
"""Guest-physical address and size in bytes; raises an exception of its own kind outside of memory."""


class Mode(Enum):
    """How linear addresses are translated."""

    NONE = "no paging"
    BITS_32 = "32-bit"
    PAE = "PAE"
    LEVEL_4 = "4-level"
    LEVEL_5 = "5-level"


@dataclass(frozen=True, slots=True)
class Paging:
    """The registers a walk depends on."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    physical_bits: int = MAX_PHYSICAL_BITS
    """MAXPHYADDR: entries that name higher addresses are faults."""

    @property
    def mode(self) -> Mode:
        """SDM volume 3, 4.1.1."""
        if not self.cr0 & CR0_PG:
            return Mode.NONE
        if not self.cr4 & CR4_PAE:
            return Mode.BITS_32
        if not self.efer & EFER_LMA:
            return Mode.PAE
        return Mode.LEVEL_5 if self.cr4 & CR4_LA57 else Mode.LEVEL_4


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a table, as it was read."""

    level: int
    """5 to 1; a PTE is 1."""
    gpa: int
    value: int

    @property
    def name(self) -> str:
        """As the SDM calls it."""
        return NAMES[self.level]


@dataclass(frozen=True, slots=True)
class Walk:
    """Where one linear address leads, and by which way."""

    linear: int
    entries: tuple[Entry, ...] = ()
    physical: int | None = None
    """Of the very byte; None where `fault` says why."""
    page_bytes: int = 0
    writable: bool = True
    user: bool = True
    executable: bool = True
    fault: str = ""

    @property
    def accessed(self) -> bool:
        """Of the page; true without paging."""
        return not self.entries or bool(self.entries[-1].value & ACCESSED)

    @property
    def dirty(self) -> bool:
        """Of the page; true without paging."""
        return not self.entries or bool(self.entries[-1].value & DIRTY)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What differs between the modes."""

    levels: int
    entry_bytes: int
    index_bits: int
    linear_bits: int
    large_levels: tuple[int, ...]


_SHAPES = {
    Mode.BITS_32: _Shape(2, 4, 10, 32, (2,)),
    Mode.PAE: _Shape(3, 8, 9, 32, (2,)),
    Mode.LEVEL_4: _Shape(4, 8, 9, 48, (2, 3)),
    Mode.LEVEL_5: _Shape(5, 8, 9, 57, (2, 3)),
}


class Walker:
    """Walks one set of tables."""

    def __init__(self, paging: Paging, read: ReadMemory, *, outside: type[Exception]) -> None:
        """`outside` is what `read` raises for an address that is no memory."""
        self.paging = paging
        self.mode = paging.mode
        self._read, self._outside = read, outside
        if self.mode is not Mode.NONE:
            self._shape = _SHAPES[self.mode]

    def walk(self, linear: int) -> Walk:
        """Translate one linear address."""
        if self.mode is Mode.NONE:
            return Walk(linear, (), linear & 0xFFFF_FFFF, PAGE_BYTES)
        if not self._is_canonical(linear):
            return Walk(linear, fault=f"not canonical in {self.mode.value} paging")
        shape, entries, table = self._shape, list[Entry](), self._root()
        writable = user = executable = True
        for level in range(shape.levels, 0, -1):
            shift = 12 + shape.index_bits * (level - 1)
            gpa = table + (linear >> shift & (1 << shape.index_bits) - 1) * shape.entry_bytes
            try:
                value = int.from_bytes(self._read(gpa, shape.entry_bytes), "little")
            except self._outside:
                return Walk(linear, tuple(entries), fault=f"{NAMES[level]} at {gpa:#x}: outside of memory")
            entries.append(Entry(level, gpa, value))
            if not value & PRESENT:
                return Walk(linear, tuple(entries), fault=f"{NAMES[level]} at {gpa:#x}: not present")
            is_page = level == 1 or self._is_large(level, value)
            if self._reserved(level, is_page=is_page) & value:
                return Walk(linear, tuple(entries), fault=f"{NAMES[level]} at {gpa:#x}: reserved bits set")
            if not (self.mode is Mode.PAE and level == 3):
                writable, user = writable and bool(value & WRITABLE), user and bool(value & USER)
                executable = executable and not self._disables_execution(value)
            if is_page:
                physical = self._frame(level, value) | linear & (1 << shift) - 1
                return Walk(linear, tuple(entries), physical, 1 << shift, writable, user, executable)
            table = self._table(value)
        raise AssertionError("the last level is a page or a fault")

    def physical_pages(self, linear: int, count: int) -> Iterator[int | None]:
        """Guest-physical address of each of `count` 4 KiB pages from `linear` on, None where there is none."""
        at, end = linear, linear + count * PAGE_BYTES
        while at < end:
            found = self.walk(at)
            if found.physical is None:
                yield None
                at += PAGE_BYTES
                continue
            # One walk for all of a large page.
            inside = min(end, at + found.page_bytes - (at & found.page_bytes - 1))
            yield from range(found.physical, found.physical + inside - at, PAGE_BYTES)
            at = inside

    def _is_canonical(self, linear: int) -> bool:
        bits = self._shape.linear_bits
        if bits == 32:
            return 0 <= linear < 1 << 32
        return 0 <= linear < 1 << 64 and linear >> bits - 1 in {0, (1 << 64 - bits + 1) - 1}

    def _root(self) -> int:
        cr3 = self.paging.cr3
        if self.mode is Mode.BITS_32:
            return cr3 & 0xFFFF_F000
        if self.mode is Mode.PAE:
            return cr3 & 0xFFFF_FFE0
        return cr3 & self._address_mask

    @property
    def _address_mask(self) -> int:
        return (1 << self.paging.physical_bits) - 1 & ~(PAGE_BYTES - 1)

    def _is_large(self, level: int, value: int) -> bool:
        if self.mode is Mode.BITS_32 and not self.paging.cr4 & CR4_PSE:
            return False
        return level in self._shape.large_levels and bool(value & PAGE_SIZE_BIT)

    def _disables_execution(self, value: int) -> bool:
        return self._shape.entry_bytes == 8 and bool(self.paging.efer & EFER_NXE and value & EXECUTE_DISABLE)

    def _reserved(self, level: int, *, is_page: bool) -> int:
        """SDM volume 3, tables 4-4 to 4-20, as far as this processor has the features."""
        physical_bits = self.paging.physical_bits
        if self.mode is Mode.BITS_32:
            if not is_page or level == 1:
                return 0
            # PSE-36: bits 20:13 are address bits 39:32.
            used = max(min(physical_bits, 40) - 32, 0)
            return 1 << 21 | ((1 << 8) - (1 << used)) << 13
        above = (1 << MAX_PHYSICAL_BITS) - (1 << physical_bits)
        no_execute = 0 if self.paging.efer & EFER_NXE else EXECUTE_DISABLE
        if self.mode is Mode.PAE:
            if level == 3:
                return 0b1_1110_0110 | above | 0xFFF << 52
            above |= 0x7FF << 52
        if level >= 4:
            return above | no_execute | PAGE_SIZE_BIT
        if is_page and level > 1:
            above |= (1 << 12 + 9 * (level - 1)) - (1 << 13)
        return above | no_execute

    def _table(self, value: int) -> int:
        return value & (0xFFFF_F000 if self.mode is Mode.BITS_32 else self._address_mask)

    def _frame(self, level: int, value: int) -> int:
        if self.mode is Mode.BITS_32:
            if level == 1:
                return value & 0xFFFF_F000
            return value & 0xFFC0_0000 | (value >> 13 & 0xFF) << 32
        return value & self._address_mask & -(1 << 12 + 9 * (level - 1))

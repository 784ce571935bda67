"""The 64-bit Linux boot protocol: zero page, identity page tables, entry in long mode.

Linux Documentation/arch/x86/{boot,zero-page}.rst. The page tables cover the first 4 GiB with
2 MiB pages: kernel, zero page, command line and initrd all lie there. A plain 64-bit ELF program
is entered the same way, so that it finds the same things in RSI.
"""

from __future__ import annotations

import struct

from ostler.boot.bzimage import HEADER_START
from ostler.boot.entry import CpuMode, EntryState
from ostler.boot.kernel import Kernel
from ostler.boot.lowmem import GDT_BASE, PAGE_TABLES, ZERO_PAGE, memory_map, write_cmdline, write_gdt
from ostler.memory import GuestMemory
from ostler.memory.layout import PAGE_SIZE

E820_MAX = 128
LOADER_UNDEFINED = 0xFF
PRESENT_WRITABLE, LARGE = 0x3, 0x80
IDENTITY_GIB = 4


def enter_linux64(
    memory: GuestMemory, kernel: Kernel, *, cmdline: str, initrd: tuple[int, int] | None, rsdp: int
) -> EntryState:
    """Write zero page and page tables; RSI points to the former."""
    line = write_cmdline(memory, cmdline, limit=kernel.cmdline_limit)
    page = bytearray(PAGE_SIZE)
    header = kernel.setup_header or _bare_header()
    page[HEADER_START : HEADER_START + len(header)] = header
    page[0x210] = LOADER_UNDEFINED
    struct.pack_into("<Q", page, 0x070, rsdp)
    struct.pack_into("<I", page, 0x228, line)
    if initrd:
        struct.pack_into("<II", page, 0x218, *initrd)
    entries = memory_map(memory)[:E820_MAX]
    page[0x1E8] = len(entries)
    for index, entry in enumerate(entries):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * index, entry.start, entry.size_bytes, entry.kind)
    memory.write(ZERO_PAGE, page)
    _write_page_tables(memory)
    size = write_gdt(memory, long_mode=True)
    return EntryState(
        CpuMode.LONG_64,
        rip=kernel.entry,
        registers={"rsi": ZERO_PAGE},
        gdt_base=GDT_BASE,
        gdt_size_bytes=size,
        page_table=PAGE_TABLES,
    )


def _bare_header() -> bytes:
    """What a vmlinux without a setup header still looks at: signature and protocol version."""
    header = bytearray(0x268 - HEADER_START)
    struct.pack_into("<H", header, 0x1FE - HEADER_START, 0xAA55)
    header[0x202 - HEADER_START : 0x206 - HEADER_START] = b"HdrS"
    struct.pack_into("<H", header, 0x206 - HEADER_START, 0x020C)
    return bytes(header)


def _write_page_tables(memory: GuestMemory) -> None:
    """One table of each upper level, then a directory for each GiB."""
    pointers_at, directories_at = PAGE_TABLES + PAGE_SIZE, PAGE_TABLES + 2 * PAGE_SIZE
    top = struct.pack("<Q", pointers_at | PRESENT_WRITABLE).ljust(PAGE_SIZE, b"\0")
    pointers = [directories_at + gib * PAGE_SIZE | PRESENT_WRITABLE for gib in range(IDENTITY_GIB)]
    entries = [index << 21 | PRESENT_WRITABLE | LARGE for index in range(IDENTITY_GIB * 512)]
    memory.write(PAGE_TABLES, top)
    memory.write(pointers_at, struct.pack(f"<{IDENTITY_GIB}Q", *pointers).ljust(PAGE_SIZE, b"\0"))
    memory.write(directories_at, struct.pack(f"<{len(entries)}Q", *entries))

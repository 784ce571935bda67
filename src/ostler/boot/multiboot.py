"""Multiboot 1 programs: finding the header, and the information structure handed over.

Multiboot specification 0.6.96. Offered: memory sizes and map, command line, one module (the
initrd), the loader's name; ELF files and the header's own address fields. A program that insists
on a video mode is refused, as the specification asks.
"""

from __future__ import annotations

import struct

from ostler.boot.elf import ElfFile
from ostler.boot.entry import CpuMode, EntryState
from ostler.boot.kernel import Kernel, Protocol, Segment
from ostler.boot.lowmem import CMDLINE_MAX, GDT_BASE, INFO_BASE, MapEntry, memory_map, write_cmdline, write_gdt
from ostler.errors import KernelError
from ostler.memory import GuestMemory
from ostler.memory.layout import HIGH_MEMORY_START

HEADER_MAGIC, BOOT_MAGIC = 0x1BADB002, 0x2BADB002
SEARCH_BYTES = 8192
ALIGN_MODULES, WANT_MEMORY, ADDRESS_FIELDS = 1 << 0, 1 << 1, 1 << 16
MUST_UNDERSTAND = 0xFFFF & ~(ALIGN_MODULES | WANT_MEMORY)

INFO_MEMORY, INFO_CMDLINE, INFO_MODULES, INFO_MAP, INFO_LOADER = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
INFO_SIZE = 120
LOADER_NAME = b"ostler\0"


def find_header(data: memoryview) -> int | None:
    """The offset of a header with a right checksum in the first 8 KiB; None without one."""
    searched = bytes(data[: SEARCH_BYTES + 12])
    at = -1
    while (at := searched.find(HEADER_MAGIC.to_bytes(4, "little"), at + 1)) >= 0:
        if at % 4 or at + 12 > min(len(searched), SEARCH_BYTES):
            continue
        magic, flags, checksum = struct.unpack_from("<III", searched, at)
        if (magic + flags + checksum) & 0xFFFF_FFFF == 0:
            return at
    return None


def multiboot_kernel(data: memoryview, name: str, *, header: int, elf: ElfFile | None) -> Kernel:
    """Build from the ELF segments or from the header's address fields. Raises KernelError."""
    (flags,) = struct.unpack_from("<I", data, header + 4)
    if flags & MUST_UNDERSTAND:
        raise KernelError(f"{name}: multiboot header wants flags {flags:#x}: only 0x3 and 0x10000 can be given")
    if elf is not None and not flags & ADDRESS_FIELDS:
        if elf.entry >= 1 << 32:
            raise KernelError(f"{name}: multiboot entry {elf.entry:#x}: expected a 32-bit address")
        return Kernel(name, Protocol.MULTIBOOT, elf.segments, elf.entry, CMDLINE_MAX - 1)
    if not flags & ADDRESS_FIELDS:
        raise KernelError(f"{name}: multiboot program is no ELF file and gives no load addresses")
    return _from_address_fields(data, name, header)


def _from_address_fields(data: memoryview, name: str, header: int) -> Kernel:
    if len(data) < header + 32:
        raise KernelError(f"{name}: multiboot header at {header:#x} is truncated")
    header_addr, load_addr, load_end, bss_end, entry = struct.unpack_from("<5I", data, header + 12)
    start = header - (header_addr - load_addr)
    size = load_end - load_addr if load_end else len(data) - start
    if header_addr < load_addr or start < 0 or size <= 0 or start + size > len(data):
        raise KernelError(f"{name}: multiboot load addresses {load_addr:#x} to {load_end:#x} do not fit the file")
    segment = Segment(load_addr, data[start : start + size], max(bss_end - load_addr, size))
    return Kernel(name, Protocol.MULTIBOOT, (segment,), entry, CMDLINE_MAX - 1)


def enter_multiboot(memory: GuestMemory, kernel: Kernel, *, cmdline: str, initrd: tuple[int, int] | None) -> EntryState:
    """Write the information structure. As other loaders do, the file's name leads the command line."""
    line = write_cmdline(memory, f"{kernel.name} {cmdline}".rstrip(), limit=kernel.cmdline_limit)
    modules_at = INFO_BASE + INFO_SIZE
    map_at = modules_at + 16
    entries = memory_map(memory)
    map_data = b"".join(struct.pack("<IQQI", 20, e.start, e.size_bytes, e.kind) for e in entries)
    name_at = map_at + len(map_data)
    flags = INFO_MEMORY | INFO_CMDLINE | INFO_MAP | INFO_LOADER | (INFO_MODULES if initrd else 0)
    info = struct.pack(
        "<7I16x2I", flags, 640 - 1, _upper_kib(entries), 0, line, 1 if initrd else 0, modules_at, len(map_data), map_at
    )
    memory.write(INFO_BASE, info.ljust(64, b"\0") + struct.pack("<I", name_at).ljust(INFO_SIZE - 64, b"\0"))
    if initrd:
        memory.write(modules_at, struct.pack("<4I", initrd[0], initrd[0] + initrd[1], line, 0))
    memory.write(map_at, map_data + LOADER_NAME)
    size = write_gdt(memory, long_mode=False)
    return EntryState(
        CpuMode.PROTECTED_32,
        rip=kernel.entry,
        registers={"rax": BOOT_MAGIC, "rbx": INFO_BASE},
        gdt_base=GDT_BASE,
        gdt_size_bytes=size,
    )


def _upper_kib(entries: list[MapEntry]) -> int:
    """KiB of RAM from 1 MiB up to the first hole."""
    return next(entry.size_bytes for entry in entries if entry.start == HIGH_MEMORY_START) >> 10

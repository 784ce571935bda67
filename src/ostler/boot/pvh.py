"""The PVH entry: hvm_start_info and what it points to, Xen's public start_info.h, version 1."""

from __future__ import annotations

import struct

from ostler.boot.entry import CpuMode, EntryState
from ostler.boot.kernel import Kernel
from ostler.boot.lowmem import GDT_BASE, INFO_BASE, memory_map, write_cmdline, write_gdt
from ostler.memory import GuestMemory

START_MAGIC = 0x336EC578
VERSION = 1
START_INFO_SIZE, MODULE_SIZE = 56, 32


def enter_pvh(
    memory: GuestMemory, kernel: Kernel, *, cmdline: str, initrd: tuple[int, int] | None, rsdp: int
) -> EntryState:
    """Write start info, module list and memory map; EBX points to the first."""
    line = write_cmdline(memory, cmdline, limit=kernel.cmdline_limit)
    modules_at = INFO_BASE + START_INFO_SIZE
    map_at = modules_at + MODULE_SIZE
    entries = memory_map(memory)
    modules = (modules_at, 1) if initrd else (0, 0)
    info = struct.pack(
        "<4I4Q2I",
        START_MAGIC, VERSION, 0, modules[1], modules[0], line, rsdp, map_at, len(entries), 0,
    )  # fmt: skip
    memory.write(INFO_BASE, info)
    address, size_bytes = initrd or (0, 0)
    memory.write(modules_at, struct.pack("<4Q", address, size_bytes, 0, 0))
    memory.write(map_at, b"".join(struct.pack("<QQII", e.start, e.size_bytes, e.kind, 0) for e in entries))
    size = write_gdt(memory, long_mode=False)
    return EntryState(
        CpuMode.PROTECTED_32,
        rip=kernel.entry,
        registers={"rbx": INFO_BASE},
        gdt_base=GDT_BASE,
        gdt_size_bytes=size,
    )

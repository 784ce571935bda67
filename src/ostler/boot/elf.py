"""Kernels that are ELF files: a vmlinux with a PVH note, or a plain 64-bit program.

pyelftools reads the structures; what it makes of a hostile file is checked here, because it
raises whatever comes to hand and trusts sizes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ostler.boot.kernel import MAX_KERNEL_BYTES, Kernel, Protocol, Segment
from ostler.errors import KernelError

ELF_MAGIC = b"\x7fELF"
# Linux: COMMAND_LINE_SIZE of x86, the final zero included.
LINUX_CMDLINE_MAX = 2047
MAX_PROGRAM_HEADERS = 256
MAX_NOTE_BYTES = 64 << 10
XEN_ELFNOTE_PHYS32_ENTRY = 18

MACHINES = {3: "EM_386", 62: "EM_X86_64"}


@dataclass(frozen=True, slots=True)
class ElfFile:
    """A checked ELF executable for x86."""

    name: str
    machine: str
    is_64_bit: bool
    entry: int
    segments: tuple[Segment, ...]
    pvh_entry: int | None


def parse_elf(data: memoryview, name: str) -> ElfFile:
    """Raises KernelError for anything that is not an x86 executable."""
    try:
        return _parse(data, name)
    except KernelError:
        raise
    except Exception as error:
        # pyelftools has no closed set of exceptions for malformed files.
        raise KernelError(f"{name}: malformed ELF file: {str(error) or type(error).__name__}") from error


def _parse(data: memoryview, name: str) -> ElfFile:
    from elftools.elf.elffile import ELFFile

    elf = ELFFile(io.BytesIO(data))
    machine = elf.header["e_machine"]
    if machine not in MACHINES.values() or not elf.little_endian:
        raise KernelError(f"{name}: ELF file for {machine}: expected EM_X86_64")
    if elf.header["e_type"] not in ("ET_EXEC", "ET_DYN"):
        raise KernelError(f"{name}: ELF file of type {elf.header['e_type']}: expected an executable")
    count = elf.num_segments()
    if not 0 < count <= MAX_PROGRAM_HEADERS:
        raise KernelError(f"{name}: ELF file with {count} program headers: expected 1 to {MAX_PROGRAM_HEADERS}")
    segments: list[Segment] = []
    pvh_entry: int | None = None
    for index in range(count):
        header = elf.get_segment(index).header
        if header["p_type"] == "PT_LOAD" and header["p_memsz"]:
            segments.append(_load_segment(data, name, header))
        elif header["p_type"] == "PT_NOTE" and pvh_entry is None:
            pvh_entry = _pvh_note(data, header)
    if not segments:
        raise KernelError(f"{name}: ELF file without a loadable segment")
    if sum(segment.size_bytes for segment in segments) > MAX_KERNEL_BYTES:
        raise KernelError(f"{name}: ELF segments of more than {MAX_KERNEL_BYTES} bytes")
    return ElfFile(name, machine, elf.elfclass == 64, int(elf.header["e_entry"]), tuple(segments), pvh_entry)


def _load_segment(data: memoryview, name: str, header: Any) -> Segment:
    start, file_size, memory_size = int(header["p_offset"]), int(header["p_filesz"]), int(header["p_memsz"])
    if start + file_size > len(data):
        raise KernelError(f"{name}: ELF segment ends at {start + file_size:#x}: the file has {len(data):#x} bytes")
    if file_size > memory_size:
        raise KernelError(f"{name}: ELF segment of {file_size:#x} bytes in {memory_size:#x} bytes of memory")
    return Segment(int(header["p_paddr"]), data[start : start + file_size], memory_size)


def _pvh_note(data: memoryview, header: Any) -> int | None:
    """The physical 32-bit entry point a Xen-style note names; 4 or 8 bytes by ELF class."""
    start, size = int(header["p_offset"]), int(header["p_filesz"])
    if size > MAX_NOTE_BYTES or start + size > len(data):
        return None
    for owner, kind, descriptor in _notes(data[start : start + size]):
        if owner == b"Xen" and kind == XEN_ELFNOTE_PHYS32_ENTRY and len(descriptor) in (4, 8):
            return int.from_bytes(descriptor, "little")
    return None


def _notes(data: memoryview) -> Iterator[tuple[bytes, int, bytes]]:
    """Owner, type and descriptor of each note; both strings are padded to four bytes."""
    at = 0
    while at + 12 <= len(data):
        name_size, size, kind = (int.from_bytes(data[at + i : at + i + 4], "little") for i in (0, 4, 8))
        at += 12
        descriptor = at + (name_size + 3 & ~3)
        if descriptor + size > len(data):
            return
        yield bytes(data[at : at + name_size]).rstrip(b"\0"), kind, bytes(data[descriptor : descriptor + size])
        at = descriptor + (size + 3 & ~3)


def pvh_kernel(elf: ElfFile) -> Kernel:
    """The ELF file as a PVH kernel. Raises KernelError without the note."""
    if elf.pvh_entry is None:
        raise KernelError(f"{elf.name}: kernel without a PVH entry note: expected one built with CONFIG_PVH")
    if elf.pvh_entry >= 1 << 32:
        raise KernelError(f"{elf.name}: PVH entry {elf.pvh_entry:#x}: expected a 32-bit address")
    return Kernel(elf.name, Protocol.PVH, elf.segments, elf.pvh_entry, LINUX_CMDLINE_MAX)


def elf64_kernel(elf: ElfFile) -> Kernel:
    """The ELF file entered at e_entry in 64-bit mode. Raises KernelError for a 32-bit one."""
    if not elf.is_64_bit:
        raise KernelError(f"{elf.name}: 32-bit ELF file without a PVH note or a multiboot header")
    inside = any(segment.gpa <= elf.entry < segment.end for segment in elf.segments)
    if not inside:
        raise KernelError(
            f"{elf.name}: ELF entry {elf.entry:#x} is outside of the loaded segments and there is no PVH note"
        )
    return Kernel(elf.name, Protocol.ELF64, elf.segments, elf.entry, LINUX_CMDLINE_MAX)

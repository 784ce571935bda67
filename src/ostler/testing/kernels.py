"""Small kernels in every format, made in memory: what loaders are tested with."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable, Sequence

EM_386, EM_X86_64, EM_AARCH64 = 3, 62, 183
PT_LOAD, PT_NOTE = 1, 4


def xen_note(entry: int, *, kind: int = 18, size: int = 4) -> bytes:
    """The note that names the PVH entry."""
    return struct.pack("<III", 4, size, kind) + b"Xen\0" + entry.to_bytes(size, "little").ljust((size + 3) & ~3, b"\0")


def elf64(
    code: bytes = b"\xf4" * 64,
    *,
    load: int = 0x10_0000,
    memory_size: int | None = None,
    note: bytes = b"",
    machine: int = EM_X86_64,
    entry: int | None = None,
) -> bytes:
    """An executable with one loadable segment and, perhaps, a note segment."""
    headers = 2 if note else 1
    code_at = 64 + 56 * headers + (-(64 + 56 * headers) % 16)
    note_at = code_at + len(code) + (-len(code) % 4)
    size = len(code) if memory_size is None else memory_size
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    start = load if entry is None else entry
    image = ident + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, start, 64, 0, 0, 64, 56, headers, 64, 0, 0)
    image += struct.pack("<IIQQQQQQ", PT_LOAD, 7, code_at, load, load, len(code), size, 16)
    if note:
        image += struct.pack("<IIQQQQQQ", PT_NOTE, 4, note_at, 0, 0, len(note), len(note), 4)
    return image.ljust(code_at, b"\0") + code.ljust(note_at - code_at, b"\0") + note


def elf32(code: bytes = b"\xf4" * 64, *, load: int = 0x10_0000, machine: int = EM_386) -> bytes:
    """A 32-bit executable with one loadable segment."""
    ident = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    image = ident + struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, load, 52, 0, 0, 52, 32, 1, 40, 0, 0)
    image += struct.pack("<IIIIIIII", PT_LOAD, 96, load, load, len(code), len(code), 7, 16)
    return image.ljust(96, b"\0") + code


def multiboot_header(flags: int = 0, fields: Sequence[int] = ()) -> bytes:
    """Magic, flags, checksum and, perhaps, the address fields."""
    magic = 0x1BADB002
    return struct.pack(f"<{3 + len(fields)}I", magic, flags, -(magic + flags) & 0xFFFF_FFFF, *fields)


def lz4_legacy(data: bytes) -> bytes:
    """Frames as `lz4 -l` makes them."""
    import lz4.block

    parts = [0x184C2102.to_bytes(4, "little")]
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        parts.append(len(block).to_bytes(4, "little") + block)
    return b"".join(parts)


def zstd(data: bytes) -> bytes:
    """One zstd frame."""
    import sys

    if sys.version_info >= (3, 14):
        from compression import zstd as codec
    else:
        from backports import zstd as codec

    return codec.compress(data)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data)[:-4],
    "LZ4": lz4_legacy,
    "zstd": zstd,
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ),
    "bzip2": bz2.compress,
    "LZMA": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}


def payload(data: bytes, method: str, *, claimed_size: int | None = None) -> bytes:
    """Compressed, with the unpacked size in the last four bytes (gzip ends in it by itself)."""
    size = len(data) if claimed_size is None else claimed_size
    return COMPRESSORS[method](data) + size.to_bytes(4, "little")


def bzimage(packed: bytes, *, version: int = 0x020F, xloadflags: int = 1, init_size: int = 0x10_0000) -> bytes:
    """A bzImage with one setup sector besides the first, around a payload."""
    code = b"\x90" * 0x400 + packed
    code += bytes(-len(code) % 16)
    setup = bytearray(1024)
    setup[0x1F1] = 1
    struct.pack_into("<I", setup, 0x1F4, len(code) // 16)
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x200:0x202] = b"\xeb\x66"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<I", setup, 0x22C, 0x7FFF_FFFF)
    struct.pack_into("<IBBHI", setup, 0x230, 0x20_0000, 1, 21, xloadflags, 2047)
    struct.pack_into("<IIQQI", setup, 0x248, 0x400, len(packed), 0, 0x100_0000, init_size)
    return bytes(setup) + code

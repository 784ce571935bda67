"""Unpacking the compressed vmlinux inside a bzImage, in bounded memory and time.

The build puts the unpacked size in the last four bytes of every payload. It bounds the output
before a byte is unpacked, and the output must then have exactly that size: a file that lies
either way is refused. LZO is known and not supported.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from ostler.boot.kernel import MAX_KERNEL_BYTES
from ostler.errors import KernelError

if TYPE_CHECKING:
    Unpack = Callable[[memoryview, int], bytes]

LZ4_MAGIC = 0x184C2102
# The legacy frame format fixes the block size.
LZ4_BLOCK_BYTES = 8 << 20
# Far above what `xz -9` needs (65 MiB), far below what a crafted header can ask for.
LZMA_MEMORY_BYTES = 256 << 20


def unpack(payload: memoryview, name: str) -> bytes:
    """The vmlinux inside. Raises KernelError naming the file."""
    if len(payload) < 8:
        raise KernelError(f"{name}: payload of {len(payload)} bytes: expected a compressed kernel")
    size = int.from_bytes(payload[-4:], "little")
    if not 0 < size <= MAX_KERNEL_BYTES:
        raise KernelError(f"{name}: kernel says it unpacks to {size} bytes: expected at most {MAX_KERNEL_BYTES}")
    format_name, unpacker = _unpacker(payload, name)
    try:
        data = unpacker(payload, size)
    except Exception as error:
        # Every codec has exceptions of its own, and none of them is a bug of ours here.
        raise KernelError(
            f"{name}: {format_name} payload does not unpack: {str(error) or type(error).__name__}"
        ) from error
    if len(data) != size:
        raise KernelError(f"{name}: {format_name} payload unpacks to {len(data)} bytes or more: expected {size}")
    return data


def _unpacker(payload: memoryview, name: str) -> tuple[str, Unpack]:
    formats: tuple[tuple[str, bytes, Unpack], ...] = (
        ("gzip", b"\x1f\x8b", _gzip),
        ("LZ4", LZ4_MAGIC.to_bytes(4, "little"), _lz4),
        ("zstd", b"\x28\xb5\x2f\xfd", _zstd),
        ("xz", b"\xfd7zXZ\0", _xz),
        ("bzip2", b"BZh", _bzip2),
        ("LZMA", b"\x5d\0\0", _lzma),
    )
    for format_name, magic, unpacker in formats:
        if payload[: len(magic)] == magic:
            return format_name, unpacker
    start = bytes(payload[:4]).hex(" ")
    raise KernelError(f"{name}: payload starts with {start}: expected gzip, LZ4, zstd, xz, bzip2 or LZMA")


# Each of these yields up to one byte more than expected, which is enough to see a lie.


def _gzip(payload: memoryview, size: int) -> bytes:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(payload, size + 1)


def _bzip2(payload: memoryview, size: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(payload, size + 1)


def _xz(payload: memoryview, size: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, LZMA_MEMORY_BYTES).decompress(payload, size + 1)


def _lzma(payload: memoryview, size: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, LZMA_MEMORY_BYTES).decompress(payload, size + 1)


def _zstd(payload: memoryview, size: int) -> bytes:
    import sys

    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    return zstd.ZstdDecompressor().decompress(payload, size + 1)


def _lz4(payload: memoryview, size: int) -> bytes:
    """Legacy frames: a magic word, then blocks that each follow their compressed length."""
    import lz4.block

    parts: list[bytes] = []
    total = 0
    at, end = 4, len(payload) - 4
    while at + 4 <= end and total <= size:
        length = int.from_bytes(payload[at : at + 4], "little")
        at += 4
        if length == LZ4_MAGIC:
            continue
        if not 0 < length <= end - at:
            raise ValueError(f"block of {length} bytes at {at:#x} where {end - at} are left")
        block: bytes = lz4.block.decompress(payload[at : at + length], uncompressed_size=LZ4_BLOCK_BYTES)
        parts.append(block)
        total += len(block)
        at += length
    return b"".join(parts)

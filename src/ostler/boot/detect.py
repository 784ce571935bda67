"""Which kernel format a file is, and what it is reduced to. A malformed one is a KernelError that names the file."""

from __future__ import annotations

from ostler.boot.bzimage import BzImage
from ostler.boot.elf import ELF_MAGIC, elf64_kernel, parse_elf, pvh_kernel
from ostler.boot.kernel import Kernel, Protocol
from ostler.boot.multiboot import find_header, multiboot_kernel
from ostler.errors import KernelError


def detect(data: memoryview, name: str, wanted: Protocol | None) -> Kernel:
    """Find out what a file is and take it apart; `wanted` insists on a way to enter it. Raises KernelError."""
    image = BzImage.parse(data, name)
    if image is not None:
        return _from_bzimage(image, wanted)
    header = find_header(data)
    if data[:4] == ELF_MAGIC:
        elf = parse_elf(data, name)
        if elf.pvh_entry is not None and wanted in (None, Protocol.PVH):
            return pvh_kernel(elf)
        if header is not None and wanted in (None, Protocol.MULTIBOOT):
            return multiboot_kernel(data, name, header=header, elf=elf)
        return pvh_kernel(elf) if wanted is Protocol.PVH else elf64_kernel(elf)
    if header is not None:
        return multiboot_kernel(data, name, header=header, elf=None)
    kind = _describe(data)
    raise KernelError(f"{name}: {kind}: expected a bzImage, an x86-64 ELF kernel or a multiboot program")


def _from_bzimage(image: BzImage, wanted: Protocol | None) -> Kernel:
    if wanted is Protocol.LINUX64:
        return image.kernel()
    elf = parse_elf(memoryview(image.vmlinux()), image.name)
    if elf.pvh_entry is None and wanted is None and image.has_64_bit_entry:
        return image.kernel()
    if elf.pvh_entry is None:
        raise KernelError(f"{image.name}: kernel has neither a PVH note nor a 64-bit entry: expected one of them")
    return pvh_kernel(elf)


def _describe(data: memoryview) -> str:
    if not data:
        return "empty file"
    if bytes(data[0x202:0x206]) == b"HdrS":
        return "bzImage cut off within its header"
    sample = bytes(data[:512])
    if all(byte in b"\t\n\r\f\b\x1b" or byte >= 0x20 for byte in sample):
        return "text file"
    return f"file starting with {sample[:4].hex(' ')}"

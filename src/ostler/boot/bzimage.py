"""The bzImage container, Linux Documentation/arch/x86/boot.rst.

Two things can be had from it: the vmlinux inside, to be entered by PVH, and the image itself, to
be entered at its 64-bit entry point, where it unpacks itself in the guest.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from ostler.boot.kernel import Kernel, Protocol, Segment
from ostler.boot.payload import unpack
from ostler.errors import KernelError

SECTOR = 512
HEADER_START = 0x1F1
# Protocol 2.08 brought the payload fields, 2.12 the 64-bit entry.
OLDEST_VERSION = 0x0208
XLF_KERNEL_64 = 1 << 0
ENTRY_64_OFFSET = 0x200


def is_bzimage(data: memoryview) -> bool:
    """Whether the file calls itself one."""
    return len(data) >= 0x264 and bytes(data[0x1FE:0x200]) == b"\x55\xaa" and bytes(data[0x202:0x206]) == b"HdrS"


@dataclass(frozen=True, slots=True)
class BzImage:
    """The fields of the setup header that a loader needs; names are the document's."""

    name: str
    data: memoryview
    setup_sects: int
    syssize: int
    version: int
    initrd_addr_max: int
    kernel_alignment: int
    relocatable_kernel: bool
    xloadflags: int
    cmdline_size: int
    payload_offset: int
    payload_length: int
    pref_address: int
    init_size: int

    @classmethod
    def parse(cls, data: memoryview, name: str) -> Self | None:
        """None if this is no bzImage at all. Raises KernelError for a broken or an old one."""
        if not is_bzimage(data):
            return None
        (version,) = struct.unpack_from("<H", data, 0x206)
        if version < OLDEST_VERSION:
            found = f"{version >> 8}.{version & 0xFF:02d}"
            raise KernelError(f"{name}: bzImage of boot protocol {found}: expected 2.08 or newer")
        alignment, relocatable, _, xloadflags, cmdline_size = struct.unpack_from("<IBBHI", data, 0x230)
        payload_offset, payload_length, _, pref_address, init_size = struct.unpack_from("<IIQQI", data, 0x248)
        image = cls(
            name=name,
            data=data,
            setup_sects=data[0x1F1] or 4,
            syssize=struct.unpack_from("<I", data, 0x1F4)[0],
            version=version,
            initrd_addr_max=struct.unpack_from("<I", data, 0x22C)[0],
            kernel_alignment=alignment,
            relocatable_kernel=bool(relocatable),
            xloadflags=xloadflags,
            cmdline_size=cmdline_size,
            payload_offset=payload_offset,
            payload_length=payload_length,
            pref_address=pref_address,
            init_size=init_size,
        )
        expected = image.protected_start + image.syssize * 16
        # The build rounds syssize up to 16 bytes; anything more that is missing was cut off.
        if len(data) + 16 <= expected:
            raise KernelError(f"{name}: bzImage of {len(data)} bytes is truncated: expected {expected}")
        return image

    @property
    def protected_start(self) -> int:
        """Where the protected-mode code begins in the file."""
        return (self.setup_sects + 1) * SECTOR

    @property
    def has_64_bit_entry(self) -> bool:
        """Whether the image can be entered in 64-bit mode."""
        return self.version >= 0x020C and bool(self.xloadflags & XLF_KERNEL_64)

    def vmlinux(self) -> bytes:
        """The unpacked kernel. Raises KernelError."""
        start = self.protected_start + self.payload_offset
        end = start + self.payload_length
        if end > len(self.data):
            raise KernelError(f"{self.name}: bzImage of {len(self.data)} bytes is truncated: payload ends at {end}")
        return unpack(self.data[start:end], self.name)

    def kernel(self) -> Kernel:
        """The image for its 64-bit entry. Raises KernelError if it has none."""
        if not self.has_64_bit_entry:
            raise KernelError(f"{self.name}: bzImage has no 64-bit entry: expected an x86-64 kernel")
        code = self.data[self.protected_start :]
        size = max(self.init_size, len(code))
        return Kernel(
            name=self.name,
            protocol=Protocol.LINUX64,
            segments=(Segment(self.pref_address, code, size),),
            entry=self.pref_address + ENTRY_64_OFFSET,
            cmdline_limit=self.cmdline_size or 255,
            setup_header=self._setup_header(),
            initrd_limit=self.initrd_addr_max + 1,
        )

    def _setup_header(self) -> bytes:
        """From 0x1F1 to the end that the jump at 0x200 gives away."""
        end = min(0x202 + self.data[0x201], 0x290)
        return bytes(self.data[HEADER_START:end])

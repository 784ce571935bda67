"""What every kernel format is reduced to: segments, an entry point and a protocol."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# No kernel is near this; it bounds what a hostile file makes us allocate.
MAX_KERNEL_BYTES = 512 << 20


class Protocol(Enum):
    """How a kernel wants to be entered. The values are what messages call them."""

    PVH = "PVH"
    LINUX64 = "64-bit Linux boot protocol"
    MULTIBOOT = "multiboot"
    ELF64 = "64-bit ELF entry"


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes for `gpa`; zeros follow up to `size_bytes`."""

    gpa: int
    data: memoryview
    size_bytes: int

    @property
    def end(self) -> int:
        """The first address behind the segment."""
        return self.gpa + self.size_bytes


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel ready to be placed."""

    name: str
    protocol: Protocol
    segments: tuple[Segment, ...]
    entry: int
    cmdline_limit: int
    setup_header: bytes = b""
    """bzImage only: bytes of the file from 0x1F1 on, as the zero page wants them."""
    initrd_limit: int = 1 << 32
    """The initrd must end at or below this."""

    @property
    def end(self) -> int:
        """The first address behind everything loaded."""
        return max(segment.end for segment in self.segments)

"""The loader: a file in, a guest's memory and first processor state out.

    kernel = read_kernel(path)
    entry = load_guest(memory, kernel, initrd=..., cmdline=..., rsdp=...)

A bzImage is unpacked here and entered by PVH if it can be, because the host unpacks faster than
a guest, and entered at its 64-bit entry otherwise. Every malformed input is a BadRequest of one
line that names the file.
"""

from __future__ import annotations

from pathlib import Path

from ostler.boot.entry import EntryState
from ostler.boot.kernel import MAX_KERNEL_BYTES, Kernel, Protocol
from ostler.boot.lowmem import reserved_ranges
from ostler.boot.unpacked import UnpackedKernels
from ostler.errors import BadRequest, KernelError
from ostler.memory import GuestMemory
from ostler.memory.layout import LOW_RAM_LIMIT, PAGE_SIZE

MIB = 1 << 20


def read_file(path: Path, what: str, *, max_bytes: int) -> bytes:
    """A regular file's bytes. Raises BadRequest naming `what` and the path."""
    try:
        if not path.is_file():
            state = "is not a regular file" if path.exists() else "does not exist"
            raise BadRequest(f"{what} {path}: {state}")
        size = path.stat().st_size
        if size > max_bytes:
            raise BadRequest(f"{what} {path}: {size} bytes, expected at most {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise BadRequest(f"{what} {path}: {error.strerror or error}") from error


def read_kernel(path: Path, *, protocol: Protocol | None = None, unpacked: UnpackedKernels | None = None) -> Kernel:
    """Detect and take apart; `protocol` insists on one. Raises BadRequest.

    What had to be unpacked is taken from `unpacked`, and kept there.
    """
    known = unpacked.find(path) if unpacked else None
    if known is not None and protocol in (None, known.protocol):
        return known
    data = memoryview(read_file(path, "kernel", max_bytes=MAX_KERNEL_BYTES))
    kernel = parse_kernel(data, str(path), protocol=protocol)
    from ostler.boot.bzimage import is_bzimage

    if unpacked and kernel.protocol is Protocol.PVH and is_bzimage(data):
        unpacked.keep(path, kernel)
    return kernel


def parse_kernel(data: memoryview, name: str, *, protocol: Protocol | None = None) -> Kernel:
    """As read_kernel, for bytes already at hand."""
    # Not imported above: a kernel that was unpacked before needs none of the formats.
    from ostler.boot.detect import detect

    kernel = detect(data, name, protocol)
    if protocol is not None and kernel.protocol is not protocol:
        raise KernelError(f"{name}: can be entered by {kernel.protocol.value}: expected {protocol.value}")
    return kernel


def load_guest(
    memory: GuestMemory, kernel: Kernel, *, initrd: bytes | None = None, cmdline: str = "", rsdp: int = 0
) -> EntryState:
    """Place kernel and initrd and write the protocol's structures. Raises BadRequest."""
    _place_segments(memory, kernel)
    placed = _place_initrd(memory, kernel, initrd) if initrd else None
    if kernel.protocol is Protocol.PVH:
        from ostler.boot.pvh import enter_pvh

        return enter_pvh(memory, kernel, cmdline=cmdline, initrd=placed, rsdp=rsdp)
    if kernel.protocol is Protocol.MULTIBOOT:
        from ostler.boot.multiboot import enter_multiboot

        return enter_multiboot(memory, kernel, cmdline=cmdline, initrd=placed)
    from ostler.boot.linux64 import enter_linux64

    return enter_linux64(memory, kernel, cmdline=cmdline, initrd=placed, rsdp=rsdp)


def _place_segments(memory: GuestMemory, kernel: Kernel) -> None:
    reserved = reserved_ranges(long_mode=kernel.protocol in (Protocol.LINUX64, Protocol.ELF64))
    for segment in kernel.segments:
        if not memory.contains(segment.gpa, segment.size_bytes) or segment.end > LOW_RAM_LIMIT:
            raise KernelError(
                f"{kernel.name}: needs memory from {segment.gpa:#x} to {segment.end:#x}: "
                f"the guest has {memory.size_bytes / MIB:.0f} MiB"
            )
        for start, end in reserved:
            if segment.gpa < end and start < segment.end:
                raise KernelError(
                    f"{kernel.name}: needs memory from {segment.gpa:#x} to {segment.end:#x}: "
                    f"{start:#x} to {end:#x} is taken at boot"
                )
    for segment in kernel.segments:
        memory.write(segment.gpa, segment.data)
        # What follows is zero already: guest memory is fresh. Tell the accelerator all the same.
        memory.written(segment.gpa, segment.size_bytes)


def _place_initrd(memory: GuestMemory, kernel: Kernel, initrd: bytes) -> tuple[int, int]:
    """As high as the kernel can reach, or right behind a multiboot program; pages of its own."""
    floor = -(-kernel.end // PAGE_SIZE) * PAGE_SIZE
    ceiling = min(memory.regions[0].end, kernel.initrd_limit, LOW_RAM_LIMIT)
    start = floor
    if kernel.protocol is not Protocol.MULTIBOOT:
        start = (ceiling - len(initrd)) // PAGE_SIZE * PAGE_SIZE
    if start < floor or start + len(initrd) > ceiling:
        room = max(ceiling - floor, 0)
        raise BadRequest(
            f"initrd of {len(initrd)} bytes: {room} bytes of the guest's "
            f"{memory.size_bytes / MIB:.0f} MiB are free behind the kernel"
        )
    memory.write(start, initrd)
    return start, len(initrd)

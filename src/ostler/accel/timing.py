"""Times a counted loop in a guest on KVM and on the host; run as a process of its own by `probe`.

Prints both rates in millions of instructions a second. The loop is the same eleven bytes in both:

    51              push rcx            (keeps the host's call frame honest; the guest has a stack too)
    89 f9           mov  ecx, edi
    ff c9           dec  ecx
    75 fc           jnz  -4
    59              pop  rcx
    c3 / e6 80      ret / out 0x80, al  (the guest leaves by a port)
"""

import ctypes
import mmap
import sys
import time
from collections.abc import Callable

from ostler.abi.kvm.state import Sregs
from ostler.accel.exits import ExitReason
from ostler.accel.kvm import KvmSystem
from ostler.accel.vm import Accelerator
from ostler.errors import OstlerError

_LOOP = bytes.fromhex("51 89f9 ffc9 75fc 59")
_RETURN = b"\xc3"
_LEAVE = b"\xe6\x80"
_INSTRUCTIONS_A_TURN = 2

_FIRST_TURNS, _FIRST_GOES = 10_000, 12
_FULL_TURNS, _FULL_GOES = 5_000_000, 3
# Native: microseconds. More than this and the long loop would take minutes, and the answer is known.
_FIRST_LIMIT_S = 0.01

_MEMORY_SIZE = 0x20_0000
_PML4, _PDPT, _DIRECTORY, _CODE, _STACK = 0x1000, 0x2000, 0x3000, 0x4000, 0x6000
_PRESENT_WRITABLE, _LARGE = 0x3, 0x80


def main() -> int:
    """Print "guest host" and return 0, or a line on standard error and 1."""
    try:
        guest = guest_mips()
    except OstlerError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the parent reads it
        return 1
    print(guest, host_mips())  # noqa: T201 - the parent reads it
    return 0


def guest_mips() -> float:
    """Rate of 64-bit code in a guest. Raises OstlerError."""
    memory = mmap.mmap(-1, _MEMORY_SIZE)
    _fill(memory)
    kvm = Accelerator("kvm", KvmSystem())
    with kvm.create_vm() as vm:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        vm.set_user_memory_region(0, 0, _MEMORY_SIZE, address)
        vcpu = vm.create_vcpu(0)
        vcpu.set_cpuid2(kvm.get_supported_cpuid())
        vcpu.set_sregs(_long_mode(vcpu.get_sregs()))

        def run(turns: int) -> float:
            regs = vcpu.get_regs()
            regs.rip, regs.rsp, regs.rdi, regs.rflags = _CODE, _STACK, turns, 2
            vcpu.set_regs(regs)
            start = time.thread_time()
            reason = vcpu.run()
            elapsed = time.thread_time() - start
            if reason is not ExitReason.IO:
                raise OstlerError(f"exit reason {reason.name}, expected IO")
            return elapsed

        return _rate(run)


def host_mips() -> float:
    """Rate of the same loop on the host; 0 where it does not let us make code."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return 0.0
    page.write(_LOOP + _RETURN)
    loop = ctypes.CFUNCTYPE(None, ctypes.c_uint32)(ctypes.addressof(ctypes.c_char.from_buffer(page)))

    def run(turns: int) -> float:
        start = time.thread_time()
        loop(turns)
        return time.thread_time() - start

    return _rate(run)


def _rate(run: Callable[[int], float]) -> float:
    """The best of some goes with few turns; many turns only if that was quick.

    The first one warms up. Time is the thread's own: on a busy host other processes have the processor in between,
    and where the host is itself a guest, whose own host is busy, only the best of many goes says anything.
    """
    turns, elapsed = _FIRST_TURNS, min(run(_FIRST_TURNS) for _ in range(_FIRST_GOES))
    if elapsed < _FIRST_LIMIT_S:
        turns, elapsed = _FULL_TURNS, min(run(_FULL_TURNS) for _ in range(_FULL_GOES))
    return turns * _INSTRUCTIONS_A_TURN / elapsed / 1e6


def _fill(memory: mmap.mmap) -> None:
    """Identity page tables with one 2 MiB page, and the loop."""

    def entry(at: int, value: int) -> None:
        memory[at : at + 8] = value.to_bytes(8, "little")

    entry(_PML4, _PDPT | _PRESENT_WRITABLE)
    entry(_PDPT, _DIRECTORY | _PRESENT_WRITABLE)
    entry(_DIRECTORY, _PRESENT_WRITABLE | _LARGE)
    memory[_CODE : _CODE + len(_LOOP + _LEAVE)] = _LOOP + _LEAVE


def _long_mode(sregs: Sregs) -> Sregs:
    """Flat 64-bit ring 0, without descriptor tables: nothing reloads a segment."""
    sregs.cr3 = _PML4
    sregs.cr4 |= 1 << 5  # PAE
    sregs.cr0 |= 1 << 31 | 1  # PG, PE
    sregs.efer |= 1 << 8 | 1 << 10  # LME, LMA
    sregs.cs.l, sregs.cs.db, sregs.cs.g, sregs.cs.type = 1, 0, 1, 0xB
    for segment in (sregs.ds, sregs.es, sregs.ss):
        segment.db, segment.g, segment.type, segment.limit = 1, 1, 3, 0xFFFF_FFFF
    sregs.cs.base, sregs.cs.limit, sregs.cs.selector = 0, 0xFFFF_FFFF, 8
    return sregs


if __name__ == "__main__":
    sys.exit(main())

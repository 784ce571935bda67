"""What is said about a guest that crashed: one line always, the registers on request."""

from __future__ import annotations

from ostler.accel.api import VCPU
from ostler.errors import GuestCrash, GuestPanic, GuestStuck, OstlerError, TripleFault
from ostler.memory import GuestMemory, MemoryFault
from ostler.vmm.processors import End, EndKind

PANIC_MARK = b"Kernel panic - not syncing"
MAX_LINE = 160
MAX_INSTRUCTION_BYTES = 15
PAGE_SIZE = 4096

_GENERAL = [
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rsp",
    "rbp",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
]
_SEGMENTS = ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"]


def panic_line(console_tail: bytes | bytearray) -> str | None:
    """The kernel's own last words, if they are among the end of its console output."""
    at = bytes(console_tail).rfind(PANIC_MARK)
    if at < 0:
        return None
    line = bytes(console_tail[at:]).splitlines()[0][:MAX_LINE].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "?" for character in line).rstrip()


def crash_error(end: End, vcpu: VCPU, memory: GuestMemory, console_tail: bytes | bytearray) -> GuestCrash:
    """The exception for an end in disorder, with the details that --debug prints."""
    details = report(vcpu, memory)
    if end.kind is EndKind.PANIC:
        said = panic_line(console_tail) or "the guest's kernel reported a panic"
        return GuestPanic(f"guest crashed: {said}", details=details)
    where = location(vcpu)
    if end.kind is EndKind.TRIPLE_FAULT:
        return TripleFault(f"guest crashed: triple fault on vCPU {vcpu.id}{where}", details=details)
    return GuestStuck(f"guest stopped: vCPU {vcpu.id}{where}: {end.text}", details=details)


def location(vcpu: VCPU) -> str:
    """` at RIP …`, or nothing where even that cannot be read."""
    try:
        return f" at RIP {vcpu.get_regs().rip:#x}"
    except OstlerError:
        return ""


def report(vcpu: VCPU, memory: GuestMemory) -> str:
    """Registers and the instruction at RIP, as far as they can be read."""
    try:
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    except OstlerError as error:
        return f"vCPU {vcpu.id}: registers cannot be read: {error}"
    lines = [f"vCPU {vcpu.id}: rip={regs.rip:016x} rflags={regs.rflags:08x}"]
    cells = [f"{name:>3}={getattr(regs, name):016x}" for name in _GENERAL]
    lines += ["  " + " ".join(cells[at : at + 4]) for at in range(0, len(cells), 4)]
    lines.append(
        f"  cr0={sregs.cr0:08x} cr2={sregs.cr2:016x} cr3={sregs.cr3:016x} cr4={sregs.cr4:08x} efer={sregs.efer:x}"
    )
    for name in _SEGMENTS:
        part = getattr(sregs, name)
        kind = "unusable" if part.unusable else f"type={part.type:x} dpl={part.dpl} l={part.l} db={part.db}"
        lines.append(f"  {name:>3}={part.selector:04x} base={part.base:016x} limit={part.limit:08x} {kind}")
    lines.append(f"  gdt={sregs.gdt.base:016x}+{sregs.gdt.limit:04x} idt={sregs.idt.base:016x}+{sregs.idt.limit:04x}")
    bits = 64 if sregs.cs.l else 32 if sregs.cs.db else 16
    lines += _instruction(vcpu, memory, (sregs.cs.base + regs.rip) & (1 << 64) - 1, bits)
    return "\n".join(lines)


def _instruction(vcpu: VCPU, memory: GuestMemory, linear: int, bits: int) -> list[str]:
    code = _read_linear(vcpu, memory, linear)
    if not code:
        return ["  instruction bytes: not readable at this RIP"]
    return [f"  instruction bytes: {code.hex(' ')}", f"  instruction: {disassemble(code, linear, bits)}"]


def _read_linear(vcpu: VCPU, memory: GuestMemory, linear: int) -> bytes:
    """Up to an instruction's length; an instruction may cross into a page that is not there."""
    code = b""
    while len(code) < MAX_INSTRUCTION_BYTES:
        at = linear + len(code)
        size = min(MAX_INSTRUCTION_BYTES - len(code), PAGE_SIZE - at % PAGE_SIZE)
        try:
            found = vcpu.translate(at)
            if not found.valid:
                break
            code += memory.read(found.physical_address, size)
        except (OstlerError, MemoryFault):
            break
    return code


def disassemble(code: bytes, address: int, bits: int) -> str:
    """The first instruction in Intel syntax."""
    import capstone

    mode = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}[bits]
    for instruction in capstone.Cs(capstone.CS_ARCH_X86, mode).disasm(code, address, count=1):
        return f"{instruction.mnemonic} {instruction.op_str}".rstrip()
    return "not a valid instruction"

"""Exceptions: vectors, error codes, saved RIP and CR2, stacks, double and triple faults (SDM volume 3, chapter 6)."""

# ruff: noqa: E501 - one row, one exception

import pytest

from tests.accel.conftest import Lab
from tests.accel.lab import Machine
from tests.accel.prelude import RECORD

DE, DB, NMI, BP, OF, BR, UD, NM, DF, TS, NP, SS, GP, PF, MF, AC, MC, XM = (*range(9), *range(10, 15), 16, 17, 18, 19)


def records(machine: Machine) -> list[tuple[int, int, str]]:
    """Vector, error code, and the label at the saved RIP, of each exception logged."""
    names = {machine.label(name): name for name in ("fault", "behind") if name in machine.program.symbols}
    log = machine.log
    return [(log[at], log[at + 1], names.get(log[at + 2], hex(log[at + 2]))) for at in range(0, len(log), RECORD)]


# Each program raises one exception at `fault`, or with the RIP behind it at `behind` where it is a trap.
CASES = {
    "divide by zero": ("xor ecx, ecx; mov eax, 1; xor edx, edx; fault: div ecx", (DE, 0, "fault")),
    "divide overflow": ("mov edx, 5; mov ecx, 5; fault: div ecx", (DE, 0, "fault")),
    "signed divide overflow": ("mov eax, 0x80000000; cdq; mov ecx, -1; fault: idiv ecx", (DE, 0, "fault")),
    "int3": ("fault: int3; behind:", (BP, 0, "behind")),
    "int 3 in two bytes": ("fault: .byte 0xcd, 3; behind:", (BP, 0, "behind")),
    "int1": ("fault: .byte 0xf1; behind:", (DB, 0, "behind")),
    "ud2": ("fault: ud2", (UD, 0, "fault")),
    "ud1": ("fault: .byte 0x0f, 0xb9, 0xc0", (UD, 0, "fault")),
    "opcode without meaning in long mode": ("fault: .byte 0x06", (UD, 0, "fault")),
    "lock on a register": ("fault: .byte 0xf0, 0x01, 0xc0", (UD, 0, "fault")),
    "lock on a move": ("mov ebx, FREE; fault: .byte 0xf0, 0x89, 0x03", (UD, 0, "fault")),
    "int through a gate that is absent": ("mov byte ptr ds:[IDT + 16 * 0x70 + 5], 0x0e; fault: int 0x70", (NP, 0x70 * 8 + 2, "fault")),
    "int beyond the IDT's limit": ("sub rsp, 16; mov word ptr [rsp], 0x4ff; mov qword ptr [rsp + 2], IDT; lidt [rsp]; fault: int 0x50", (GP, 0x50 * 8 + 2, "fault")),
    "load of an absent segment": ("mov rax, 0x00cf13000000ffff; mov ds:[GDT + 0x70], rax; mov eax, 0x70; fault: mov ds, ax", (NP, 0x70, "fault")),
    "stack segment that is absent": ("mov rax, 0x00cf13000000ffff; mov ds:[GDT + 0x70], rax; mov eax, 0x70; fault: mov ss, ax", (SS, 0x70, "fault")),
    "selector beyond the GDT": ("mov eax, 0x1008; fault: mov ds, ax", (GP, 0x1008, "fault")),
    "selector in an absent LDT": ("mov eax, 0x0c; fault: mov es, ax", (GP, 0x0C, "fault")),
    "code segment into CS by mov": ("mov eax, 8; fault: .byte 0x8e, 0xc8", (UD, 0, "fault")),
    "non-canonical address": ("mov rbx, 0x8000000000000000; fault: mov eax, [rbx]", (GP, 0, "fault")),
    "non-canonical jump": ("mov rax, 0x0000800000000000; fault: jmp rax", (GP, 0, "fault")),
    "write to a reserved CR4 bit": ("mov rax, cr4; bts rax, 30; fault: mov cr4, rax", (GP, 0, "fault")),
    "paging without protection": ("mov rax, cr0; and eax, 0xfffffffe; fault: mov cr0, rax", (GP, 0, "fault")),
    "PAE off in long mode": ("mov rax, cr4; and eax, 0xffffffdf; fault: mov cr4, rax", (GP, 0, "fault")),
    "write of CR8 above 15": ("mov eax, 16; fault: mov cr8, rax", (GP, 0, "fault")),
    "rdmsr of no register": ("mov ecx, 0x12345678; fault: rdmsr", (GP, 0, "fault")),
    "wrmsr of no register": ("mov ecx, 0x12345678; fault: wrmsr", (GP, 0, "fault")),
    "non-canonical LSTAR": ("mov ecx, 0xc0000082; mov edx, 0x80000000; fault: wrmsr", (GP, 0, "fault")),
    "reserved bit of EFER": ("mov ecx, 0xc0000080; rdmsr; bts eax, 1; fault: wrmsr", (GP, 0, "fault")),
    "LME off while paging": ("mov ecx, 0xc0000080; rdmsr; btr eax, 8; fault: wrmsr", (GP, 0, "fault")),
    "instruction longer than 15 bytes": ("fault: .fill 15, 1, 0x66; nop", (GP, 0, "fault")),
    "x87 with TS set": ("mov rax, cr0; or eax, 8; mov cr0, rax; fault: fninit", (NM, 0, "fault")),
    "SSE without OSFXSR": ("mov rax, cr4; btr eax, 9; mov cr4, rax; fault: xorps xmm0, xmm0", (UD, 0, "fault")),
    "misaligned SSE": ("mov ebx, FREE + 8; fault: movaps xmm0, [rbx]", (GP, 0, "fault")),
    "iret to an absent segment": ("mov rax, 0x00af1b000000ffff; mov ds:[GDT + 0x70], rax; push 0x10; push STACK; push 2; push 0x70; push offset behind; fault: iretq; behind:", (NP, 0x70, "fault")),
    "iret to a null segment": ("push 0x10; push STACK; push 2; push 0; push offset behind; fault: iretq; behind:", (GP, 0, "fault")),
    "far jump to a data segment": ("push 0x10; push offset behind; fault: .byte 0x48, 0xcb; behind:", (GP, 0x10, "fault")),
    "ltr of a busy TSS": ("mov eax, 0x40; fault: ltr ax", (GP, 0x40, "fault")),
    "lldt of a code segment": ("mov eax, 8; fault: lldt ax", (GP, 8, "fault")),
    "swapgs in ring 3 is privileged": ("enter_user there; .section .user; there: fault: swapgs; .text", (GP, 0, "fault")),
    "hlt in ring 3": ("enter_user there; .section .user; there: fault: hlt; .text", (GP, 0, "fault")),
    "cli in ring 3": ("enter_user there; .section .user; there: fault: cli; .text", (GP, 0, "fault")),
    "port in ring 3": ("enter_user there; .section .user; there: fault: in al, 0x80; .text", (GP, 0, "fault")),
    "int to a ring-0 gate from ring 3": ("enter_user there; .section .user; there: fault: int 0x40; .text", (GP, 0x40 * 8 + 2, "fault")),
    "int3 from ring 3": ("enter_user there; .section .user; there: fault: int3; behind: .text", (BP, 0, "behind")),
}  # fmt: skip

# A KVM that emulates ring 0 does so with KVM's own instruction emulator, which knows part of the instruction set.
EMULATOR_GAPS = {
    "int3": "no software interrupts outside real mode",
    "int 3 in two bytes": "no software interrupts outside real mode",
    "int through a gate that is absent": "no software interrupts outside real mode",
    "int beyond the IDT's limit": "no software interrupts outside real mode",
    "int1": "no INT1",
    "ud1": "no UD1",
    "SSE without OSFXSR": "no XORPS",
    "int to a ring-0 gate from ring 3": "kvm_pvm runs ring 3 natively and makes #UD of INT n",
}


@pytest.mark.parametrize("name", CASES)
def test_exception_reports_vector_error_code_and_rip(lab: Lab, name: str, request: pytest.FixtureRequest) -> None:
    if lab.emulated_kvm and name in EMULATOR_GAPS:
        request.applymarker(pytest.mark.xfail(reason=EMULATOR_GAPS[name], strict=True))
    text, expected = CASES[name]
    with lab.machine("start:\nresume_at done\n" + text + "\ndone: finish\n") as machine:
        machine.run()

        assert records(machine) == [expected]

"""What every bare-metal program is assembled with: the memory layout's names, macros, stubs.

The record an exception leaves in the log: vector, error code, RIP, CS, RFLAGS, CR2.
"""

DONE_PORT = 0x11

LAYOUT = {
    "GDT": 0x1000,
    "IDT": 0x2000,
    "TSS": 0x3000,
    "RESUME": 0x4000,
    "LOG_COUNT": 0x4008,
    "LOG": 0x4010,
    "STACK": 0x6000,
    "RSP0": 0x7000,
    "IST1": 0x7800,
    "IST2": 0x8000,
    "TEXT": 0x8000,
    "PML4": 0x1_0000,
    "PDPT": 0x1_1000,
    "PD": 0x1_2000,
    "PT": 0x1_3000,
    "PD3": 0x1_4000,
    "FREE": 0x2_0000,
    "USER": 0x8_0000,
    "USER_STACK": 0x9_F000,
    "USER_END": 0xA_0000,
    "MMIO": 0xD000_0000,
    "IOAPIC": 0xFEC0_0000,
    "APIC": 0xFEE0_0000,
    "DONE_PORT": DONE_PORT,
}

RECORD = 6  # words of an exception's record

_WITH_ERROR_CODE = (8, 10, 11, 12, 13, 14, 17)

_MACROS = r"""
    .intel_syntax noprefix

    # Append a value to the log; from long mode, ring 0. Not for rsp-relative operands.
    .macro report value
        push    rax
        push    rcx
        mov     rax, \value
        mov     ecx, 1
        lock xadd dword ptr ds:[LOG_COUNT], ecx
        mov     qword ptr [LOG + rcx * 8], rax
        pop     rcx
        pop     rax
    .endm

    # The same from 32-bit code.
    .macro report32 value
        push    eax
        push    ecx
        mov     eax, \value
        mov     ecx, 1
        lock xadd dword ptr ds:[LOG_COUNT], ecx
        mov     dword ptr [LOG + ecx * 8], eax
        mov     dword ptr [LOG + ecx * 8 + 4], 0
        pop     ecx
        pop     eax
    .endm

    # The same from real mode, with DS = 0.
    .macro report16 value
        push    eax
        push    ecx
        mov     eax, \value
        mov     ecx, 1
        lock xadd dword ptr ds:[LOG_COUNT], ecx
        mov     dword ptr [LOG + ecx * 8], eax
        mov     dword ptr [LOG + ecx * 8 + 4], 0
        pop     ecx
        pop     eax
    .endm

    .macro finish
        out     DONE_PORT, al
    9:  hlt
        jmp     9b
    .endm

    # Where to go on after the next exception.
    .macro resume_at label
        mov     qword ptr ds:[RESUME], offset \label
    .endm

    .macro wrmsr64 index, value
        mov     ecx, \index
        mov     rax, \value
        mov     rdx, rax
        shr     rdx, 32
        wrmsr
    .endm

    .macro rdmsr64 index
        mov     ecx, \index
        rdmsr
        shl     rdx, 32
        or      rax, rdx
    .endm

    # Enter ring 3 at a label, interrupts as in the flags given.
    .macro enter_user label, flags=2
        push    0x23
        push    USER_STACK
        push    \flags
        push    0x2b
        push    offset \label
        iretq
    .endm

    # Both 8259s masked, the local APIC on (spurious vector 0xff): interrupts come by the APIC alone.
    .macro apic_only
        mov     al, 0xff
        out     0x21, al
        out     0xa1, al
        apic_write 0xf0, 0x1ff
    .endm

    .macro apic_write offset, value
        push    rcx
        mov     ecx, APIC
        mov     dword ptr [rcx + \offset], \value
        pop     rcx
    .endm

    # Reads into EAX.
    .macro apic_read offset
        mov     eax, APIC
        mov     eax, [rax + \offset]
    .endm

    .macro ioapic_write index, value
        push    rcx
        mov     ecx, IOAPIC
        mov     dword ptr [rcx], \index
        mov     dword ptr [rcx + 0x10], \value
        pop     rcx
    .endm

    # A redirection entry: the low half with vector, polarity, trigger mode and mask; to APIC 0.
    .macro ioapic_route pin, low
        ioapic_write (0x11 + 2 * \pin), 0
        ioapic_write (0x10 + 2 * \pin), \low
    .endm

    # Both 8259s at vectors 0x30 and 0x38, masks as given.
    .macro pic_init master_mask, slave_mask
        mov     al, 0x11
        out     0x20, al
        out     0xa0, al
        mov     al, 0x30
        out     0x21, al
        mov     al, 0x38
        out     0xa1, al
        mov     al, 4
        out     0x21, al
        mov     al, 2
        out     0xa1, al
        mov     al, 1
        out     0x21, al
        out     0xa1, al
        mov     al, \master_mask
        out     0x21, al
        mov     al, \slave_mask
        out     0xa1, al
    .endm

    # Let the host act (port 0x80), then wait for an interrupt without missing it.
    .macro ask_and_halt
        cli
        out     0x80, al
        sti
        hlt
        cli
    .endm

    # Interrupts on for a moment. The port access is there because a KVM that emulates looks for events
    # at its exits only.
    .macro open_window
        sti
        nop
        out     0x82, al
        nop
        cli
    .endm

    .section .user, "awx"
    .text
    .code64
"""

_STUBS = """
# Where an exception nobody expected ends.
lost:
    finish

# On the stack: vector, error code, RIP, CS, RFLAGS, RSP, SS.
exception_common:
    push    rax
    push    rcx
    push    rdx
    mov     ecx, 6
    lock xadd dword ptr ds:[LOG_COUNT], ecx
    lea     rdx, [LOG + rcx * 8]
    mov     rax, [rsp + 24]
    mov     [rdx], rax
    mov     rax, [rsp + 32]
    mov     [rdx + 8], rax
    mov     rax, [rsp + 40]
    mov     [rdx + 16], rax
    mov     rax, [rsp + 48]
    mov     [rdx + 24], rax
    mov     rax, [rsp + 56]
    mov     [rdx + 32], rax
    mov     rax, cr2
    mov     [rdx + 40], rax
    pop     rdx
    pop     rcx
    pop     rax
    mov     rsp, STACK
    jmp     qword ptr ds:[RESUME]

# On the stack: 0x100 + vector, then the interrupt frame.
interrupt_common:
    push    rax
    push    rcx
    mov     ecx, 1
    lock xadd dword ptr ds:[LOG_COUNT], ecx
    mov     rax, [rsp + 16]
    mov     [LOG + rcx * 8], rax
    mov     ecx, APIC
    mov     dword ptr [rcx + 0xb0], 0
    pop     rcx
    pop     rax
    add     rsp, 8
    iretq
"""


def _exception_stub(vector: int) -> str:
    pushed = "" if vector in _WITH_ERROR_CODE else "    push    0\n"
    return f"exception_{vector}:\n{pushed}    push    {vector}\n    jmp     exception_common\n"


def _interrupt_stub(vector: int) -> str:
    return f"interrupt_{vector}:\n    push    {0x100 + vector}\n    jmp     interrupt_common\n"


PRELUDE = "".join(
    (
        "".join(f".set {name}, {value:#x}\n" for name, value in LAYOUT.items()),
        _MACROS,
        _STUBS,
        "".join(_exception_stub(vector) for vector in range(32)),
        "".join(_interrupt_stub(vector) for vector in range(32, 256)),
        "\n.globl start\n",
    )
)

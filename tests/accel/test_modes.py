"""From real through protected to long mode and back, by the processor's own instructions (SDM volume 3, 9.8, 9.9)."""

from tests.accel.conftest import Lab
from tests.accel.prelude import LAYOUT

GDTR = f"""
gdtr:
    .word   0xff
    .long   {LAYOUT["GDT"]:#x}
"""


def test_real_mode_segments_shift_by_four(lab: Lab) -> None:
    with lab.machine(
        """
    .code16
    start:
        mov     ax, 0x1234
        mov     es, ax
        mov     word ptr es:[0x10], 0xbeef      # linear 0x12350
        movzx   eax, word ptr es:[0x10]
        report16 eax
        mov     cx, es
        movzx   ecx, cx
        report16 ecx
        finish
    """,
        mode="real",
    ) as machine:
        assert machine.run() == [0xBEEF, 0x1234]
        assert machine.read(0x1_2350, 2) == 0xBEEF


def test_real_mode_far_call_and_interrupt_return_through_cs(lab: Lab) -> None:
    with lab.machine(
        """
    .code16
    start:
        mov     word ptr ds:[0x21 * 4], offset handler
        mov     word ptr ds:[0x21 * 4 + 2], 0
        push    cs
        .byte   0x9a                            # call 0x800:offset
        .word   offset far_code - 0x8000, 0x800
        pop     ax
        int     0x21
        movzx   ebx, sp
        report16 ebx
        finish
    far_code:
        movzx   ebx, word ptr [esp + 2]
        report16 ebx
        xor     ebx, ebx
        mov     bx, cs
        report16 ebx
        .byte   0xcb                            # retf
    handler:
        mov     ebx, 0x77
        report16 ebx
        iret
    """,
        mode="real",
    ) as machine:
        assert machine.run() == [0, 0x800, 0x77, LAYOUT["STACK"]]


def test_real_mode_to_protected_and_back(lab: Lab) -> None:
    with lab.machine(
        f"""
    .code16
    start:
        cli
        lgdt    cs:gdtr
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        .byte   0x66, 0xea                      # jmp 0x38:protected
        .long   offset protected
        .word   0x38
    .code32
    protected:
        mov     eax, 0x10
        mov     ds, eax
        mov     es, eax
        mov     ss, eax
        mov     esp, STACK
        mov     dword ptr ds:[0x200000], 0x1234 # beyond real mode's reach
        mov     eax, ds:[0x200000]
        report32 eax
        .byte   0xea                            # jmp 0x50:sixteen
        .long   offset sixteen
        .word   0x50
    .code16
    sixteen:
        mov     eax, 0x58
        mov     ds, eax
        mov     ss, eax
        mov     eax, cr0
        and     al, 0xfe
        mov     cr0, eax
        .byte   0xea                            # jmp 0:real
        .word   offset real, 0
    real:
        xor     eax, eax
        mov     ds, ax
        mov     ss, ax
        mov     ax, cs
        report16 eax
        finish
    {GDTR}
    """,
        mode="real",
    ) as machine:
        assert machine.run() == [0x1234, 0]


def test_unreal_mode_keeps_the_limit_loaded_in_protected_mode(lab: Lab) -> None:
    with lab.machine(
        f"""
    .code16
    start:
        lgdt    cs:gdtr
        mov     eax, cr0
        or      al, 1
        mov     cr0, eax
        mov     bx, 0x10
        mov     es, bx
        and     al, 0xfe
        mov     cr0, eax
        mov     ebx, 0x210000
        mov     dword ptr es:[ebx], 0x4321
        mov     eax, es:[ebx]
        report16 eax
        finish
    {GDTR}
    """,
        mode="real",
    ) as machine:
        assert machine.run() == [0x4321]


def test_protected_mode_limit_violation_is_a_general_protection_fault(lab: Lab) -> None:
    with lab.machine(
        """
    .code32
    start:
        # 32-bit interrupt gate for vector 13; data segment of one page at 0x70
        mov     eax, offset handler
        mov     ds:[IDT + 13 * 8], ax
        mov     word ptr ds:[IDT + 13 * 8 + 2], 0x38
        mov     word ptr ds:[IDT + 13 * 8 + 4], 0x8e00
        mov     word ptr ds:[IDT + 13 * 8 + 6], 0
        mov     dword ptr ds:[GDT + 0x70], 0x00000fff
        mov     dword ptr ds:[GDT + 0x74], 0x00409300
        mov     eax, 0x70
        mov     fs, eax
        mov     eax, fs:[0xffc]
        report32 1
    fault:
        mov     eax, fs:[0xffd]
        report32 2
    handler:
        pop     eax
        report32 eax
        pop     eax
        report32 eax
        finish
    """,
        mode="protected",
    ) as machine:
        assert machine.run() == [1, 0, machine.label("fault")]


def test_protected_mode_to_long_mode(lab: Lab) -> None:
    with lab.machine(
        """
    .code32
    start:
        mov     eax, cr4
        or      eax, 0x20                       # PAE
        mov     cr4, eax
        mov     eax, PML4
        mov     cr3, eax
        mov     ecx, 0xc0000080
        rdmsr
        or      eax, 0x900                      # LME, NXE
        wrmsr
        mov     eax, cr0
        or      eax, 0x80000000
        mov     cr0, eax
        mov     ecx, 0xc0000080
        rdmsr
        and     eax, 0x500
        report32 eax                            # LME, LMA; this is compatibility mode now
        .byte   0xea                            # jmp 8:wide
        .long   offset wide
        .word   8
    .code64
    wide:
        mov     rbx, 0x1122334455667788
        report  rbx
        mov     eax, cs
        report  rax
        finish
    """,
        mode="protected",
    ) as machine:
        assert machine.run() == [0x500, 0x1122_3344_5566_7788, 8]


def test_long_mode_back_to_protected_mode(lab: Lab) -> None:
    with lab.machine("""
    start:
        push    0x38
        push    offset narrow
        retfq
    .code32
    narrow:
        mov     eax, cr0
        and     eax, 0x7fffffff
        mov     cr0, eax
        mov     ecx, 0xc0000080
        rdmsr
        and     eax, 0x500
        report32 eax                            # LME alone
        finish
    """) as machine:
        assert machine.run() == [0x100]


def test_two_level_paging_with_large_pages(lab: Lab) -> None:
    lab.skip_where_emulated("kvm_pvm has no paging outside long mode")
    with lab.machine(
        """
    .code32
    start:
        mov     dword ptr ds:[0x20000], 0x83            # 4 MiB one to one
        mov     dword ptr ds:[0x20004], 0x21003
        mov     dword ptr ds:[0x21000], 0x22003         # 4 KiB at 4 MiB
        mov     dword ptr ds:[0x22000], 0x1111
        mov     eax, cr4
        or      eax, 0x10                               # PSE
        mov     cr4, eax
        mov     eax, 0x20000
        mov     cr3, eax
        mov     eax, cr0
        or      eax, 0x80000000
        mov     cr0, eax
        mov     eax, ds:[0x400000]
        report32 eax
        finish
    """,
        mode="protected",
    ) as machine:
        assert machine.run() == [0x1111]


def test_three_level_paging(lab: Lab) -> None:
    lab.skip_where_emulated("kvm_pvm has no paging outside long mode")
    with lab.machine(
        """
    .code32
    start:
        mov     dword ptr ds:[0x23000], 0x24001         # PDPT
        mov     dword ptr ds:[0x23004], 0
        mov     dword ptr ds:[0x24000], 0x83            # PD: 2 MiB one to one
        mov     dword ptr ds:[0x24008], 0x25003
        mov     dword ptr ds:[0x25000], 0x26003         # PT of the second 2 MiB
        mov     dword ptr ds:[0x26000], 0x2222
        mov     eax, cr4
        or      eax, 0x20                               # PAE
        mov     cr4, eax
        mov     eax, 0x23000
        mov     cr3, eax
        mov     eax, cr0
        or      eax, 0x80000000
        mov     cr0, eax
        mov     eax, ds:[0x200000]
        report32 eax
        finish
    """,
        mode="protected",
    ) as machine:
        assert machine.run() == [0x2222]

"""System calls, gates and far transfers between rings and modes (SDM volume 3, sections 5.8 and 6.14; volume 2)."""

import pytest

from tests.accel.conftest import Lab
from tests.accel.prelude import LAYOUT, RECORD

GP, NP, UD = 13, 11, 6

KERNEL_GS_BASE, GS_BASE, TSC_AUX, SYSENTER_CS = 0xC000_0102, 0xC000_0101, 0xC000_0103, 0x174

# STAR, LSTAR, SFMASK. SYSCALL takes CS 8 and SS 0x10; SYSRET CS 0x28 or 0x18 and SS 0x20.
SET_UP_SYSCALL = """
    wrmsr64 0xc0000081, 0x0018000800000000
    wrmsr64 0xc0000082, "offset {entry}"
    wrmsr64 0xc0000084, 0x200
"""


@pytest.mark.emulated_kvm_deviates("kvm_pvm takes ring 3's SYSCALL without entering ring 0")
def test_syscall_enters_ring_0_and_masks_flags(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        {SET_UP_SYSCALL.format(entry="entry")}
        enter_user there, 0x203             # IF, CF
    .section .user
    there:
        syscall
    behind:
        hlt
    .text
    entry:
        mov     rsp, STACK
        pushf
        mov     rbx, rcx
        report  rbx
        report  r11
        mov     ebx, cs
        report  rbx
        mov     ebx, ss
        report  rbx
        pop     rbx
        report  rbx
        finish
    """) as machine:
        assert machine.run() == [machine.label("behind"), 0x203, 0x08, 0x10, 0x003]


@pytest.mark.emulated_kvm_deviates("kvm_pvm takes ring 3's SYSCALL without entering ring 0")
def test_sysret_returns_to_64_bit_ring_3(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        resume_at done
        {SET_UP_SYSCALL.format(entry="entry")}
        mov     ecx, offset there
        mov     r11d, 0x202
        mov     rsp, USER_STACK
        sysretq
    .section .user
    there:
        mov     edi, 1
        syscall
        push    rdi
    last:
        hlt
    .text
    entry:
        inc     edi
        sysretq
    done:
        report  rdi
        finish
    """) as machine:
        log = machine.run()

        assert log[:4] == [GP, 0, machine.label("last"), 0x2B]
        assert log[4] & 0x3E_7FD7 == 0x202
        assert log[RECORD] == 2


@pytest.mark.emulated_kvm_deviates("kvm_pvm's SYSRET always returns to 64-bit code")
def test_sysret_to_compatibility_mode(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        resume_at done
        {SET_UP_SYSCALL.format(entry="done")}
        mov     ecx, offset there
        mov     r11d, 0x202
        mov     rax, -1
        .byte   0x0f, 0x07                  # sysret without REX.W
    .section .user
    .code32
    there:
        .byte   0x40                        # inc eax here, a REX prefix in 64-bit code
        mov     ebx, eax
        hlt
    .code64
    .text
    done:
        report  rbx
        finish
    """) as machine:
        log = machine.run()

        assert log[0] == GP
        assert log[3] == 0x1B
        assert log[RECORD] == 0


@pytest.mark.emulated_kvm_deviates("kvm_pvm lets the fault happen in ring 3, as on AMD's processors")
def test_sysret_with_non_canonical_rcx_faults_in_ring_0(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        resume_at done
        {SET_UP_SYSCALL.format(entry="done")}
        mov     rcx, 0x0000800000000000
        mov     r11d, 2
    fault:
        sysretq
    done:
        finish
    """) as machine:
        machine.run()

        assert machine.log[:4] == [GP, 0, machine.label("fault"), 0x08]


def test_syscall_without_sce_is_undefined(lab: Lab) -> None:
    with lab.machine("""
    start:
        resume_at done
        mov     ecx, 0xc0000080
        rdmsr
        btr     eax, 0
        wrmsr
    fault:
        syscall
    done:
        finish
    """) as machine:
        machine.run()

        assert machine.log[:3] == [UD, 0, machine.label("fault")]


SET_UP_SYSENTER = """
    wrmsr64 0x174, 8
    wrmsr64 0x175, STACK
    wrmsr64 0x176, "offset {entry}"
"""


def test_sysenter_from_compatibility_mode_and_sysexit_to_64_bits(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        resume_at done
        {SET_UP_SYSENTER.format(entry="entry")}
        push    0x23
        push    USER_STACK
        push    0x202
        push    0x1b
        push    offset there
        iretq
    .section .user
    .code32
    there:
        sysenter
    .code64
    beyond:
        hlt
    .text
    entry:
        pushf
        mov     ebx, cs
        report  rbx
        mov     ebx, ss
        report  rbx
        pop     rbx
        report  rbx
        mov     rbx, rsp
        report  rbx
        mov     ecx, USER_STACK - 8
        mov     edx, offset beyond
        .byte   0x48, 0x0f, 0x35                # sysexit with REX.W
    done:
        finish
    """) as machine:
        log = machine.run()

        assert log[:4] == [0x08, 0x10, 0x002, LAYOUT["STACK"]]
        assert log[4:8] == [GP, 0, machine.label("beyond"), 0x2B]


@pytest.mark.emulated_kvm_deviates("KVM's instruction emulator has no SYSENTER from 64-bit mode")
def test_sysenter_with_null_cs_faults(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        resume_at done
        wrmsr64 {SYSENTER_CS:#x}, 0
    fault:
        sysenter
    done:
        finish
    """) as machine:
        machine.run()

        assert machine.log[:3] == [GP, 0, machine.label("fault")]


def test_swapgs_exchanges_the_bases(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        wrmsr64 {GS_BASE:#x}, 0x11111000
        wrmsr64 {KERNEL_GS_BASE:#x}, 0xffff800000022000
        swapgs
        rdmsr64 {GS_BASE:#x}
        report  rax
        rdmsr64 {KERNEL_GS_BASE:#x}
        report  rax
        finish
    """) as machine:
        assert machine.run() == [0xFFFF_8000_0002_2000, 0x1111_1000]


CALL_GATE = """
    # 64-bit call gate at 0x70, DPL 3, to entry
    mov     eax, offset entry
    mov     ds:[GDT + 0x70], ax
    mov     word ptr ds:[GDT + 0x72], 8
    mov     word ptr ds:[GDT + 0x74], 0xec00
    shr     eax, 16
    mov     ds:[GDT + 0x76], ax
    mov     qword ptr ds:[GDT + 0x78], 0
"""


@pytest.mark.emulated_kvm_deviates("KVM's instruction emulator has no far calls outside real mode")
def test_call_gate_from_ring_3_switches_stack_and_returns(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        resume_at done
        {CALL_GATE}
        enter_user there
    .section .user
    there:
        push    0
        mov     word ptr [rsp + 4], 0x73
        call    fword ptr [rsp]
    last:
        hlt
    .text
    entry:
        mov     rbx, rsp
        report  rbx
        mov     ecx, cs
        report  rcx
        mov     rax, [rbx]
        report  rax
        mov     rax, [rbx + 8]
        report  rax
        mov     rax, [rbx + 16]
        report  rax
        mov     rax, [rbx + 24]
        report  rax
        retfq
    done:
        finish
    """) as machine:
        log = machine.run()

        last = machine.label("last")
        assert log[:6] == [LAYOUT["RSP0"] - 32, 0x08, last, 0x2B, LAYOUT["USER_STACK"] - 8, 0x23]
        assert log[6:10] == [GP, 0, last, 0x2B]


@pytest.mark.emulated_kvm_deviates("KVM's instruction emulator has no far calls outside real mode")
def test_call_gate_above_its_privilege_faults(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        resume_at done
        {CALL_GATE}
        mov     word ptr ds:[GDT + 0x74], 0x8c00
        enter_user there
    .section .user
    there:
        push    0
        mov     word ptr [rsp + 4], 0x73
    fault:
        call    fword ptr [rsp]
    .text
    entry:
    done:
        finish
    """) as machine:
        machine.run()

        assert machine.log[:3] == [GP, 0x70, machine.label("fault")]


def test_far_return_within_ring_0(lab: Lab) -> None:
    with lab.machine("""
    start:
        push    0x08
        push    offset there
        retfq
        ud2
    there:
        mov     rbx, rsp
        report  rbx
        finish
    """) as machine:
        assert machine.run() == [LAYOUT["STACK"]]


def test_far_return_to_ring_0_compatibility_mode_and_back(lab: Lab) -> None:
    with lab.machine("""
    start:
        push    0x38
        push    offset narrow
        retfq
    .code32
    narrow:
        mov     eax, -1
        .byte   0x40                        # inc eax
        report32 eax
        push    0x08
        push    offset wide
        retf
    .code64
    wide:
        mov     rax, 0x123456789
        report  rax
        finish
    """) as machine:
        assert machine.run() == [0, 0x1_2345_6789]


@pytest.mark.emulated_kvm_deviates("KVM's instruction emulator has no far return to another ring")
def test_far_return_to_ring_3_needs_its_stack(lab: Lab) -> None:
    with lab.machine("""
    start:
        resume_at done
        push    0x23
        push    USER_STACK
        push    0x2b
        push    offset there
        retfq
    .section .user
    there:
        hlt
    .text
    done:
        finish
    """) as machine:
        machine.run()

        assert machine.log[:4] == [GP, 0, machine.label("there"), 0x2B]


def test_fsgsbase_reads_and_writes_the_bases(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        mov     rax, cr4
        bts     rax, 16
        mov     cr4, rax
        mov     rax, 0xffff800000001000
        wrgsbase rax
        mov     eax, 0x2000
        wrfsbase rax
        rdmsr64 {GS_BASE:#x}
        report  rax
        rdfsbase rbx
        report  rbx
        mov     rax, fs:[0x2000]            # 0x4000, the resume address
        mov     rcx, ds:[0x4000]
        cmp     rax, rcx
        sete    al
        movzx   eax, al
        report  rax
        finish
    """) as machine:
        assert machine.run() == [0xFFFF_8000_0000_1000, 0x2000, 1]


@pytest.mark.emulated_kvm_deviates("kvm_pvm offers no RDTSCP")
def test_rdtscp_and_rdpid_source_is_tsc_aux(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        wrmsr64 {TSC_AUX:#x}, 0x1234
        rdtscp
        report  rcx
        finish
    """) as machine:
        assert machine.run() == [0x1234]

"""Several processors: INIT and SIPI, atomic operations, interrupts between them, kicks from outside.

SDM volume 3, sections 9.4 and 11.6.
"""

import threading

from ostler.abi.kvm.state import (
    KVM_MP_STATE_HALTED,
    KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED,
)
from ostler.accel.api import ExitReason
from tests.accel.conftest import Lab
from tests.accel.prelude import LAYOUT

FREE, PAGE_TABLES = LAYOUT["FREE"], LAYOUT["PML4"]

# Brings processors up at page 9 (0x9000), which the trampoline is put in; each gets to `ap_main` in long mode with its
# APIC ID in EBX and a stack of its own.
TRAMPOLINE = """
    .code16
    .org    0x1000
trampoline:
    cli
    xor     ax, ax
    mov     ds, ax
    lgdt    cs:[gdtr - trampoline]
    mov     eax, 0x20                           # PAE
    mov     cr4, eax
    mov     eax, PML4
    mov     cr3, eax
    mov     ecx, 0xc0000080
    mov     eax, 0x901                          # NXE, LME, SCE
    xor     edx, edx
    wrmsr
    mov     eax, 0x80010001                     # PG, WP, PE
    mov     cr0, eax
    .byte   0x66, 0xea                          # jmp 8:wide
    .long   offset wide
    .word   8
gdtr:
    .word   0xff
    .long   GDT
    .code64
wide:
    mov     eax, 0x10
    mov     ds, eax
    mov     es, eax
    mov     ss, eax
    lidt    [idtr]
    mov     ebx, APIC
    mov     ebx, [rbx + 0x20]
    shr     ebx, 24
    mov     esp, ebx
    shl     esp, 12
    add     esp, FREE + 0x20000
    apic_write 0xf0, 0x1ff
    jmp     ap_main
idtr:
    .word   0xfff
    .quad   IDT
"""

WAKE_ALL = """
    apic_only
    apic_write 0x310, 0
    apic_write 0x300, 0xc4500                   # INIT to all but self
    apic_write 0x300, 0xc4609                   # SIPI, page 9
"""


def test_init_and_sipi_start_processors_in_real_mode_at_the_page(lab: Lab) -> None:
    with lab.machine(
        f"""
    start:
        {WAKE_ALL}
    wait:
        pause
        cmp     dword ptr ds:[LOG_COUNT], 1
        jb      wait
        finish
    .code16
    .org    0x1000
    trampoline:
        xor     ax, ax
        mov     ds, ax
        mov     eax, cs
        report16 eax
    stop:
        hlt
        jmp     stop
    """,
        vcpus=2,
    ) as machine:
        assert machine.vcpus[1].get_mp_state() == KVM_MP_STATE_UNINITIALIZED

        assert machine.run_all() == [0x900]
        assert machine.vcpus[0].get_mp_state() in (KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_HALTED)
        assert machine.vcpus[1].get_mp_state() in (KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_HALTED)


def test_four_processors_add_up_by_atomic_operations(lab: Lab) -> None:
    rounds = 200
    with lab.machine(
        f"""
    start:
        {WAKE_ALL}
        xor     ebx, ebx
        call    work
    wait:
        pause
        cmp     dword ptr ds:[FREE + 0x40], 4
        jb      wait
        mov     rax, ds:[FREE]
        report  rax
        mov     rax, ds:[FREE + 8]
        report  rax
        mov     rax, ds:[FREE + 16]
        report  rax
        finish
    ap_main:
        call    work
    stop:
        hlt
        jmp     stop

    work:                                       # each its share, in three ways
        mov     ecx, {rounds}
    next:
        lock inc qword ptr ds:[FREE]
        mov     eax, 3
        lock xadd ds:[FREE + 8], rax
    retry:
        mov     rax, ds:[FREE + 16]
        lea     rdx, [rax + 5]
        lock cmpxchg ds:[FREE + 16], rdx
        jnz     retry
        dec     ecx
        jnz     next
        lock inc dword ptr ds:[FREE + 0x40]
        ret
    {TRAMPOLINE}
    """,
        vcpus=4,
    ) as machine:
        total = 4 * rounds

        assert machine.run_all() == [total, 3 * total, 5 * total]


def test_interrupt_between_processors_wakes_a_halt(lab: Lab) -> None:
    with lab.machine(
        f"""
    start:
        {WAKE_ALL}
    wait:
        pause
        cmp     dword ptr ds:[FREE], 1
        jb      wait
        apic_write 0x310, 0x01000000
        apic_write 0x300, 0x4077                # fixed, vector 0x77, to APIC 1
    wait_again:
        pause
        cmp     dword ptr ds:[FREE], 2
        jb      wait_again
        finish
    ap_main:
        lock inc dword ptr ds:[FREE]
        sti
        hlt
        cli
        lock inc dword ptr ds:[FREE]
    stop:
        hlt
        jmp     stop
    {TRAMPOLINE}
    """,
        vcpus=2,
    ) as machine:
        assert machine.run_all() == [0x177]


def test_store_is_seen_by_the_other_processor_in_order(lab: Lab) -> None:
    """Message passing: a flag is never seen without the data stored before it (SDM volume 3, 9.2.2)."""
    with lab.machine(
        f"""
    start:
        {WAKE_ALL}
        mov     ecx, 1
    send:
        mov     ds:[FREE + 0x100], ecx
        mov     ds:[FREE + 0x200], ecx
    acknowledged:
        pause
        cmp     ds:[FREE + 0x300], ecx
        jne     acknowledged
        inc     ecx
        cmp     ecx, 100
        jb      send
        mov     eax, ds:[FREE + 0x400]
        report  rax
        finish
    ap_main:
        mov     ecx, 1
    receive:
        cmp     ds:[FREE + 0x200], ecx
        jne     receive
        mov     eax, ds:[FREE + 0x100]
        cmp     eax, ecx
        setne   dl
        movzx   edx, dl
        add     ds:[FREE + 0x400], edx
        mov     ds:[FREE + 0x300], ecx
        inc     ecx
        jmp     receive
    {TRAMPOLINE}
    """,
        vcpus=2,
    ) as machine:
        assert machine.run_all() == [0]


def test_kick_ends_a_run_that_loops(lab: Lab) -> None:
    with lab.machine("start:\njmp start\n") as machine:
        vcpu = machine.vcpus[0]
        killer = threading.Timer(0.05, vcpu.kick)
        killer.start()

        assert vcpu.run() is ExitReason.INTR
        killer.join()


def test_kick_ends_a_run_that_halts(lab: Lab) -> None:
    with lab.machine("start:\ncli\nhlt\njmp start\n") as machine:
        vcpu = machine.vcpus[0]
        killer = threading.Timer(0.05, vcpu.kick)
        killer.start()

        assert vcpu.run() is ExitReason.INTR
        killer.join()


def test_kick_before_run_ends_the_next_one_only(lab: Lab) -> None:
    with lab.machine("start:\nreport 1\nfinish\n") as machine:
        vcpu = machine.vcpus[0]
        vcpu.kick()

        assert vcpu.run() is ExitReason.INTR
        assert machine.log == []
        assert machine.run() == [1]


def test_kick_never_gets_lost(lab: Lab) -> None:
    """A kicker and a runner that meet at every possible moment: each kick ends a run."""
    with lab.machine("start:\njmp start\n") as machine:
        vcpu = machine.vcpus[0]
        turns, ended = 100, threading.Semaphore(0)

        def kicker() -> None:
            for _ in range(turns):
                vcpu.kick()
                assert ended.acquire(timeout=10)

        thread = threading.Thread(target=kicker)
        thread.start()
        for _ in range(turns):
            assert vcpu.run() is ExitReason.INTR
            ended.release()
        thread.join()


def test_immediate_exit_stays_until_cleared(lab: Lab) -> None:
    with lab.machine("start:\nreport 1\nfinish\n") as machine:
        vcpu = machine.vcpus[0]
        vcpu.immediate_exit = True

        assert vcpu.run() is ExitReason.INTR
        assert vcpu.run() is ExitReason.INTR
        assert machine.log == []

        vcpu.immediate_exit = False
        assert machine.run() == [1]


def test_immediate_exit_completes_the_pending_read(lab: Lab) -> None:
    with lab.machine("""
    start:
        in      al, 0x80
    behind:
        finish
    """) as machine:
        vcpu = machine.vcpus[0]
        assert vcpu.run() is ExitReason.IO
        vcpu.exit.io.data[0] = 0x5A
        vcpu.immediate_exit = True

        assert vcpu.run() is ExitReason.INTR
        regs = vcpu.get_regs()
        assert (regs.rax & 0xFF, regs.rip) == (0x5A, machine.label("behind"))

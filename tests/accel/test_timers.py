"""Clocks and timers: the local APIC's three modes, the PIT, the TSC, kvmclock.

SDM volume 3, section 11.5.4; Intel 8254 data sheet; Linux's Documentation/virt/kvm/x86/msr.rst. Nothing here
asserts that something is quick, only order, count and direction.
"""

import struct

import pytest

from tests.accel.conftest import Lab
from tests.accel.prelude import LAYOUT

FREE = LAYOUT["FREE"]

LVT_TIMER, INITIAL, CURRENT, DIVIDE = 0x320, 0x380, 0x390, 0x3E0
DIVIDE_BY_1, PERIODIC, DEADLINE, MASKED = 0xB, 1 << 17, 1 << 18, 1 << 16
TSC_DEADLINE = 0x6E0


def test_apic_timer_one_shot_fires_once(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        apic_only
        apic_write {DIVIDE:#x}, {DIVIDE_BY_1}
        apic_write {LVT_TIMER:#x}, 0x50
        apic_write {INITIAL:#x}, 200000             # 200 microseconds
        sti
        hlt
        cli
        apic_read {CURRENT:#x}
        report  rax
        open_window
        finish
    """) as machine:
        assert machine.run() == [0x150, 0]


def test_apic_timer_periodic_fires_again_and_again(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        apic_only
        apic_write {DIVIDE:#x}, {DIVIDE_BY_1}
        apic_write {LVT_TIMER:#x}, {0x51 | PERIODIC:#x}
        apic_write {INITIAL:#x}, 300000
    again:
        sti
        hlt
        cli
        cmp     dword ptr ds:[LOG_COUNT], 3
        jb      again
        apic_write {INITIAL:#x}, 0                  # stops it
        apic_read {CURRENT:#x}
        report  rax
        finish
    """) as machine:
        log = machine.run()

        assert log[:3] == [0x151] * 3
        assert log[-1] == 0


def test_apic_timer_counts_down_while_masked_and_does_not_fire(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        apic_only
        apic_write {DIVIDE:#x}, {DIVIDE_BY_1}
        apic_write {LVT_TIMER:#x}, {0x52 | MASKED:#x}
        apic_write {INITIAL:#x}, 0x7fffffff
        apic_read {CURRENT:#x}
        mov     ebx, eax
    wait:
        apic_read {CURRENT:#x}
        cmp     eax, ebx
        je      wait
        setb    al
        movzx   eax, al
        report  rax
        apic_write {INITIAL:#x}, 1
        open_window
        finish
    """) as machine:
        assert machine.run() == [1]


def test_apic_timer_deadline_fires_and_clears_itself(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        apic_only
        apic_write {LVT_TIMER:#x}, {0x53 | DEADLINE:#x}
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        add     rax, 500000
        mov     rbx, rax
        mov     rdx, rax
        shr     rdx, 32
        mov     ecx, {TSC_DEADLINE:#x}
        wrmsr
        sti
        hlt
        cli
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        cmp     rax, rbx
        setae   al
        movzx   eax, al
        report  rax
        rdmsr64 {TSC_DEADLINE:#x}
        report  rax
        finish
    """) as machine:
        assert machine.run() == [0x153, 1, 0]


def test_apic_timer_deadline_in_the_past_fires_at_once(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        apic_only
        apic_write {LVT_TIMER:#x}, {0x54 | DEADLINE:#x}
        wrmsr64 {TSC_DEADLINE:#x}, 1
        sti
        hlt
        cli
        finish
    """) as machine:
        assert machine.run() == [0x154]


@pytest.mark.parametrize("mode", ["0x34", "0x36"])
def test_pit_channel_0_interrupts_through_the_pic(lab: Lab, mode: str) -> None:
    with lab.machine(
        f"""
    start:
        pic_init 0xfe, 0xff
        mov     al, {mode}                          # channel 0, low and high byte, mode 2 or 3
        out     0x43, al
        mov     al, 0xa9
        out     0x40, al
        mov     al, 0x04
        out     0x40, al                            # 1193: a millisecond
    again:
        sti
        hlt
        cli
        cmp     dword ptr ds:[LOG_COUNT], 3
        jb      again
        finish
    handler:
        report  1
        mov     al, 0x20
        out     0x20, al
        iretq
    """,
        pit=True,
    ) as machine:
        machine.set_gate(0x30, "handler")

        assert machine.run()[:3] == [1, 1, 1]


def test_pit_channel_2_gate_and_output_through_port_61(lab: Lab) -> None:
    with lab.machine(
        """
    start:
        in      al, 0x61
        and     al, 0xfc
        or      al, 1                               # gate on, speaker off
        out     0x61, al
        mov     al, 0xb0                            # channel 2, low and high byte, mode 0
        out     0x43, al
        mov     al, 0xff
        out     0x42, al
        mov     al, 0
        out     0x42, al                            # 255 ticks: 214 microseconds
    wait:
        in      al, 0x61
        test    al, 0x20
        jz      wait
        report  1
        finish
    """,
        pit=True,
    ) as machine:
        assert machine.run() == [1]
        assert all(port != 0x61 for _, port, _, _ in machine.exits)


def test_pit_latched_count_holds_still(lab: Lab) -> None:
    with lab.machine(
        """
    start:
        mov     al, 0x34
        out     0x43, al
        mov     al, 0
        out     0x40, al
        out     0x40, al                            # 65536
        mov     al, 0                               # latch channel 0
        out     0x43, al
        in      al, 0x40
        mov     bl, al
        in      al, 0x40
        mov     bh, al
        movzx   ebx, bx
        report  rbx
    wait:
        mov     al, 0
        out     0x43, al
        in      al, 0x40
        mov     cl, al
        in      al, 0x40
        mov     ch, al
        cmp     bx, cx
        je      wait
        finish
    """,
        pit=True,
    ) as machine:
        (first,) = machine.run()

        assert first <= 0xFFFF


def test_tsc_never_goes_back(lab: Lab) -> None:
    with lab.machine("""
    start:
        xor     ebx, ebx
        xor     esi, esi
        mov     edi, 300
    again:
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        cmp     rax, rbx
        adc     esi, 0                              # counts steps back
        mov     rbx, rax
        dec     edi
        jnz     again
        report  rsi
        finish
    """) as machine:
        assert machine.run() == [0]


@pytest.mark.emulated_kvm_deviates("kvm_pvm shows the host's TSC whatever the guest wrote")
def test_tsc_written_goes_on_from_there(lab: Lab) -> None:
    with lab.machine("""
    start:
        wrmsr64 0x10, 0x7000000000000   # no host has run long enough to show this by itself
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        shr     rax, 44
        report  rax
        finish
    """) as machine:
        assert machine.run() == [0x70]


@pytest.mark.parametrize(("msr", "wall_msr"), [(0x4B56_4D01, 0x4B56_4D00), (0x12, 0x11)])
def test_kvmclock_page_gives_nanoseconds_from_the_tsc(lab: Lab, msr: int, wall_msr: int) -> None:
    with lab.machine(f"""
    start:
        wrmsr64 {msr:#x}, {FREE | 1:#x}
        wrmsr64 {wall_msr:#x}, {FREE + 0x100:#x}
        rdtsc
        shl     rdx, 32
        or      rax, rdx
        report  rax
        finish
    """) as machine:
        before = machine.vm.get_clock().clock
        (tsc,) = machine.run()
        after = machine.vm.get_clock().clock

        version, stamp, system, multiplier, shift, flags = struct.unpack_from("<I4xQQIbB", machine.memory, FREE)
        delta = tsc - stamp
        scaled = delta << shift if shift >= 0 else delta >> -shift
        now = system + (scaled * multiplier >> 32)
        assert version % 2 == 0
        assert version > 0
        # The guest's clock and the host's view of it agree within a millisecond at both ends.
        assert before - 1_000_000 <= now <= after + 1_000_000
        # Stable across vCPUs; KVM never says so to a guest of the old MSR, as that one knew no such flag.
        assert flags & 1 == 1 or msr == 0x12
        wall_version, seconds, nanoseconds = struct.unpack_from("<III", machine.memory, FREE + 0x100)
        assert wall_version % 2 == 0
        assert seconds > 1_600_000_000
        assert nanoseconds < 1_000_000_000


def test_kvm_signature_leaf_names_kvm(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     eax, 0x40000000
        cpuid
        report  rbx
        report  rcx
        report  rdx
        finish
    """) as machine:
        assert b"".join(word.to_bytes(4, "little") for word in machine.run()) == b"KVMKVMKVM\0\0\0"


def test_clock_set_is_what_the_guest_goes_on_from(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        wrmsr64 0x4b564d01, {FREE | 1:#x}
        finish
    """) as machine:
        clock = machine.vm.get_clock()
        clock.clock = 10**15
        clock.flags = 0
        machine.vm.set_clock(clock)

        machine.run()

        assert 10**15 <= machine.vm.get_clock().clock < 10**15 + 60 * 10**9
        assert struct.unpack_from("<Q", machine.memory, FREE + 16)[0] >= 10**15


KVM_FEATURES, KVM_FEATURE_STEAL_TIME, MSR_KVM_STEAL_TIME = 0x4000_0001, 5, 0x4B56_4D03


def test_steal_time_is_switched_on_and_counts_in_the_guests_memory(lab: Lab) -> None:
    """The register keeps what was written, and the counter's version is even whenever a guest can look."""
    offered = (each.eax for each in lab.accel.get_supported_cpuid() if each.function == KVM_FEATURES)
    if not any(eax >> KVM_FEATURE_STEAL_TIME & 1 for eax in offered):
        pytest.skip("this accelerator has no steal time")
    with lab.machine(f"""
    start:
        apic_only
        wrmsr64 {MSR_KVM_STEAL_TIME:#x}, {FREE | 1:#x}
        apic_write {DIVIDE:#x}, {DIVIDE_BY_1}
        apic_write {LVT_TIMER:#x}, {0x51 | PERIODIC:#x}
        apic_write {INITIAL:#x}, 300000
    again:
        sti
        hlt
        cli
        cmp     dword ptr ds:[LOG_COUNT], 3
        jb      again
        apic_write {INITIAL:#x}, 0
        rdmsr64 {MSR_KVM_STEAL_TIME:#x}
        report  rax
        mov     eax, ds:[{FREE + 8:#x}]
        and     eax, 1
        report  rax
        finish
    """) as machine:
        assert machine.run()[-2:] == [FREE | 1, 0]

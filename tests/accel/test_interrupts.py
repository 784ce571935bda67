"""Interrupts from outside: messages, lines through IOAPIC and PIC, eventfds, NMI, and halts that wait for them.

SDM volume 3, chapter 11 (local APIC); Intel 82093AA and 8259A data sheets; KVM's irqfd.
"""

import os

import pytest

from ostler.accel.api import MsiRoute
from tests.accel.conftest import Lab
from tests.accel.prelude import LAYOUT

APIC = LAYOUT["APIC"]

LEVEL, ACTIVE_LOW, MASKED = 1 << 15, 1 << 13, 1 << 16


def test_msi_wakes_a_halt(lab: Lab) -> None:
    with lab.machine("""
    start:
        apic_only
        ask_and_halt
        finish
    """) as machine:
        machine.on_ask(lambda: machine.vm.signal_msi(APIC, 0x41))

        assert machine.run() == [0x141]


def test_msi_to_no_apic_is_not_delivered(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine:
        assert machine.vm.signal_msi(APIC | 7 << 12, 0x41) is False


def test_ioapic_edge_interrupts_once_for_each_rise(lab: Lab) -> None:
    with lab.machine("""
    start:
        apic_only
        ioapic_route 20, 0x42
        ask_and_halt
        ask_and_halt
        open_window
        report  7
        finish
    """) as machine:

        def pulse() -> None:
            machine.vm.irq_line(20, 1)
            machine.vm.irq_line(20, 0)

        machine.on_ask(pulse)

        assert machine.run() == [0x142, 0x142, 7]


def test_ioapic_masked_pin_is_silent(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        apic_only
        ioapic_route 20, {0x42 | MASKED:#x}
        ioapic_route 21, 0x43
        ask_and_halt
        finish
    """) as machine:

        def raise_both() -> None:
            machine.vm.irq_line(20, 1)
            machine.vm.irq_line(21, 1)

        machine.on_ask(raise_both)

        assert machine.run() == [0x143]


def test_ioapic_level_interrupts_until_the_line_falls(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        apic_only
        ioapic_route 22, {0x44 | LEVEL:#x}
        ask_and_halt                            # raises the line; the handler's third question lowers it
        open_window
        open_window
        open_window
        report  7
        finish
    handler:
        report  0x144
        out     0x80, al
        # remote IRR is set from acceptance to EOI
        mov     ecx, IOAPIC
        mov     dword ptr [rcx], 0x10 + 2 * 22
        mov     eax, [rcx + 0x10]
        shr     eax, 14
        and     eax, 1
        report  rax
        apic_write 0xb0, 0
        iretq
    """) as machine:
        machine.set_gate(0x44, "handler")
        stay = lambda: None  # noqa: E731
        machine.on_ask(
            lambda: machine.vm.irq_line(22, 1),
            stay,
            stay,
            lambda: machine.vm.irq_line(22, 0),
        )

        log = machine.run()

        assert log[:6] == [0x144, 1] * 3
        # kvm_pvm sends one more, of a line that has fallen and with remote IRR clear.
        assert log[6:] == [7] or lab.emulated_kvm


def test_irqfd_raises_its_gsi(lab: Lab) -> None:
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    with lab.machine("""
    start:
        apic_only
        ioapic_route 23, 0x45
        ask_and_halt
        ask_and_halt
        finish
    """) as machine:
        machine.vm.irqfd(event, 23)
        machine.on_ask(lambda: os.eventfd_write(event, 1))

        assert machine.run() == [0x145, 0x145]

        machine.vm.irqfd(event, 23, deassign=True)
    os.close(event)


def test_irqfd_of_an_msi_route_sends_the_message(lab: Lab) -> None:
    event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    with lab.machine("""
    start:
        apic_only
        ask_and_halt
        finish
    """) as machine:
        machine.vm.set_gsi_routing([MsiRoute(gsi=30, address=APIC, data=0x46)])
        machine.vm.irqfd(event, 30)
        machine.on_ask(lambda: os.eventfd_write(event, 1))

        assert machine.run() == [0x146]
    os.close(event)


def test_irqfd_with_resampling_tells_of_the_eoi(lab: Lab) -> None:
    event, resample = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
    with lab.machine(f"""
    start:
        apic_only
        ioapic_route 22, {0x47 | LEVEL:#x}
        ask_and_halt
        out     0x81, al
        open_window
        finish
    """) as machine:
        machine.vm.irqfd(event, 22, resample_fd=resample)
        machine.on_ask(lambda: os.eventfd_write(event, 1))
        signalled: list[int] = []
        machine.ports[0x81] = lambda _kind, _port, _data: signalled.append(os.eventfd_read(resample))

        assert machine.run() == [0x147]
        assert signalled == [1]
    os.close(event)
    os.close(resample)


PIC_HANDLER = """
handler:
    report  {mark}
    mov     al, 0x20
    out     0xa0, al
    out     0x20, al
    iretq
"""


@pytest.mark.parametrize(("gsi", "vector", "masks"), [(3, 0x33, "0xf7, 0xff"), (10, 0x3A, "0xfb, 0xfb")])
def test_pic_delivers_by_its_own_vectors(lab: Lab, gsi: int, vector: int, masks: str) -> None:
    with lab.machine(f"""
    start:
        pic_init {masks}
        ask_and_halt
        ask_and_halt
        finish
    {PIC_HANDLER.format(mark=vector)}
    """) as machine:
        machine.set_gate(vector, "handler")

        def pulse() -> None:
            machine.vm.irq_line(gsi, 1)
            machine.vm.irq_line(gsi, 0)

        machine.on_ask(pulse)

        assert machine.run() == [vector, vector]


def test_pic_masked_line_waits_for_its_mask(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        pic_init 0xff, 0xff
        out     0x80, al
        open_window
        report  1
        mov     al, 0xf7
        out     0x21, al
        open_window
        report  2
        finish
    {PIC_HANDLER.format(mark=0x33)}
    """) as machine:
        machine.set_gate(0x33, "handler")
        machine.on_ask(lambda: machine.vm.irq_line(3, 1))

        assert machine.run() == [1, 0x33, 2]


def test_task_priority_holds_lower_interrupts_back(lab: Lab) -> None:
    with lab.machine("""
    start:
        apic_only
        mov     eax, 5
        mov     cr8, rax
        out     0x80, al                        # vectors 0x4a and 0x61 arrive
        open_window
        report  1                               # 0x61 came, 0x4a waits
        apic_read 0x220                         # IRR, vectors 0x40 to 0x5f
        report  rax
        apic_read 0x80
        report  rax
        xor     eax, eax
        mov     cr8, rax
        open_window
        report  2
        finish
    """) as machine:

        def send() -> None:
            machine.vm.signal_msi(APIC, 0x4A)
            machine.vm.signal_msi(APIC, 0x61)

        machine.on_ask(send)

        assert machine.run() == [0x161, 1, 1 << 0x0A, 0x50, 0x14A, 2]


def test_higher_interrupt_breaks_into_a_handler_and_a_lower_one_waits(lab: Lab) -> None:
    with lab.machine("""
    start:
        apic_only
        ask_and_halt
        open_window
        finish
    outer:
        report  1
        out     0x80, al                        # vectors 0x45 and 0x75 arrive in vector 0x55's handler
        open_window
        report  2
        apic_write 0xb0, 0
        iretq
    """) as machine:
        machine.set_gate(0x55, "outer")

        def send() -> None:
            machine.vm.signal_msi(APIC, 0x45)
            machine.vm.signal_msi(APIC, 0x75)

        machine.on_ask(lambda: machine.vm.signal_msi(APIC, 0x55), send)

        assert machine.run() == [1, 0x175, 2, 0x145]


def test_nmi_wakes_a_halt_with_interrupts_off(lab: Lab) -> None:
    with lab.machine("""
    start:
        resume_at done
        out     0x80, al
        cli
        hlt
    done:
        finish
    """) as machine:
        machine.on_ask(machine.vcpus[0].nmi)

        log = machine.run()

        assert log[:2] == [2, 0]


def test_nmi_is_blocked_until_iret(lab: Lab) -> None:
    with lab.machine("""
    start:
        out     0x80, al
        nop
        out     0x82, al
        nop
        finish
    handler:
        report  1
        out     0x80, al                        # another one, in the handler
        nop
        report  2
        iretq
    """) as machine:
        machine.set_gate(2, "handler")
        vcpu = machine.vcpus[0]
        machine.on_ask(vcpu.nmi, vcpu.nmi, lambda: None)

        assert machine.run() == [1, 2, 1, 2]


@pytest.mark.emulated_kvm_deviates("KVM's instruction emulator looks for interrupts at exits only")
def test_sti_delays_an_interrupt_by_one_instruction(lab: Lab) -> None:
    with lab.machine("""
    start:
        apic_only
        xor     ebx, ebx
        out     0x80, al
        sti
        inc     ebx
        inc     ebx
        cli
        finish
    handler:
        report  rbx
        apic_write 0xb0, 0
        iretq
    """) as machine:
        machine.set_gate(0x48, "handler")
        machine.on_ask(lambda: machine.vm.signal_msi(APIC, 0x48))

        assert machine.run() == [1]


@pytest.mark.emulated_kvm_deviates("kvm_pvm's local APIC does not show what is in service")
def test_x2apic_self_ipi_and_eoi_by_msr(lab: Lab) -> None:
    with lab.machine("""
    start:
        apic_only
        mov     ecx, 0x1b
        rdmsr
        or      eax, 0x400
        wrmsr
        wrmsr64 0x83f, 0x49                     # self-IPI
        open_window
        rdmsr64 0x802                           # ID
        report  rax
        finish
    handler:
        rdmsr64 0x812                           # ISR, vectors 0x40 to 0x5f
        report  rax
        wrmsr64 0x80b, 0
        rdmsr64 0x812
        report  rax
        iretq
    """) as machine:
        machine.set_gate(0x49, "handler")

        assert machine.run() == [1 << 9, 0, 0]

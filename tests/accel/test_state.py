"""State: what is set is got back, and a guest stopped on one accelerator goes on, on that or the other one."""

import ctypes
import threading
from collections.abc import Iterator

import pytest

from ostler import accel
from ostler.abi.kvm.state import (
    KVM_MP_STATE_HALTED,
    KVM_VCPUEVENT_VALID_SHADOW,
    CpuidEntry2,
)
from ostler.accel.api import VCPU, Accel, ExitReason
from ostler.accel.models import model
from ostler.errors import AccelError, AccelUnavailable
from tests.accel.conftest import ACCELERATORS, Lab
from tests.accel.lab import Machine
from tests.accel.prelude import LAYOUT

FREE = LAYOUT["FREE"]

XSTATE_BV, X87, SSE = 512 // 4, 1, 2

MSRS = (0x174, 0x175, 0x176, 0x277, *range(0xC000_0081, 0xC000_0085), *range(0xC000_0100, 0xC000_0103))


@pytest.fixture(scope="module")
def accelerators() -> Iterator[dict[str, Accel]]:
    opened: dict[str, Accel] = {}
    for name in ACCELERATORS:
        try:
            opened[name] = accel.open(name)
        except AccelUnavailable as error:
            opened.pop(name, None)
            missing[name] = str(error)
    yield opened
    for one in opened.values():
        one.close()


missing: dict[str, str] = {}


def same(one: ctypes.Structure, other: ctypes.Structure) -> bool:
    return bytes(one) == bytes(other)


def test_regs_set_are_got_back(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine:
        vcpu = machine.vcpus[0]
        regs = vcpu.get_regs()
        for number, (name, _) in enumerate(regs._fields_[:16]):
            setattr(regs, name, 0x1111_2222_3333_0000 + number)
        regs.rip, regs.rflags = 0x1234, 0x246
        vcpu.set_regs(regs)

        assert same(vcpu.get_regs(), regs)


def test_sregs_set_are_got_back(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine:
        vcpu = machine.vcpus[0]
        sregs = vcpu.get_sregs()
        sregs.cr2, sregs.cr8, sregs.gdt.base = 0x1234_5000, 7, 0xFFFF_8000_0000_1000
        sregs.fs.base, sregs.gs.base = 0x7FFF_0000_0000, 0xFFFF_8000_1234_0000
        vcpu.set_sregs(sregs)
        back = vcpu.get_sregs()

        for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base"):
            assert getattr(back, name) == getattr(sregs, name), name
        for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
            assert getattr(back, name).base == getattr(sregs, name).base, name
            assert getattr(back, name).selector == getattr(sregs, name).selector, name
        assert (back.gdt.base, back.gdt.limit) == (sregs.gdt.base, sregs.gdt.limit)


def test_sregs_that_cannot_be_are_refused(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine:
        sregs = machine.vcpus[0].get_sregs()
        sregs.cr0 &= ~1  # paging without protection

        with pytest.raises(AccelError, match=r"KVM_SET_SREGS \(vCPU 0\): Invalid argument"):
            machine.vcpus[0].set_sregs(sregs)


@pytest.mark.parametrize("index", MSRS)
def test_msr_set_is_got_back(lab: Lab, index: int) -> None:
    value = 0x0007_0406_0007_0406 if index == 0x277 else 0x1234_5000
    with lab.machine("start:\nfinish\n") as machine:
        machine.vcpus[0].set_msrs({index: value})

        assert machine.vcpus[0].get_msrs([index]) == {index: value}


def test_unknown_msr_is_named(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine:
        with pytest.raises(AccelError, match=r"KVM_GET_MSRS \(vCPU 0\): MSR 0x12345678 cannot be read"):
            machine.vcpus[0].get_msrs([0x174, 0x1234_5678])
        with pytest.raises(AccelError, match=r"KVM_SET_MSRS \(vCPU 0\): MSR 0x12345678 does not take 0x5"):
            machine.vcpus[0].set_msrs({0x174: 8, 0x1234_5678: 5})


def test_fpu_set_is_got_back(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine:
        vcpu = machine.vcpus[0]
        fpu = vcpu.get_fpu()
        fpu.fcw, fpu.ftwx = 0x27F, 0b100  # KVM does not carry mxcsr here, only in the XSAVE area
        fpu.xmm[3][:] = range(16)
        fpu.fpr[2][:10] = range(10)
        vcpu.set_fpu(fpu)

        back = vcpu.get_fpu()
        assert (back.fcw, back.ftwx) == (0x27F, 0b100)
        assert bytes(back.xmm[3]) == bytes(range(16))
        assert bytes(back.fpr[2])[:10] == bytes(range(10))


def test_xsave_round_trips(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine:
        vcpu = machine.vcpus[0]
        area = vcpu.get_xsave()
        area.region[(160 + 16) // 4] = 0xDEAD_BEEF  # XMM1
        area.region[512 // 4] |= 3
        vcpu.set_xsave(area)

        assert bytes(vcpu.get_fpu().xmm[1])[:4] == b"\xef\xbe\xad\xde"


def test_debugregs_set_are_got_back(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine:
        vcpu = machine.vcpus[0]
        debug = vcpu.get_debugregs()
        debug.db[:] = (1, 2, 3, 4)
        debug.dr7 = 0x400
        vcpu.set_debugregs(debug)

        assert list(vcpu.get_debugregs().db) == [1, 2, 3, 4]


def test_lapic_set_is_got_back(lab: Lab) -> None:
    with lab.machine("start:\napic_only\nfinish\n") as machine:
        machine.run()
        vcpu = machine.vcpus[0]
        lapic = vcpu.get_lapic()
        assert bytes(lapic.regs[0xF0:0xF4]) == b"\xff\x01\0\0"
        lapic.regs[0x80] = 0x40
        vcpu.set_lapic(lapic)

        assert vcpu.get_lapic().regs[0x80] == 0x40
        assert vcpu.get_sregs().cr8 == 4


def test_vcpu_events_show_the_interrupt_shadow(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine:
        vcpu = machine.vcpus[0]
        events = vcpu.get_vcpu_events()
        events.interrupt.shadow, events.flags = 2, KVM_VCPUEVENT_VALID_SHADOW
        vcpu.set_vcpu_events(events)

        assert vcpu.get_vcpu_events().interrupt.shadow != 0


def test_injected_exception_is_delivered(lab: Lab) -> None:
    with lab.machine("start:\nresume_at done\nnop\ndone: finish\n") as machine:
        vcpu = machine.vcpus[0]
        events = vcpu.get_vcpu_events()
        events.exception.injected, events.exception.nr = 1, 13
        events.exception.has_error_code, events.exception.error_code = 1, 0x18
        events.flags = 0
        vcpu.set_vcpu_events(events)

        assert machine.run()[:3] == [13, 0x18, machine.label("start")]


def test_translate_walks_the_guests_tables(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine:
        machine.map_page(FREE, FREE + 0x3000 | 3)
        machine.map_page(FREE + 0x1000, 0)

        there = machine.vcpus[0].translate(FREE + 0x123)
        assert (there.valid, there.physical_address) == (1, FREE + 0x3123)
        assert machine.vcpus[0].translate(FREE + 0x1000).valid == 0


def as_rows(entries: list[CpuidEntry2]) -> list[tuple[int, ...]]:
    return [(e.function, e.index, e.eax, e.ebx, e.ecx, e.edx) for e in entries]


def test_cpuid_set_is_got_back(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine:
        vcpu = machine.vcpus[0]
        wanted = as_rows(model().cpuid(0, 1, vcpu.get_tsc_khz()))
        got = as_rows(vcpu.get_cpuid2())

        assert [row[:2] for row in got] == [row[:2] for row in wanted]
        for mine, theirs in zip(wanted, got, strict=True):
            if mine[0] not in (1, 7, 0xD):  # with bits that follow registers: APIC, OSXSAVE, sizes
                assert mine == theirs


@pytest.mark.emulated_kvm_deviates("kvm_pvm lets bits of the host's processor through in leaves 1 and 7")
def test_cpuid_in_the_guest_is_the_models(lab: Lab) -> None:
    rows = [row for row in as_rows(model().cpuid(0, 1, 1_000_000)) if row[0] not in (0x15, 0x16, 0x4000_0010, 0xD)]
    asks = "\n".join(
        f"mov eax, {leaf:#x}\nmov ecx, {index}\ncpuid\nreport rax\nreport rbx\nreport rcx\nreport rdx"
        for leaf, index, *_ in rows
    )
    with lab.machine(f"start:\n{asks}\nfinish\n") as machine:
        log = machine.run()

        got = [tuple(log[4 * at : 4 * at + 4]) for at in range(len(rows))]
        assert dict(zip([row[:2] for row in rows], got, strict=True)) == {row[:2]: row[2:] for row in rows}


def test_model_msrs_in_the_guest(lab: Lab) -> None:
    with lab.machine("""
    start:
        rdmsr64 0x10a
        report  rax
        rdmsr64 0x1a0
        and     eax, 1
        report  rax
        finish
    """) as machine:
        assert machine.run() == [model().msrs[0x10A], 1]


# Stopped in the middle of everything: x87 and SSE state, a read of a port without its answer.
LONG_STORY = """
start:
    apic_only
    wrmsr64 0xc0000081, 0x0018000800000000
    wrmsr64 0xc0000102, 0xffff800000001000
    mov     rax, 0x1122334455667788
    mov     ds:[FREE], rax
    mov     ds:[FREE + 8], rax
    movdqu  xmm5, ds:[FREE]
    mov     eax, 0x123
    mov     dr2, rax
    in      al, 0x90                            # saved here, with the read unanswered
    movzx   eax, al
    report  rax
    movdqu  ds:[FREE + 16], xmm5
    mov     rax, ds:[FREE + 16]
    report  rax
    mov     rax, dr2
    report  rax
    rdmsr64 0xc0000081
    report  rax
    rdmsr64 0xc0000102
    report  rax
    ask_and_halt
    finish
"""


def move(old: Machine, new: Machine) -> None:
    """Carry a stopped guest over, in the order KVM wants it."""
    source, target = old.vcpus[0], new.vcpus[0]
    settle(source)
    new.memory[:] = old.memory[:]
    target.set_sregs(source.get_sregs())
    target.set_regs(source.get_regs())
    target.set_xcrs(source.get_xcrs())
    area = source.get_xsave()
    area.region[XSTATE_BV] &= X87 | SSE  # what the model has; kvm_pvm adds PKRU
    target.set_xsave(area)
    target.set_msrs(source.get_msrs(MSRS))
    target.set_debugregs(source.get_debugregs())
    target.set_lapic(source.get_lapic())
    target.set_mp_state(source.get_mp_state())
    target.set_vcpu_events(source.get_vcpu_events())
    for chip in range(3):
        new.vm.set_irqchip(old.vm.get_irqchip(chip))
    new.vm.set_pit2(old.vm.get_pit2())
    clock = old.vm.get_clock()
    clock.flags = 0
    new.vm.set_clock(clock)
    new.vm.memory_written(0, len(new.memory))


def settle(vcpu: VCPU) -> None:
    """Let the vCPU take in the answer to its last exit, without running on."""
    vcpu.immediate_exit = True
    assert vcpu.run() is ExitReason.INTR
    vcpu.immediate_exit = False


@pytest.mark.parametrize("source", ACCELERATORS)
@pytest.mark.parametrize("target", ACCELERATORS)
def test_guest_stopped_on_one_goes_on_on_the_other(accelerators: dict[str, Accel], source: str, target: str) -> None:
    for name in (source, target):
        if name not in accelerators:
            pytest.skip(missing[name])
    with (
        Machine(accelerators[source], LONG_STORY, pit=True) as old,
        Machine(accelerators[target], LONG_STORY, pit=True) as new,
    ):
        assert old.vcpus[0].run() is ExitReason.IO
        assert old.vcpus[0].exit.io.port == 0x90
        old.vcpus[0].exit.io.data[0] = 0x5C

        move(old, new)
        new.on_ask(lambda: new.vm.signal_msi(LAYOUT["APIC"], 0x5A))

        assert new.run() == [
            0x5C,
            0x1122_3344_5566_7788,
            0x123,
            0x0018_0008_0000_0000,
            0xFFFF_8000_0000_1000,
            0x15A,
        ]


@pytest.mark.parametrize("source", ACCELERATORS)
@pytest.mark.parametrize("target", ACCELERATORS)
def test_guest_stopped_in_a_halt_wakes_on_the_other(accelerators: dict[str, Accel], source: str, target: str) -> None:
    for name in (source, target):
        if name not in accelerators:
            pytest.skip(missing[name])
    story = "start:\napic_only\nout 0x80, al\nsti\nhlt\ncli\nfinish\n"
    with (
        Machine(accelerators[source], story, pit=True) as old,
        Machine(accelerators[target], story, pit=True) as new,
    ):
        vcpu = old.vcpus[0]
        assert vcpu.run() is ExitReason.IO
        while vcpu.get_mp_state() != KVM_MP_STATE_HALTED:
            run_a_moment(vcpu)

        move(old, new)
        assert new.vcpus[0].get_mp_state() == KVM_MP_STATE_HALTED
        new.vm.signal_msi(LAYOUT["APIC"], 0x5B)

        assert new.run() == [0x15B]


def run_a_moment(vcpu: VCPU) -> None:
    """Kick it out of a run a moment after it began; the caller looks whether it got to the halt."""
    timer = threading.Timer(0.02, vcpu.kick)
    timer.start()
    assert vcpu.run() is ExitReason.INTR
    timer.join()

"""The processor at large: reset state, model-specific registers, segments and ports, halts without an irqchip."""

import pytest

from ostler.accel.api import ExitReason
from ostler.accel.models import model
from tests.accel.conftest import Lab
from tests.accel.prelude import LAYOUT, RECORD

GP, UD = 13, 6


def test_new_vcpu_is_as_after_reset(lab: Lab) -> None:
    """SDM volume 3, table 9-1."""
    with lab.machine("start:\nfinish\n") as machine:
        fresh = lab.accel.create_vm()
        with fresh:
            fresh.create_irqchip()
            vcpu = fresh.create_vcpu(0)
            vcpu.set_cpuid2(model().cpuid(0, 1, vcpu.get_tsc_khz()))
            regs, sregs = vcpu.get_regs(), vcpu.get_sregs()

        assert (regs.rip, regs.rflags) == (0xFFF0, 2)
        assert (sregs.cs.selector, sregs.cs.base, sregs.cs.limit) == (0xF000, 0xFFFF_0000, 0xFFFF)
        assert (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer) == (0x6000_0010, 0, 0, 0, 0)
        assert (sregs.gdt.base, sregs.gdt.limit, sregs.idt.limit) == (0, 0xFFFF, 0xFFFF)
        assert sregs.apic_base == LAYOUT["APIC"] | 0x900  # enabled, boot processor
        assert machine.log == []


def test_halt_without_an_irqchip_is_an_exit(lab: Lab) -> None:
    with lab.machine("start:\nreport 1\nhlt\nbehind: finish\n", irqchip=False) as machine:
        assert machine.run_until_exit() is ExitReason.HLT
        assert machine.vcpus[0].get_regs().rip == machine.label("behind")
        assert machine.run() == [1]


@pytest.mark.parametrize("index", [0x48, 0x49])
def test_speculation_controls_of_the_model_can_be_written(lab: Lab, index: int) -> None:
    lab.skip_where_emulated("kvm_pvm leaves IBRS and IBPB to its host")
    lab.skip_where_missing("spec_ctrl")
    with lab.machine(f"""
    start:
        resume_at done
        wrmsr64 {index:#x}, 1
    done:
        finish
    """) as machine:
        assert machine.run() == []


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0x1B, 0xFEE0_0400),  # x2APIC without the APIC
        (0x1B, 0xFEE0_0901),  # reserved
        (0x10A, 0),  # read-only
        (0x277, 0x0202_0202_0202_0202),  # PAT: no such type
        (0xC000_0100, 0x8000_0000_0000_0000),  # FS base: not canonical
        (0xC000_0102, 0x0100_0000_0000_0000),  # not canonical on processors with 57 bits either
        (0xC000_0080, 0x8000_0000),
        (0x802, 0),  # x2APIC registers outside x2APIC mode
    ],
)
def test_wrmsr_refuses_what_the_register_does_not_take(
    lab: Lab, index: int, value: int, request: pytest.FixtureRequest
) -> None:
    if lab.emulated_kvm and index == 0x277:
        request.applymarker(pytest.mark.xfail(reason="kvm_pvm takes any PAT", strict=True))
    with lab.machine(f"""
    start:
        resume_at done
        mov     ecx, {index:#x}
        mov     eax, {value & 0xFFFF_FFFF:#x}
        mov     edx, {value >> 32:#x}
    at:
        wrmsr
    done:
        finish
    """) as machine:
        machine.run()

        assert machine.log[:3] == [GP, 0, machine.label("at")]


def test_microcode_revision_reads_as_linux_asks_for_it(lab: Lab) -> None:
    """It writes zero, executes CPUID and reads the revision from the upper half; a write must not fault."""
    with lab.machine("""
    start:
        resume_at done
        wrmsr64 0x8b, 0
        mov     eax, 1
        cpuid
        rdmsr64 0x8b
        shr     rax, 32
        report  rax
    done:
        finish
    """) as machine:
        assert machine.run() == [1]


SEGMENTS = """
start:
    mov     eax, 0x10
    lar     ebx, eax
    setz    cl
    movzx   ecx, cl
    report  rcx
    and     ebx, 0xf0ff00
    report  rbx
    mov     eax, 0x58
    lsl     ebx, eax
    report  rbx
    mov     eax, 0x10
    lsl     ebx, eax
    report  rbx
    mov     eax, 0x70                           # empty
    mov     ebx, 0x1234
    lar     ebx, eax
    setz    cl
    movzx   ecx, cl
    report  rcx
    report  rbx
    mov     eax, 0x08
    verr    ax
    setz    cl
    movzx   ecx, cl
    report  rcx
    verw    ax
    setz    cl
    movzx   ecx, cl
    report  rcx
    finish
"""


@pytest.mark.emulated_kvm_deviates("KVM's instruction emulator has neither LAR, LSL, VERR nor VERW")
def test_segment_queries_answer_by_zf(lab: Lab) -> None:
    with lab.machine(SEGMENTS) as machine:
        assert machine.run() == [1, 0xC0_9300, 0xFFFF, 0xFFFF_FFFF, 0, 0x1234, 1, 0]


def test_local_descriptor_table_is_used(lab: Lab) -> None:
    with lab.machine("""
    start:
        # an LDT of 16 bytes at FREE, described at 0x70; its entry 1 is data from 0x4000 on
        mov     rax, 0x0000820200000000 + 0xf
        mov     ds:[GDT + 0x70], rax
        mov     qword ptr ds:[GDT + 0x78], 0
        mov     rax, 0x00cf93004000ffff
        mov     ds:[FREE + 8], rax
        mov     eax, 0x70
        lldt    ax
        sldt    ebx
        report  rbx
        mov     eax, 0x0c
        mov     fs, eax
        mov     rbx, fs:[0]                     # RESUME
        mov     rcx, ds:[RESUME]
        cmp     rbx, rcx
        sete    al
        movzx   eax, al
        report  rax
        resume_at done
        mov     eax, 0x14                       # beyond its limit
    at:
        mov     fs, eax
    done:
        finish
    """) as machine:
        log = machine.run()

        assert log[:2] == [0x70, 1]
        assert log[2:5] == [GP, 0x14, machine.label("at")]


def test_segment_loaded_is_marked_accessed(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     rax, 0x00cf92000000ffff
        mov     ds:[GDT + 0x70], rax
        mov     eax, 0x70
        mov     es, eax
        movzx   ebx, byte ptr ds:[GDT + 0x75]
        report  rbx
        finish
    """) as machine:
        assert machine.run() == [0x93]


def test_ltr_marks_the_tss_busy(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     rax, ds:[GDT + 0x40]
        mov     rbx, ~(2 << 40)
        and     rax, rbx
        mov     ds:[GDT + 0x70], rax
        mov     qword ptr ds:[GDT + 0x78], 0
        mov     eax, 0x70
        ltr     ax
        movzx   ebx, byte ptr ds:[GDT + 0x75]
        report  rbx
        str     ebx
        report  rbx
        finish
    """) as machine:
        assert machine.run() == [0x8B, 0x70]


def test_io_bitmap_lets_ring_3_at_the_ports_it_names(lab: Lab) -> None:
    with lab.machine("""
    start:
        resume_at done
        # the bitmap behind the TSS: port 0x90 free, the rest not; the limit covers 0x200 ports
        mov     word ptr ds:[GDT + 0x40], 0x68 + 0x40
        mov     edi, TSS + 0x68
        mov     ecx, 0x41
        mov     al, 0xff
        cld
        rep stosb
        mov     byte ptr ds:[TSS + 0x68 + 0x12], 0xfe
        mov     byte ptr ds:[GDT + 0x45], 0x89
        mov     eax, 0x40
        ltr     ax
        enter_user there
    .section .user
    there:
        out     0x90, al
    at: out     0x91, al
    .text
    done:
        finish
    """) as machine:
        machine.run()

        assert machine.log[:3] == [GP, 0, machine.label("at")]
        assert [port for _, port, _, _ in machine.exits] == [0x90]


def test_iopl_lets_ring_3_at_ports_and_flags(lab: Lab) -> None:
    lab.skip_where_emulated("kvm_pvm has no IOPL for ring 3")
    with lab.machine("""
    start:
        resume_at done
        enter_user there, 0x3202
    .section .user
    there:
        out     0x90, al
        cli
        sti
    at: hlt
    .text
    done:
        finish
    """) as machine:
        log = machine.run()

        assert log[:3] == [GP, 0, machine.label("at")]
        assert log[4] & 0x3200 == 0x3200
        assert len(log) == RECORD


def test_popf_in_ring_3_leaves_if_and_iopl_alone(lab: Lab) -> None:
    with lab.machine("""
    start:
        resume_at done
        enter_user there, 0x202
    .section .user
    there:
        push    0x3002                          # IF off, IOPL 3
        popf
    at: hlt
    .text
    done:
        finish
    """) as machine:
        log = machine.run()

        assert log[4] & 0x3200 == 0x200


@pytest.mark.emulated_kvm_deviates("KVM's instruction emulator has no CMPXCHG16B")
def test_cmpxchg16b_and_its_alignment(lab: Lab) -> None:
    with lab.machine("""
    start:
        resume_at done
        mov     qword ptr ds:[FREE], 1
        mov     qword ptr ds:[FREE + 8], 2
        mov     eax, 1
        mov     edx, 2
        mov     ebx, 3
        mov     ecx, 4
        lock cmpxchg16b ds:[FREE]
        setz    sil
        movzx   esi, sil
        report  rsi
        mov     rsi, ds:[FREE + 8]
        report  rsi
        lock cmpxchg16b ds:[FREE]
        report  rax
        report  rdx
    at: lock cmpxchg16b ds:[FREE + 8]
    done:
        finish
    """) as machine:
        log = machine.run()

        assert log[:4] == [1, 4, 3, 4]
        assert log[4:7] == [GP, 0, machine.label("at")]


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("0x0f, 0x01, 0xc4", id="vmxoff"),
        pytest.param("0x0f, 0x01, 0xd8", id="vmrun"),
        pytest.param("0x0f, 0x01, 0xcf", id="encls"),
        pytest.param("0x0f, 0x01, 0xc8", id="monitor"),
        pytest.param("0xc7, 0xf8, 0, 0, 0, 0", id="xbegin"),
        pytest.param("0xc5, 0xf0, 0x58, 0xc1", id="vaddps"),
    ],
)
def test_instruction_of_a_feature_the_model_lacks_is_undefined(lab: Lab, code: str) -> None:
    """VMX, SVM, SGX, MONITOR, TSX, AVX."""
    lab.skip_where_emulated("KVM's instruction emulator reports what it does not know as an internal error")
    with lab.machine(f"start:\nresume_at done\nat: .byte {code}\ndone: finish\n") as machine:
        assert machine.run()[:3] == [UD, 0, machine.label("at")]

"""The XSAVE family with x87 and SSE state (SDM volume 1, chapter 13)."""

import pytest

from ostler.abi.kvm.state import Xcrs
from ostler.accel.models import model
from tests.accel.conftest import Lab
from tests.accel.lab import Machine
from tests.accel.prelude import LAYOUT

FREE, GP, UD = LAYOUT["FREE"], 13, 6

PATTERN = bytes(range(0x10, 0x20))


@pytest.fixture(autouse=True)
def _needs_the_instructions(lab: Lab) -> None:
    lab.skip_where_emulated("KVM's instruction emulator has no XSAVE family")


ON = """
    mov     rax, cr4
    bts     rax, 18                             # OSXSAVE
    mov     cr4, rax
"""


def program(text: str) -> str:
    return f"""
    start:
        resume_at done
        {ON}
        fninit
        pxor    xmm3, xmm3
        movdqu  xmm3, ds:[FREE + 0x2000]
        {text}
    done:
        finish
    """


def test_xgetbv_needs_osxsave_and_shows_x87(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        resume_at on
    fault:
        xor     ecx, ecx
    too_early:
        xgetbv
    on:
        {ON}
        xor     ecx, ecx
        xgetbv
        report  rax
        mov     eax, 1
        xor     ecx, ecx
        cpuid
        shr     ecx, 27
        and     ecx, 1
        report  rcx
        finish
    """) as machine:
        log = machine.run()

        assert log[:3] == [UD, 0, machine.label("too_early")]
        assert log[6:] == [1, 1]


@pytest.mark.parametrize(
    ("value", "fault"), [(1, False), (3, False), (0, True), (2, True), (7, True), (1 << 9 | 1, True)]
)
def test_xsetbv_takes_what_the_model_has(lab: Lab, value: int, *, fault: bool) -> None:
    with lab.machine(
        program(f"""
        xor     ecx, ecx
        mov     eax, {value}
        xor     edx, edx
    at:
        xsetbv
        xgetbv
        report  rax
    """),
        cpu=model("ostler-v2.2"),
    ) as machine:
        if lab.emulated_svm and not fault:
            # KVM never learns of XSETBV there (deviations.py), and an exit between the two would undo it.
            set_xcr0(machine, value)
        log = machine.run()

        assert log[:3] == [GP, 0, machine.label("at")] if fault else log == [value]


ENABLE_SSE = "xor ecx, ecx; mov eax, 3; xor edx, edx; xsetbv;"


def set_xcr0(machine: Machine, value: int) -> None:
    xcrs = Xcrs(nr_xcrs=1)
    xcrs.xcrs[0].value = value
    machine.vcpus[0].set_xcrs(xcrs)


def machine_with_sse(lab: Lab, text: str) -> Machine:
    """XCR0 set from outside, too: see deviations.py on who never learns of XSETBV."""
    machine = lab.machine(program(f"{ENABLE_SSE}\n{text}"), cpu=model("ostler-v2.2"))
    set_xcr0(machine, 3)
    return machine


@pytest.mark.parametrize("instruction", ["xsave", "xsaveopt", "xsavec", "xsaves"])
def test_xsave_writes_the_legacy_area_and_header(lab: Lab, instruction: str) -> None:
    lab.skip_where_missing(instruction)
    with machine_with_sse(
        lab,
        f"""
        mov     edi, FREE
        {instruction}64 [rdi]
    """,
    ) as machine:
        machine.memory[FREE + 0x2000 : FREE + 0x2010] = PATTERN

        machine.run()

        area = machine.memory[FREE : FREE + 576]
        assert area[160 + 48 : 160 + 64] == PATTERN
        assert int.from_bytes(area[512:520], "little") & 2
        compact = 1 << 63 | 3 if instruction in ("xsavec", "xsaves") else 0
        assert int.from_bytes(area[520:528], "little") == compact


@pytest.mark.parametrize(("save", "restore"), [("xsave", "xrstor"), ("xsavec", "xrstor"), ("xsaves", "xrstors")])
def test_xrstor_brings_it_back(lab: Lab, save: str, restore: str) -> None:
    lab.skip_where_missing(save)
    with machine_with_sse(
        lab,
        f"""
        mov     edi, FREE
        {save}64 [rdi]
        pxor    xmm3, xmm3
        {restore}64 [rdi]
        movdqu  ds:[FREE + 0x2100], xmm3
    """,
    ) as machine:
        machine.memory[FREE + 0x2000 : FREE + 0x2010] = PATTERN

        machine.run()

        assert machine.memory[FREE + 0x2100 : FREE + 0x2110] == PATTERN


def test_xrstor_of_a_component_in_init_state_clears_it(lab: Lab) -> None:
    with machine_with_sse(
        lab,
        """
        mov     edi, FREE
        xsave64 [rdi]
        and     qword ptr [rdi + 512], -3        # SSE: initial
        xrstor64 [rdi]
        movdqu  ds:[FREE + 0x2100], xmm3
    """,
    ) as machine:
        machine.memory[FREE + 0x2000 : FREE + 0x2010] = PATTERN

        machine.run()

        assert machine.memory[FREE + 0x2100 : FREE + 0x2110] == bytes(16)


@pytest.mark.parametrize(
    ("spoil", "instruction"),
    [
        ("mov qword ptr [rdi + 512], 4", "xrstor64 [rdi]"),  # a component XCR0 lacks
        ("mov qword ptr [rdi + 520], 1", "xrstor64 [rdi]"),  # compacted without saying so
        ("mov qword ptr [rdi + 528], 1", "xrstor64 [rdi]"),  # reserved header bytes
        ("mov dword ptr [rdi + 24], 0x10000", "xrstor64 [rdi]"),  # a reserved bit of MXCSR
        ("nop", "xsave64 [rdi + 16]"),  # not aligned to 64
        ("mov qword ptr [rdi + 520], 0", "xrstors64 [rdi]"),  # XRSTORS wants the compacted format
    ],
)
def test_xsave_family_faults_on_a_bad_area(lab: Lab, spoil: str, instruction: str) -> None:
    if instruction.startswith("xrstors"):
        lab.skip_where_missing("xsaves")
    with machine_with_sse(
        lab,
        f"""
        mov     edi, FREE
        xsave64 [rdi]
        {spoil}
        mov     eax, 3
    at:
        {instruction}
    """,
    ) as machine:
        machine.run()

        assert machine.log[:3] == [GP, 0, machine.label("at")]


def test_xgetbv_of_1_tells_what_is_in_use(lab: Lab) -> None:
    with machine_with_sse(
        lab,
        """
        mov     ecx, 1
        xgetbv
        report  rax
    """,
    ) as machine:
        machine.memory[FREE + 0x2000 : FREE + 0x2010] = PATTERN

        (in_use,) = machine.run()

        assert in_use & 2
        assert in_use & ~3 == 0


def test_cpuid_of_xsave_sizes_follows_xcr0(lab: Lab) -> None:
    with machine_with_sse(
        lab,
        """
        mov     eax, 0xd
        xor     ecx, ecx
        cpuid
        report  rax
        report  rbx
        report  rcx
    """,
    ) as machine:
        assert machine.run() == [3, 576, 576]


def test_model_without_xsave_has_no_instruction_for_it(lab: Lab) -> None:
    with lab.machine(
        """
    start:
        resume_at done
        xor     ecx, ecx
    at:
        xgetbv
    done:
        finish
    """,
        cpu=model("ostler-v1.1"),
    ) as machine:
        machine.run()

        assert machine.log[:3] == [UD, 0, machine.label("at")]

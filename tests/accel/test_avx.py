"""AVX state and instructions of x86-64-v3 (SDM volume 1, chapters 13 and 14; volume 2A, 2.4)."""

import pytest

from ostler.abi.kvm.state import Xcrs
from tests.accel.conftest import Lab
from tests.accel.lab import Machine
from tests.accel.prelude import LAYOUT

FREE, GP, UD, NM = LAYOUT["FREE"], 13, 6, 7

AVX, X87_SSE_AVX = 1 << 2, 0b111
YMM_OFFSET = 576
XSTATE_BV_WORD = 128
PATTERN = bytes(range(0x10, 0x30))


@pytest.fixture(autouse=True)
def _needs_avx(lab: Lab) -> None:
    lab.skip_where_emulated("KVM's instruction emulator has no AVX")
    lab.skip_where_missing("avx", "avx2", "fma", "f16c")


def machine_with_avx(lab: Lab, text: str, *, xcr0: int = X87_SSE_AVX) -> Machine:
    """XCR0 is set from outside, too: see deviations.py on who never learns of XSETBV."""
    machine = lab.machine(f"""
    start:
        resume_at done
        mov     rax, cr4
        bts     rax, 18                         # OSXSAVE
        mov     cr4, rax
        xor     ecx, ecx
        mov     eax, {xcr0}
        xor     edx, edx
        xsetbv
        mov     edi, FREE
        {text}
    done:
        finish
    """)
    xcrs = Xcrs(nr_xcrs=1)
    xcrs.xcrs[0].value = xcr0
    machine.vcpus[0].set_xcrs(xcrs)
    machine.memory[FREE + 0x2000 : FREE + 0x2020] = PATTERN
    return machine


def result(machine: Machine) -> bytes:
    """What the program left at FREE + 0x2100."""
    return bytes(machine.memory[FREE + 0x2100 : FREE + 0x2120])


@pytest.mark.parametrize(
    ("instruction", "upper"),
    [
        ("vmovdqa xmm1, xmm1", bytes(16)),  # VEX.128 clears the upper half
        ("movdqa xmm1, xmm1", PATTERN[16:]),  # a legacy instruction keeps it
        ("vzeroupper", bytes(16)),
    ],
)
def test_upper_half_after_an_instruction(lab: Lab, instruction: str, upper: bytes) -> None:
    with machine_with_avx(
        lab,
        f"""
        vmovdqu ymm1, [rdi + 0x2000]
        {instruction}
        vmovdqu [rdi + 0x2100], ymm1
    """,
    ) as machine:
        machine.run()

        assert result(machine) == PATTERN[:16] + upper


@pytest.mark.parametrize(
    ("prepare", "xcr0", "vector"),
    [
        ("nop", 0b011, UD),  # XCR0 without AVX
        ("mov rax, cr4; btr rax, 18; mov cr4, rax", 0b111, UD),  # OSXSAVE off
        ("mov rax, cr0; or eax, 8; mov cr0, rax", 0b111, NM),  # task switched
        ("mov rax, cr0; or eax, 4; mov cr0, rax", 0b111, None),  # EM is about x87 and SSE
    ],
)
def test_vex_is_available_by_xcr0_osxsave_and_ts(lab: Lab, prepare: str, xcr0: int, vector: int | None) -> None:
    with machine_with_avx(lab, f"{prepare}\nat: vpaddd ymm1, ymm2, ymm3\nreport rdi", xcr0=xcr0) as machine:
        log = machine.run()

        assert log == [FREE] if vector is None else log[:3] == [vector, 0, machine.label("at")]


@pytest.mark.parametrize(
    ("instruction", "faults"),
    [
        ("vmovdqa ymm1, [rdi + 0x2010]", True),  # aligned moves want 32 bytes
        ("vpaddd ymm1, ymm2, [rdi + 0x2001]", False),  # everything else takes any address
        ("vmovdqa xmm1, [rdi + 0x2010]", False),
    ],
)
def test_alignment_is_wanted_by_aligned_moves_only(lab: Lab, instruction: str, *, faults: bool) -> None:
    with machine_with_avx(lab, f"at: {instruction}\nreport rdi") as machine:
        log = machine.run()

        assert log[:3] == [GP, 0, machine.label("at")] if faults else log == [FREE]


@pytest.mark.parametrize("instruction", ["xsave64", "xsaveopt64", "xsavec64", "xsaves64"])
def test_upper_halves_are_a_component_of_their_own(lab: Lab, instruction: str) -> None:
    lab.skip_where_missing(*({instruction.removesuffix("64")} - {"xsave"}))
    with machine_with_avx(
        lab,
        f"""
        vmovdqu ymm1, [rdi + 0x2000]
        mov     eax, {AVX}
        xor     edx, edx
        {instruction} [rdi]
        vpxor   xmm1, xmm1, xmm1
        {"xrstors64" if instruction == "xsaves64" else "xrstor64"} [rdi]
        vmovdqu [rdi + 0x2100], ymm1
    """,
    ) as machine:
        machine.run()

        assert machine.memory[FREE + 512 : FREE + 520] == AVX.to_bytes(8, "little")
        assert machine.memory[FREE + YMM_OFFSET + 16 : FREE + YMM_OFFSET + 32] == PATTERN[16:]
        assert result(machine) == bytes(16) + PATTERN[16:]


def test_xcr0_with_avx_and_without_sse_is_refused(lab: Lab) -> None:
    with machine_with_avx(lab, "mov eax, 5\nat: xsetbv") as machine:
        assert machine.run()[:3] == [GP, 0, machine.label("at")]


def test_upper_halves_go_with_the_saved_state(lab: Lab) -> None:
    with machine_with_avx(lab, "vmovdqu ymm1, [rdi + 0x2000]") as first:
        first.run()
        area = first.vcpus[0].get_xsave()
    with machine_with_avx(lab, "vmovdqu [rdi + 0x2100], ymm1") as second:
        second.vcpus[0].set_xsave(area)
        second.run()

        assert area.region[XSTATE_BV_WORD] & AVX
        assert result(second) == PATTERN


def test_gather_that_faults_goes_on_where_it_was(lab: Lab) -> None:
    with machine_with_avx(
        lab,
        """
        vpcmpeqd xmm2, xmm2, xmm2               # all four elements
        vpxor   xmm3, xmm3, xmm3                # indices: the third leads to where nothing is
        mov     eax, 0x7fffffff
        vpinsrd xmm3, xmm3, eax, 2
        vpxor   xmm1, xmm1, xmm1
        mov     rbx, rdi
        resume_at after
        vpgatherdd xmm1, [rbx + xmm3 * 8 + 0x2000], xmm2
    after:
        vmovdqu [rdi + 0x2100], xmm1
        vmovdqu [rdi + 0x2110], xmm2
    """,
    ) as machine:
        machine.run()

        assert result(machine) == PATTERN[:4] * 2 + bytes(8) + bytes(8) + b"\xff" * 8

"""Faults of arithmetic and alignment, raised in ring 3 (SDM volume 3, 6.15: #OF, #BR, #MF, #AC, #XM)."""

# ruff: noqa: E501 - one row, one fault

import pytest

from tests.accel.conftest import Lab
from tests.accel.prelude import LAYOUT

OF, BR, NM, MF, AC, XM = 4, 5, 7, 16, 17, 19
UD, GP = 6, 13

USER_DATA = LAYOUT["USER"] + 0x4000

# Set-up in ring 0; ring 3's program with one fault at `fault`; vector; error code.
CASES = {
    "x87 division by zero shows at the next x87 instruction": ("", "fninit; fldcw [control]; fld1; fldz; fdivp; fault: fwait", MF, 0),
    "x87 stack underflow": ("", "fninit; fldcw [control_all]; fadd st(0), st(1); fault: fld1", MF, 0),
    "SSE division by zero": ("", "ldmxcsr [unmasked]; xorps xmm1, xmm1; movss xmm0, [one]; fault: divss xmm0, xmm1", XM, 0),
    "SSE invalid comparison": ("", "ldmxcsr [unmasked]; movss xmm0, [nan]; fault: comiss xmm0, xmm0", XM, 0),
    "SSE exception without OSXMMEXCPT": ("mov rax, cr4; btr eax, 10; mov cr4, rax", "ldmxcsr [unmasked]; xorps xmm1, xmm1; movss xmm0, [one]; fault: divss xmm0, xmm1", UD, 0),
    "reserved bit of MXCSR": ("", "fault: ldmxcsr [reserved]", GP, 0),
    "misaligned word with AC and AM": ("mov rax, cr0; bts eax, 18; mov cr0, rax", f"pushf; or dword ptr [rsp], 0x40000; popf; mov ebx, {USER_DATA:#x}; fault: mov eax, [rbx + 1]", AC, 0),
    "aligned word with AC and AM, then misaligned": ("mov rax, cr0; bts eax, 18; mov cr0, rax", f"pushf; or dword ptr [rsp], 0x40000; popf; mov ebx, {USER_DATA:#x}; mov eax, [rbx + 4]; fault: mov [rbx + 2], eax", AC, 0),
    "x87 with EM set": ("mov rax, cr0; bts eax, 2; mov cr0, rax", "fault: fld1", NM, 0),
    "SSE with EM set": ("mov rax, cr0; bts eax, 2; mov cr0, rax", "fault: xorps xmm0, xmm0", UD, 0),
    "SSE with TS set": ("mov rax, cr0; bts eax, 3; mov cr0, rax", "fault: xorps xmm0, xmm0", NM, 0),
    "fwait with TS and MP set": ("mov rax, cr0; bts eax, 3; mov cr0, rax", "fault: fwait", NM, 0),
}  # fmt: skip

DATA = """
    .balign 16
control:        .word 0x37b                     # zero-divide unmasked
control_all:    .word 0x340
one:            .long 0x3f800000
nan:            .long 0x7f800001                # signalling
unmasked:       .long 0x0000
reserved:       .long 0x00010000
"""

KVM_PVM_GAPS = {
    "SSE with TS set": "kvm_pvm runs ring 3 under the host's CR0.TS",
    "fwait with TS and MP set": "kvm_pvm runs ring 3 under the host's CR0.TS",
    "reserved bit of MXCSR": "kvm_pvm emulates what faults natively in ring 3, and its emulator has no LDMXCSR",
    "x87 with EM set": "kvm_pvm runs ring 3 under the host's CR0.EM",
    "SSE with EM set": "kvm_pvm runs ring 3 under the host's CR0.EM",
    "SSE exception without OSXMMEXCPT": "kvm_pvm runs ring 3 under the host's CR4",
}


@pytest.mark.parametrize("name", CASES)
def test_numeric_fault_in_ring_3(lab: Lab, name: str, request: pytest.FixtureRequest) -> None:
    if lab.emulated_kvm and name in KVM_PVM_GAPS:
        request.applymarker(pytest.mark.xfail(reason=KVM_PVM_GAPS[name], strict=True))
    setup, text, vector, error = CASES[name]
    source = f"""
    start:
        resume_at done
        {setup}
        enter_user there
    .section .user
    there:
        {text}
        ud2
    {DATA}
    .text
    done:
        finish
    """
    with lab.machine(source) as machine:
        machine.run()

        assert machine.log[:3] == [vector, error, machine.label("fault")]


def test_alignment_is_not_checked_in_ring_0(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     rax, cr0
        bts     eax, 18
        mov     cr0, rax
        push    0x40002
        popf
        mov     eax, ds:[FREE + 1]
        report  1
        finish
    """) as machine:
        assert machine.run() == [1]


@pytest.mark.emulated_kvm_deviates("KVM's instruction emulator has neither INTO nor BOUND")
@pytest.mark.parametrize(
    ("text", "vector", "label"),
    [
        ("mov eax, 0x7fffffff; inc eax; fault: .byte 0xce; behind:", OF, "behind"),
        ("mov eax, 7; fault: .byte 0x62, 0x05; .long bounds; behind:", BR, "fault"),
    ],
    ids=["into", "bound"],
)
def test_checks_of_compatibility_mode(lab: Lab, text: str, vector: int, label: str) -> None:
    with lab.machine(f"""
    start:
        resume_at done
        push    0x38
        push    offset narrow
        retfq
    .code32
    narrow:
        {text}
        nop
    bounds:
        .long   1, 5
    .code64
    done:
        finish
    """) as machine:
        machine.run()

        assert machine.log[:4] == [vector, 0, machine.label(label), 0x38]


def test_into_and_bound_within_limits_do_nothing(lab: Lab) -> None:
    lab.skip_where_emulated("KVM's instruction emulator has neither INTO nor BOUND")
    with lab.machine("""
    start:
        push    0x38
        push    offset narrow
        retfq
    .code32
    narrow:
        xor     eax, eax
        .byte   0xce                            # into
        mov     eax, 5
        .byte   0x62, 0x05                      # bound eax, [bounds]
        .long   bounds
        report32 1
        finish
    bounds:
        .long   1, 5
    """) as machine:
        assert machine.run() == [1]

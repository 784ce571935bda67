"""What a translation cache may keep and what drops it: PCIDs, global pages, INVPCID, INVLPG (SDM volume 3, 4.10)."""

import pytest

from tests.accel.conftest import Lab
from tests.accel.prelude import LAYOUT

FREE, GP = LAYOUT["FREE"], 13
ENTRY = LAYOUT["PT"] + 8 * (FREE >> 12)
OTHER_PML4 = 0x3_0000
PCIDE, PGE, SMAP = 17, 7, 21


@pytest.fixture(autouse=True)
def _needs_pcid(lab: Lab, request: pytest.FixtureRequest) -> None:
    lab.skip_where_emulated("kvm_pvm offers neither PCID nor INVPCID")
    if "pcid" in request.node.name:
        lab.skip_where_missing("pcid", "invpcid")


def bit_on(bit: int) -> str:
    return f"mov rax, cr4\nbts rax, {bit}\nmov cr4, rax\n"


# The page at FREE leads to FREE + 0x1000, then `change` makes it lead to FREE + 0x2000 without telling the processor.
def program(text: str) -> str:
    return f"""
    start:
        resume_at done
        mov     qword ptr ds:[{ENTRY:#x}], FREE + 0x1003
        invlpg  ds:[FREE]
        mov     rbx, cr3
        {text}
    done:
        finish
    look:
        mov     eax, ds:[FREE]
        report  rax
        ret
    change:
        mov     rax, FREE + 0x2003
        test    byte ptr ds:[{ENTRY + 1:#x}], 1
        jz      1f
        or      eax, 0x100
    1:  mov     ds:[{ENTRY:#x}], rax
        ret
    """


def run(lab: Lab, text: str) -> list[int]:
    with lab.machine(program(text)) as machine:
        machine.write(FREE + 0x1000, 1, 4)
        machine.write(FREE + 0x2000, 2, 4)
        machine.memory[OTHER_PML4 : OTHER_PML4 + 0x1000] = machine.memory[LAYOUT["PML4"] : LAYOUT["PML4"] + 0x1000]
        return machine.run()


def test_cr3_write_with_pcids_and_no_flush_bit_drops_that_pcid(lab: Lab) -> None:
    assert run(lab, f"{bit_on(PCIDE)} call look; call change; mov cr3, rbx; call look") == [1, 2]


def test_cr3_write_that_switches_the_pcid_shows_the_tables_as_they_are(lab: Lab) -> None:
    log = run(
        lab,
        f"""
        {bit_on(PCIDE)}
        call    look
        call    change
        lea     rax, [rbx + 5]                  # PCID 5, nothing cached there
        mov     cr3, rax
        call    look
        mov     cr3, rbx
        call    look
    """,
    )

    assert log == [1, 2, 2]


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_invpcid_drops_what_it_names(lab: Lab, kind: int) -> None:
    log = run(
        lab,
        f"""
        {bit_on(PCIDE)}
        call    look
        call    change
        mov     qword ptr ds:[FREE + 0x3000], 0
        mov     qword ptr ds:[FREE + 0x3008], FREE
        mov     eax, {kind}
        invpcid rax, ds:[FREE + 0x3000]
        call    look
    """,
    )

    assert log == [1, 2]


def test_invpcid_of_one_address_drops_it(lab: Lab) -> None:
    log = run(
        lab,
        f"""
        {bit_on(PCIDE)}
        call    look
        call    change
        mov     qword ptr ds:[FREE + 0x3000], 0
        mov     qword ptr ds:[FREE + 0x3008], FREE
        xor     eax, eax
        invpcid rax, ds:[FREE + 0x3000]
        call    look
    """,
    )

    assert log == [1, 2]


@pytest.mark.parametrize(
    "text",
    [
        "mov eax, 4; invpcid rax, ds:[FREE + 0x3000]",  # no such kind
        "mov qword ptr ds:[FREE + 0x3000], 0x1000; xor eax, eax; invpcid rax, ds:[FREE + 0x3000]",  # reserved bits
        "mov qword ptr ds:[FREE + 0x3000], 1; mov eax, 1; invpcid rax, ds:[FREE + 0x3000]",  # a PCID without CR4.PCIDE
    ],
)
def test_invpcid_faults_on_a_bad_descriptor(lab: Lab, text: str) -> None:
    log = run(lab, f"mov qword ptr ds:[FREE + 0x3000], 0; mov qword ptr ds:[FREE + 0x3008], 0; {text}")

    assert log[:2] == [GP, 0]


def test_global_page_goes_with_cr4_pge(lab: Lab) -> None:
    """It may outlive a CR3 write, so that is not looked at; changing CR4.PGE drops it for certain."""
    log = run(
        lab,
        f"""
        {bit_on(PGE)}
        or      qword ptr ds:[{ENTRY:#x}], 0x100
        invlpg  ds:[FREE]
        call    look
        call    change
        mov     rax, cr4
        btr     rax, {PGE}
        mov     cr4, rax
        call    look
    """,
    )

    assert log == [1, 2]


def test_invlpg_drops_a_global_page_too(lab: Lab) -> None:
    log = run(
        lab,
        f"""
        {bit_on(PGE)}
        or      qword ptr ds:[{ENTRY:#x}], 0x100
        invlpg  ds:[FREE]
        call    look
        call    change
        invlpg  ds:[FREE]
        call    look
    """,
    )

    assert log == [1, 2]


def test_pcide_with_a_pcid_in_cr3_is_refused(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        resume_at done
        mov     rax, cr3
        or      eax, 8                          # PWT: not a PCID yet, but one once PCIDE is set
        mov     cr3, rax
        mov     rax, cr4
        bts     rax, {PCIDE}
    at:
        mov     cr4, rax
    done:
        finish
    """) as machine:
        machine.run()

        assert machine.log[:3] == [GP, 0, machine.label("at")]


def test_other_address_space_has_its_own_tables(lab: Lab) -> None:
    log = run(
        lab,
        f"""
        call    look
        mov     eax, {OTHER_PML4:#x}
        mov     cr3, rax
        call    look
        call    change
        mov     cr3, rbx
        call    look
    """,
    )

    assert log == [1, 1, 2]


def test_permission_added_needs_no_invalidation(lab: Lab) -> None:
    """A fault is never taken on what the tables have meanwhile allowed: the walk is done anew (4.10.4.3)."""
    with lab.machine(f"""
    start:
        mov     eax, ds:[FREE]                  # cached as read-only
        mov     dword ptr ds:[{ENTRY:#x}], FREE + 3
        mov     dword ptr ds:[FREE], 5
        mov     eax, ds:[FREE]
        report  rax
        finish
    """) as machine:
        machine.write(ENTRY, FREE | 1)

        assert machine.run() == [5]


# The loop runs often enough to be translated, then once at an address that is not aligned.
MOVAPS = """
    fault:
        movaps  xmm0, [rsi]
        dec     ecx
        jnz     fault
        ret
"""


def test_misaligned_access_faults_where_another_pcid_has_the_page_cached(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        {bit_on(PCIDE)}
        mov     rbx, cr3
        mov     esi, FREE
        mov     ecx, 20000
        call    fault
        lea     rax, [rbx + 5]
        mov     cr3, rax
        mov     eax, ds:[FREE]
        mov     rax, rbx
        bts     rax, 63                         # back, with all that is cached
        mov     cr3, rax
        resume_at done
        inc     esi
        mov     ecx, 1
        call    fault
    done:
        finish
    {MOVAPS}
    """) as machine:
        log = machine.run()

        assert log[:3] == [GP, 0, machine.label("fault")]


def test_misaligned_supervisor_access_to_the_topmost_page_faults(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        {bit_on(SMAP)}
        mov     esi, FREE
        mov     ecx, 20000
        call    fault
        resume_at done
        mov     rsi, -0xfff
        mov     ecx, 1
        call    fault
    done:
        finish
    {MOVAPS}
    """) as machine:
        log = machine.run()

        assert log[:3] == [GP, 0, machine.label("fault")]

"""Page faults: error code and CR2 for every cause (SDM volume 3, sections 4.6, 4.7 and 6.15)."""

import pytest

from tests.accel.conftest import Lab
from tests.accel.deviations import host_flag
from tests.accel.lab import Machine
from tests.accel.prelude import LAYOUT, RECORD

PF = 14
PRESENT, WRITE, USER, RESERVED, FETCH = 1, 2, 4, 8, 16

FREE, WINDOW = LAYOUT["FREE"], LAYOUT["USER"]
PAGE = WINDOW + 0x8000  # a page of ring 3's window
NX = 1 << 63

# Entry of the page at PAGE; program with one fault at `fault`; error code; CR2 relative to PAGE.
CASES = {
    "read of an absent page": (0, "mov eax, [rbx]", 0, 0),
    "write to an absent page": (0, "mov [rbx + 5], al", WRITE, 5),
    "write to a read-only page": (PAGE | 1, "mov [rbx], eax", PRESENT | WRITE, 0),
    "read-modify-write of a read-only page": (PAGE | 1, "add dword ptr [rbx], 1", PRESENT | WRITE, 0),
    "exchange with a read-only page": (PAGE | 1, "lock cmpxchg [rbx], ecx", PRESENT | WRITE, 0),
    "fetch from an absent page": (0, "call rbx", FETCH, 0),
    "fetch from a no-execute page": (PAGE | 3 | NX, "jmp rbx", PRESENT | FETCH, 0),
    "reserved bit in the entry": (PAGE | 3 | 1 << 51, "mov eax, [rbx]", PRESENT | RESERVED, 0),
    "read across into an absent page": (0, "mov rax, [rbx - 4]", 0, 0),
    "write across into an absent page": (0, "mov [rbx - 1], eax", WRITE, 0),
    "push onto an absent page": (0, "lea rsp, [rbx + 8]; push rax", WRITE, 0),
    "string move into an absent page": (0, "mov rdi, rbx; mov esi, FREE; cld; movsq", WRITE, 0),
    "ring 3 reads a page of ring 0": (PAGE | 3, "user mov eax, [rbx]", PRESENT | USER, 0),
    "ring 3 writes a page of ring 0": (PAGE | 3, "user mov [rbx], eax", PRESENT | USER | WRITE, 0),
    "ring 3 writes a read-only page": (PAGE | 5, "user mov [rbx], eax", PRESENT | USER | WRITE, 0),
    "ring 3 reads an absent page": (0, "user mov eax, [rbx]", USER, 0),
    "ring 3 fetches from a page of ring 0": (PAGE | 3, "user jmp rbx", PRESENT | USER | FETCH, 0),
    "ring 3 fetches from a no-execute page": (PAGE | 7 | NX, "user jmp rbx", PRESENT | USER | FETCH, 0),
    "SMEP: ring 0 fetches from ring 3's page": (PAGE | 7, "cr4 20; call rbx", PRESENT | FETCH, 0),
    "SMAP: ring 0 reads ring 3's page": (PAGE | 7, "cr4 21; mov eax, [rbx]", PRESENT, 0),
    "SMAP: ring 0 writes ring 3's page": (PAGE | 7, "cr4 21; mov [rbx], eax", PRESENT | WRITE, 0),
}  # fmt: skip


def program(text: str) -> str:
    user = text.startswith("user ")
    *setup, last = text.removeprefix("user ").split(";")
    lines = ["start:", "resume_at done", f"mov ebx, {PAGE:#x}", "xor eax, eax"]
    if user:
        lines += ["enter_user there", ".section .user", "there:"]
    lines += [f"set_{line.strip().replace(' ', '_')}" if line.startswith("cr4") else line for line in setup]
    lines += [f"fault: {last}", "nop", ".text", "done: finish"]
    return "\n".join([CR4_MACROS, *lines]) + "\n"


CR4_MACROS = "\n".join(
    f".macro set_cr4_{bit}\nmov rax, cr4\nbts rax, {bit}\nmov cr4, rax\nxor eax, eax\n.endm" for bit in (20, 21)
)


@pytest.mark.parametrize("name", CASES)
def test_page_fault_reports_cause_and_address(lab: Lab, name: str) -> None:
    entry, text, code, offset = CASES[name]
    with lab.machine(program(text)) as machine:
        machine.map_page(PAGE, entry)

        machine.run()

        vector, error, rip, _, _, cr2 = machine.log
        # A fetch faults at its own address, not at the jump that led there.
        expected_rip = PAGE if code & FETCH else machine.label("fault")
        assert (vector, error, hex(rip), hex(cr2)) == (PF, code, hex(expected_rip), hex(PAGE + offset))


def accesses(machine: Machine, entry_address: int) -> tuple[bool, bool]:
    entry = machine.read(entry_address)
    return bool(entry & 0x20), bool(entry & 0x40)


def test_accessed_and_dirty_are_set_by_use(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        mov     eax, ds:[{FREE:#x}]
        mov     ds:[{FREE + 0x1000:#x}], eax
        finish
    """) as machine:
        machine.run()

        entry = LAYOUT["PT"] + 8 * (FREE >> 12)
        assert accesses(machine, entry) == (True, False)
        assert accesses(machine, entry + 8) == (True, True)
        assert accesses(machine, entry + 16) == (False, False)
        assert accesses(machine, LAYOUT["PD"])[0]


def test_dirty_is_not_set_by_a_write_that_faults(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        resume_at done
        mov     ds:[{FREE:#x}], eax
    done:
        finish
    """) as machine:
        machine.map_page(FREE, FREE | 1)

        machine.run()

        assert machine.log[:2] == [PF, PRESENT | WRITE]
        assert not accesses(machine, LAYOUT["PT"] + 8 * (FREE >> 12))[1]


def test_write_protect_off_lets_ring_0_write_read_only_pages(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        mov     rax, cr0
        btr     eax, 16
        mov     cr0, rax
        mov     dword ptr ds:[{FREE:#x}], 0x1234
        mov     eax, ds:[{FREE:#x}]
        report  rax
        finish
    """) as machine:
        machine.map_page(FREE, FREE | 1)

        assert machine.run() == [0x1234]


@pytest.mark.emulated_kvm_deviates("KVM's instruction emulator has no STAC")
def test_smap_is_lifted_by_stac_and_restored_by_clac(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        mov     rax, cr4
        bts     rax, 21
        mov     cr4, rax
        resume_at done
        stac
        mov     eax, ds:[{PAGE:#x}]
        report  rax
        clac
    fault:
        mov     eax, ds:[{PAGE:#x}]
    done:
        finish
    """) as machine:
        machine.write(PAGE, 0x77, 4)

        machine.run()

        assert machine.log[:3] == [0x77, PF, PRESENT]
        assert machine.log[3] == machine.label("fault")


def test_invlpg_and_cr3_show_a_changed_entry(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        mov     edx, {LAYOUT["PT"] + 8 * (FREE >> 12):#x}
        mov     ebx, {FREE:#x}
        mov     eax, [rbx]
        report  rax
        mov     qword ptr [rdx], {FREE + 0x1003:#x}
        invlpg  [rbx]
        mov     eax, [rbx]
        report  rax
        mov     qword ptr [rdx], {FREE + 0x2003:#x}
        mov     rax, cr3
        mov     cr3, rax
        mov     eax, [rbx]
        report  rax
        finish
    """) as machine:
        for page, value in enumerate((0x11, 0x22, 0x33)):
            machine.write(FREE + 0x1000 * page, value, 4)

        assert machine.run() == [0x11, 0x22, 0x33]


def test_large_page_maps_two_mebibytes(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        mov     dword ptr ds:[{LAYOUT["PD"] + 16:#x}], 0x83   # 4 MiB on: the first 2 MiB again
        mov     eax, ds:[0x200010]
        report  rax
        mov     ebx, 0x400000 + {FREE:#x}
        mov     eax, [rbx]
        report  rax
        mov     dword ptr [rbx + 4], 0x66
        mov     eax, ds:[{FREE + 4:#x}]
        report  rax
        finish
    """) as machine:
        machine.write(0x20_0010, 0x44, 4)
        machine.write(FREE, 0x55, 4)

        assert machine.run() == [0x44, 0x55, 0x66]
        assert machine.read(LAYOUT["PD"] + 16) & 0x60 == 0x60


@pytest.mark.emulated_kvm_deviates("kvm_pvm's host has no 1 GiB pages: the size bit counts as reserved")
def test_huge_page_maps_a_gibibyte(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        resume_at done
        mov     dword ptr ds:[{LAYOUT["PDPT"] + 16:#x}], 0x83
        mov     ebx, 0x80000000 + {FREE:#x}
        mov     eax, [rbx]
        report  rax
    done:
        finish
    """) as machine:
        machine.write(FREE, 0x55, 4)

        assert machine.run() == [0x55]


def test_restarted_instruction_succeeds_after_the_page_was_mapped(lab: Lab) -> None:
    with lab.machine(f"""
    start:
        mov     rax, 0x1122334455667788
        mov     ds:[{PAGE:#x} - 4], rax       # into an absent page: the handler maps it
        mov     rbx, ds:[{PAGE:#x} - 4]
        report  rbx
        finish
    map_it:
        push    rax
        mov     eax, {PAGE | 3:#x}
        mov     ds:[{LAYOUT["PT"] + 8 * (PAGE >> 12):#x}], rax
        pop     rax
        add     rsp, 8
        iretq
    """) as machine:
        machine.map_page(PAGE, 0)
        machine.set_gate(PF, "map_it")

        assert machine.run() == [0x1122_3344_5566_7788]


@pytest.mark.parametrize("instruction", ["sgdt [rsp - 64]", "sidt [rsp - 64]", "sldt ax", "str ax", "smsw ax"])
def test_umip_denies_table_registers_to_ring_3(lab: Lab, instruction: str, request: pytest.FixtureRequest) -> None:
    if lab.emulated_kvm and instruction == "smsw ax" and not host_flag("umip"):
        reason = "kvm_pvm makes #UD of SMSW in ring 3 where the host's processor has no UMIP"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    with lab.machine(f"""
    start:
        resume_at done
        mov     rax, cr4
        bts     rax, 11
        mov     cr4, rax
        enter_user there
    .section .user
    there:
    fault:
        {instruction}
        ud2
    .text
    done:
        finish
    """) as machine:
        machine.run()

        assert machine.log[: RECORD // 2] == [13, 0, machine.label("fault")]

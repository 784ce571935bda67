"""Accesses to guest-physical addresses without memory: every width and direction, and what becomes of the value."""

import pytest

from tests.accel.conftest import Lab
from tests.accel.lab import Machine
from tests.accel.prelude import LAYOUT

MMIO = LAYOUT["MMIO"]


def device(machine: Machine, content: bytes) -> bytearray:
    """A device with these registers from MMIO on; returns them as they change."""
    registers = bytearray(content)

    def handler(kind: str, address: int, view: memoryview) -> None:
        at = address - MMIO
        if kind == "write":
            registers[at : at + len(view)] = view
        else:
            view[:] = registers[at : at + len(view)]

    machine.mmio = handler
    return registers


def test_mmio_write_every_width_exits_with_address_and_data(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     ebx, MMIO
        mov     rax, 0x1122334455667788
        mov     [rbx], al
        mov     [rbx + 2], ax
        mov     [rbx + 4], eax
        mov     [rbx + 8], rax
        mov     byte ptr [rbx + 0x11], 0x5a
        mov     qword ptr [rbx + 0x18], -2
        finish
    """) as machine:
        machine.run()

        assert machine.exits == [
            ("write", MMIO, 1, b"\x88"),
            ("write", MMIO + 2, 2, b"\x88\x77"),
            ("write", MMIO + 4, 4, b"\x88\x77\x66\x55"),
            ("write", MMIO + 8, 8, b"\x88\x77\x66\x55\x44\x33\x22\x11"),
            ("write", MMIO + 0x11, 1, b"\x5a"),
            ("write", MMIO + 0x18, 8, b"\xfe\xff\xff\xff\xff\xff\xff\xff"),
        ]


def test_mmio_read_every_width_merges_as_the_register_demands(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     ebx, MMIO
        mov     rax, -1
        mov     al, [rbx]
        report  rax
        mov     rax, -1
        mov     ah, [rbx + 1]
        report  rax
        mov     rax, -1
        mov     ax, [rbx]
        report  rax
        mov     rax, -1
        mov     eax, [rbx]
        report  rax
        mov     rax, [rbx]
        report  rax
        movzx   eax, word ptr [rbx + 6]
        report  rax
        movsx   rax, byte ptr [rbx + 7]
        report  rax
        movsxd  rax, dword ptr [rbx + 4]
        report  rax
        finish
    """) as machine:
        device(machine, b"\x01\x02\x03\x04\x05\x06\x07\x88")

        assert machine.run() == [
            0xFFFF_FFFF_FFFF_FF01,
            0xFFFF_FFFF_FFFF_02FF,
            0xFFFF_FFFF_FFFF_0201,
            0x0403_0201,
            0x8807_0605_0403_0201,
            0x8807,
            0xFFFF_FFFF_FFFF_FF88,
            0xFFFF_FFFF_8807_0605,
        ]
        assert [size for _, _, size, _ in machine.exits] == [1, 1, 2, 4, 8, 2, 1, 4]


def test_mmio_read_modify_write_reads_once_and_writes_once(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     ebx, MMIO
        add     dword ptr [rbx], 5
        setc    al
        movzx   eax, al
        report  rax
        or      byte ptr [rbx + 4], 0x80
        mov     eax, 0x1234
        xchg    [rbx + 8], eax
        report  rax
        finish
    """) as machine:
        registers = device(machine, b"\xfe\xff\xff\xff\x01\x00\x00\x00\x21\x43\x00\x00")

        assert machine.run() == [1, 0x4321]
        assert registers == b"\x03\x00\x00\x00\x81\x00\x00\x00\x34\x12\x00\x00"
        assert [kind for kind, _, _, _ in machine.exits] == ["read", "write"] * 3


def test_mmio_compare_does_not_write(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     ebx, MMIO
        cmp     dword ptr [rbx], 0x04030201
        sete    al
        movzx   eax, al
        report  rax
        test    byte ptr [rbx + 1], 4
        setz    al
        movzx   eax, al
        report  rax
        finish
    """) as machine:
        device(machine, b"\x01\x02\x03\x04")

        assert machine.run() == [1, 1]
        assert [kind for kind, _, _, _ in machine.exits] == ["read", "read"]


def test_mmio_string_moves_access_item_by_item(lab: Lab) -> None:
    with lab.machine("""
    start:
        cld
        mov     edi, MMIO
        mov     eax, 0x11223344
        mov     ecx, 3
        rep stosd
        mov     esi, MMIO + 2
        mov     edi, FREE
        mov     ecx, 4
        rep movsb
        report  rsi
        mov     eax, ds:[FREE]
        report  rax
        mov     esi, MMIO
        lodsw
        movzx   eax, ax
        report  rax
        finish
    """) as machine:
        registers = device(machine, bytes(16))

        assert machine.run() == [MMIO + 6, 0x3344_1122, 0x3344]
        assert registers[:12] == b"\x44\x33\x22\x11" * 3
        assert [size for _, _, size, _ in machine.exits] == [4] * 3 + [1] * 4 + [2]


def test_mmio_push_and_pop(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     ebx, MMIO
        push    qword ptr [rbx]
        pop     rax
        report  rax
        push    0x77
        pop     qword ptr [rbx + 8]
        finish
    """) as machine:
        registers = device(machine, b"\x01\x02\x03\x04\x05\x06\x07\x08" + bytes(8))

        assert machine.run() == [0x0807_0605_0403_0201]
        assert registers[8:] == b"\x77\0\0\0\0\0\0\0"


@pytest.mark.parametrize(("offset", "first"), [(0xFFD, 3), (0xFFF, 1)])
def test_mmio_write_across_pages_arrives_byte_for_byte(lab: Lab, offset: int, first: int) -> None:
    with lab.machine(f"""
    start:
        mov     ebx, MMIO
        mov     eax, 0x44332211
        mov     [rbx + {offset:#x}], eax
        mov     eax, [rbx + {offset:#x}]
        report  rax
        finish
    """) as machine:
        registers = device(machine, bytes(0x2000))

        assert machine.run() == [0x4433_2211]
        assert registers[offset : offset + 4] == b"\x11\x22\x33\x44"
        writes = b"".join(data for kind, _, _, data in machine.exits if kind == "write")
        assert writes == b"\x11\x22\x33\x44"
        assert machine.exits[0][2] <= max(first, 1)


def test_mmio_by_sse_register_goes_in_eight_byte_pieces(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     ebx, MMIO
        movdqu  xmm1, [rbx]
        movdqa  ds:[FREE], xmm1
        movdqu  [rbx + 0x10], xmm1
        mov     rax, ds:[FREE + 8]
        report  rax
        finish
    """) as machine:
        registers = device(machine, bytes(range(1, 17)) + bytes(16))

        assert machine.run() == [0x100F_0E0D_0C0B_0A09]
        assert machine.memory[LAYOUT["FREE"] : LAYOUT["FREE"] + 16] == bytes(range(1, 17))
        assert registers[16:] == bytes(range(1, 17))
        assert {size for _, _, size, _ in machine.exits} == {8}


def test_mmio_value_reaches_the_compare_of_a_cmpxchg(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     ebx, MMIO
        mov     eax, 7
        mov     ecx, 9
        lock cmpxchg [rbx], ecx
        setz    dl
        movzx   edx, dl
        report  rdx
        mov     eax, 8
        lock cmpxchg [rbx], ecx
        report  rax
        finish
    """) as machine:
        registers = device(machine, b"\x07\0\0\0")

        assert machine.run() == [1, 9]
        assert registers == b"\x09\0\0\0"

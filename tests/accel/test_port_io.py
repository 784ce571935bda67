"""Port accesses: every width, both directions, and strings of them (SDM volume 1, chapter 19)."""

from tests.accel.conftest import Lab
from tests.accel.lab import Machine
from tests.accel.prelude import LAYOUT

FREE = LAYOUT["FREE"]


def answer(machine: Machine, port: int, data: bytes) -> None:
    """Let reads of a port return these bytes, repeated as often as needed."""

    def handler(kind: str, _port: int, view: memoryview) -> None:
        if kind == "in":
            view[:] = (data * len(view))[: len(view)]

    machine.ports[port] = handler


def test_out_every_width_exits_with_port_size_and_data(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     eax, 0x89abcdef
        out     0x70, al
        out     0x70, ax
        out     0x70, eax
        mov     dx, 0xfffe
        out     dx, al
        out     dx, ax
        mov     dx, 0x1234
        out     dx, eax
        finish
    """) as machine:
        machine.run()

        assert machine.exits == [
            ("out", 0x70, 1, b"\xef"),
            ("out", 0x70, 2, b"\xef\xcd"),
            ("out", 0x70, 4, b"\xef\xcd\xab\x89"),
            ("out", 0xFFFE, 1, b"\xef"),
            ("out", 0xFFFE, 2, b"\xef\xcd"),
            ("out", 0x1234, 4, b"\xef\xcd\xab\x89"),
        ]


def test_in_every_width_merges_as_the_register_demands(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     rax, 0x1122334455667788
        in      al, 0x80
        report  rax
        mov     rax, 0x1122334455667788
        in      ax, 0x80
        report  rax
        mov     rax, 0x1122334455667788
        in      eax, 0x80
        report  rax
        mov     dx, 0x8000
        mov     rax, -1
        in      al, dx
        report  rax
        finish
    """) as machine:
        answer(machine, 0x80, b"\xa1\xa2\xa3\xa4")
        answer(machine, 0x8000, b"\x00")

        assert machine.run() == [
            0x1122_3344_5566_77A1,
            0x1122_3344_5566_A2A1,
            0xA4A3_A2A1,
            0xFFFF_FFFF_FFFF_FF00,
        ]


def test_in_and_out_in_real_mode(lab: Lab) -> None:
    with lab.machine(
        """
    .code16
    start:
        mov     dx, 0x3f8
        in      al, dx
        movzx   eax, al
        report16 eax
        mov     ax, 0xbeef
        out     dx, ax
        in      eax, 0x40
        report16 eax
        finish
    """,
        mode="real",
        irqchip=False,
    ) as machine:
        answer(machine, 0x3F8, b"\x5a")
        answer(machine, 0x40, b"\x01\x02\x03\x04")

        assert machine.run() == [0x5A, 0x0403_0201]
        assert ("out", 0x3F8, 2, b"\xef\xbe") in machine.exits


def collected(machine: Machine, kind: str, port: int) -> bytes:
    """All bytes that went through a port: an accelerator may split a string as it likes."""
    return b"".join(data for one, at, _, data in machine.exits if one == kind and at == port)


def test_rep_outs_writes_the_string_in_order(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     dx, 0x1f0
        mov     esi, offset text
        mov     ecx, 6
        cld
        rep outsb
        report  rsi
        report  rcx
        mov     esi, offset text
        mov     ecx, 3
        mov     dx, 0x1f2
        rep outsw
        report  rsi
        mov     esi, offset text + 4
        mov     ecx, 2
        mov     dx, 0x1f4
        std
        rep outsd
        cld
        report  rsi
        finish
    text:
        .ascii  "abcdefgh"
    """) as machine:
        log = machine.run()
        text = machine.label("text")

        assert log == [text + 6, 0, text + 6, text - 4]
        assert collected(machine, "out", 0x1F0) == b"abcdef"
        assert collected(machine, "out", 0x1F2) == b"abcdef"
        assert collected(machine, "out", 0x1F4) == b"efghabcd"


def test_rep_ins_fills_memory_in_order(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     dx, 0x1f0
        mov     edi, FREE
        mov     ecx, 5
        cld
        rep insb
        report  rdi
        report  rcx
        mov     dx, 0x1f2
        mov     edi, FREE + 0x10
        mov     ecx, 2
        rep insd
        report  rdi
        mov     dx, 0x1f4
        mov     edi, FREE + 0x20
        insw
        report  rdi
        finish
    """) as machine:
        count = 0

        def counter(_kind: str, _port: int, view: memoryview) -> None:
            nonlocal count
            for index in range(len(view)):
                count += 1
                view[index] = count

        for port in (0x1F0, 0x1F2, 0x1F4):
            machine.ports[port] = counter

        assert machine.run() == [FREE + 5, 0, FREE + 0x18, FREE + 0x22]
        assert machine.memory[FREE : FREE + 5] == bytes(range(1, 6))
        assert machine.memory[FREE + 0x10 : FREE + 0x18] == bytes(range(6, 14))
        assert machine.memory[FREE + 0x20 : FREE + 0x22] == bytes((14, 15))


def test_rep_outs_longer_than_a_page_arrives_whole(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     dx, 0x1f0
        mov     esi, FREE + 0x20
        mov     ecx, 0x1400
        cld
        rep outsb
        report  rsi
        finish
    """) as machine:
        content = bytes(index * 7 & 0xFF for index in range(0x1400))
        machine.memory[FREE + 0x20 : FREE + 0x20 + len(content)] = content

        assert machine.run() == [FREE + 0x20 + 0x1400]
        assert collected(machine, "out", 0x1F0) == content


def test_rep_with_count_zero_does_nothing(lab: Lab) -> None:
    with lab.machine("""
    start:
        xor     ecx, ecx
        mov     dx, 0x1f0
        mov     esi, FREE
        mov     edi, FREE
        rep outsb
        rep insb
        report  rsi
        report  rdi
        finish
    """) as machine:
        assert machine.run() == [FREE, FREE]
        assert machine.exits == []

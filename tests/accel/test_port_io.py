"""Port accesses: every width, both directions, and strings of them."""

from tests.accel.conftest import Lab


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

"""A run from specification to end, on scripted processors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ostler import vmm
from ostler.accel.api import ExitReason
from ostler.config import GuestSpec, parse_guest
from ostler.errors import BadRequest, GuestPanic, GuestStuck, TripleFault
from ostler.testing import kernels
from ostler.testing.fake_accel import FakeAccel
from ostler.testing.fake_script import Halt, In, Load, Out, Script, Stop, Store

COM1 = 0x3F8
IMAGE = kernels.elf64(b"\x0f\x0b" + b"\xf4" * 30, note=kernels.xen_note(0x10_0000))


class Console:
    """Pipes for a guest's console."""

    def __init__(self) -> None:
        self.in_read, self.in_write = os.pipe()
        self.out_read, self.out_write = os.pipe()

    def output(self) -> bytes:
        os.close(self.out_write)
        self.out_write = -1
        with open(self.out_read, "rb", closefd=False) as stream:
            return stream.read()

    def close(self) -> None:
        for fd in (self.in_read, self.in_write, self.out_read, self.out_write):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def console() -> Iterator[Console]:
    made = Console()
    yield made
    made.close()


@pytest.fixture
def guest(tmp_path: Path) -> Callable[..., GuestSpec]:
    def make(**values: object) -> GuestSpec:
        kernel = tmp_path / "kernel.img"
        kernel.write_bytes(IMAGE)
        return parse_guest(kernel=kernel, **{"memory": "16M", **values})

    return make


def say(text: bytes) -> Script:
    for byte in text:
        yield Out(COM1, byte)


def power_off() -> Script:
    yield Out(0x604, 0x2000, size=2)


def run(spec: GuestSpec, accel: FakeAccel, console: Console, **options: object) -> vmm.RunResult:
    return vmm.run(spec, accelerator=accel, console_out=console.out_write, **options)  # type: ignore[arg-type]


def test_run_output_then_power_off_is_orderly(guest: Callable[..., GuestSpec], console: Console) -> None:
    def script() -> Script:
        yield from say(b"hello\r\n")
        yield from power_off()

    accel = FakeAccel(script)
    result = run(guest(), accel, console)
    assert (result.exit_status, result.reason) == (0, "power-off")
    assert set(result.timings_s) == {"read", "create", "run", "first output"}
    assert console.output() == b"hello\r\n"
    assert accel.vm.closed


def test_run_idle_processors_are_kicked_out_at_the_end(guest: Callable[..., GuestSpec], console: Console) -> None:
    accel = FakeAccel(power_off)
    assert run(guest(cpus=4), accel, console).exit_status == 0
    assert len(accel.vm.vcpus) == 4


@pytest.mark.parametrize(("value", "status"), [(0, 1), (0x10, 0x21)])
def test_run_debug_exit_gives_its_status(
    guest: Callable[..., GuestSpec], console: Console, value: int, status: int
) -> None:
    def script() -> Script:
        yield Out(0xF4, value, size=4)

    assert run(guest(), FakeAccel(script), console).exit_status == status


def test_run_reset_ends_with_0(guest: Callable[..., GuestSpec], console: Console) -> None:
    def script() -> Script:
        yield Out(0xCF9, 6)

    result = run(guest(), FakeAccel(script), console)
    assert (result.exit_status, result.reason) == (0, "reset")


def test_run_reset_after_panic_output_is_a_panic(guest: Callable[..., GuestSpec], console: Console) -> None:
    def script() -> Script:
        yield from say(b"[ 1.0] Kernel panic - not syncing: VFS: no root\x1b[0m\r\n[ 1.1] trace\r\n")
        yield Out(0xCF9, 6)

    with pytest.raises(GuestPanic, match=r"Kernel panic - not syncing: VFS: no root\?\[0m$"):
        run(guest(), FakeAccel(script), console)


def test_run_pvpanic_is_a_panic(guest: Callable[..., GuestSpec], console: Console) -> None:
    def script() -> Script:
        yield Out(0x505, 2)
        yield Out(0x505, 1)

    with pytest.raises(GuestPanic, match="reported a panic"):
        run(guest(), FakeAccel(script), console)


def test_run_triple_fault_reports_registers_and_instruction(guest: Callable[..., GuestSpec], console: Console) -> None:
    def script() -> Script:
        yield Stop(ExitReason.SHUTDOWN)

    with pytest.raises(TripleFault, match="triple fault on vCPU 0 at RIP 0x100000") as caught:
        run(guest(), FakeAccel(script), console)
    assert "instruction: ud2" in caught.value.details
    assert "cr0=00000011" in caught.value.details


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            ExitReason.INTERNAL_ERROR,
            "internal error 4 of the accelerator, an exit of the processor's that it does not know",
        ),
        (ExitReason.FAIL_ENTRY, "reason 0x4"),
        (ExitReason.HYPERCALL, "unexpected exit HYPERCALL"),
        (ExitReason.SYSTEM_EVENT, "unknown system event 4"),
    ],
)
def test_run_accelerator_gives_up_is_stuck(
    guest: Callable[..., GuestSpec], console: Console, reason: ExitReason, message: str
) -> None:
    def script() -> Script:
        yield Stop(reason, code=4)

    with pytest.raises(GuestStuck, match=message):
        run(guest(), FakeAccel(script), console)


def test_run_port_and_memory_reads_come_back(guest: Callable[..., GuestSpec], console: Console) -> None:
    seen: list[int] = []

    def script() -> Script:
        seen.append((yield In(COM1 + 5)))
        seen.append((yield In(0x9999, size=4)))
        yield Store(0xD000_0000, 1)
        seen.append((yield Load(0xD000_0000, size=2)))
        yield Out(COM1, 0x6261, count=2)
        yield from power_off()

    run(guest(), FakeAccel(script), console)
    assert seen == [0x60, 0xFFFF_FFFF, 0xFFFF]
    assert console.output() == b"ab"


def test_run_input_waits_for_rts_and_arrives_whole(guest: Callable[..., GuestSpec], console: Console) -> None:
    received = bytearray()
    text = bytes(range(32, 120)) * 3

    def script() -> Script:
        yield Out(COM1 + 2, 0x01)
        yield Out(COM1 + 4, 0x0A)
        yield Out(COM1 + 1, 0x01)
        while len(received) < len(text):
            if (yield In(COM1 + 5)) & 1:
                received.append((yield In(COM1)))
            else:
                yield Halt()
        yield from power_off()

    os.write(console.in_write, text)
    run(guest(), FakeAccel(script), console, console_in=console.in_read)
    assert bytes(received) == text


def test_run_end_of_input_does_not_end_guest(guest: Callable[..., GuestSpec], console: Console) -> None:
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        result = run(guest(), FakeAccel(power_off), console, console_in=nothing.fileno())
    assert result.reason == "power-off"


def test_run_quit_key_ends_a_guest_that_never_would(guest: Callable[..., GuestSpec], console: Console) -> None:
    class Keys:
        quit = False

        def feed(self, typed: bytes) -> bytes:
            self.quit = b"q" in typed
            return b""

    os.write(console.in_write, b"q")
    result = run(guest(cpus=2), FakeAccel(), console, console_in=console.in_read, keys=Keys())
    assert (result.exit_status, result.reason) == (0, "ended from outside")


def test_run_closed_console_raises_broken_pipe_and_stops(guest: Callable[..., GuestSpec], console: Console) -> None:
    def script() -> Script:
        yield from say(b"x")
        yield Halt()

    os.close(console.out_read)
    console.out_read = -1
    accel = FakeAccel(script)
    with pytest.raises(BrokenPipeError):
        run(guest(), accel, console)
    assert accel.vm.closed


def test_run_slow_reader_loses_nothing(guest: Callable[..., GuestSpec], console: Console) -> None:
    total = 600_000

    def script() -> Script:
        for _ in range(total // 4):
            yield Out(COM1, 0x64636261, count=4)
        yield from power_off()

    import threading

    collected: list[bytes] = []

    def read() -> None:
        while data := os.read(console.out_read, 65536):
            collected.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    run(guest(), FakeAccel(script), console)
    os.close(console.out_write)
    console.out_write = -1
    reader.join()
    assert b"".join(collected) == b"abcd" * (total // 4)


def test_run_bug_in_a_processor_thread_reaches_the_caller(guest: Callable[..., GuestSpec], console: Console) -> None:
    def script() -> Script:
        raise RuntimeError("a bug")
        yield Halt()

    with pytest.raises(RuntimeError, match="a bug"):
        run(guest(), FakeAccel(script), console)


def test_run_initrd_larger_than_memory_is_refused_unread(
    guest: Callable[..., GuestSpec], console: Console, tmp_path: Path
) -> None:
    initrd = tmp_path / "initrd.img"
    with initrd.open("wb") as stream:
        stream.truncate(17 << 20)
    with pytest.raises(BadRequest, match=r"initrd .*: 17825792 bytes, expected at most 16777216"):
        run(guest(initrd=initrd), FakeAccel(), console)

"""A specification becomes a machine: order, wiring, processor state, refusals."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostler.accel.api import IrqRoute
from ostler.boot.load import parse_kernel
from ostler.bus import Claim
from ostler.config import GuestSpec, parse_guest
from ostler.devices.wiring import PowerEvent
from ostler.errors import BadRequest, StateError
from ostler.machine.board import Wiring
from ostler.machine.machine import Machine, pc_routes
from ostler.memory.layout import HIGH_RAM_START
from ostler.testing import kernels
from ostler.testing.fake_accel import FakeAccel
from ostler.testing.fakes import FakeClock, FakeTimer, RecordedPower

MIB = 1 << 20


class BoardTimer(FakeTimer):
    """A timer that nobody moves."""

    def call(self, expired: object) -> None:
        self.expired = expired


def spec(**values: object) -> GuestSpec:
    return parse_guest(kernel="kernel.img", **{"memory": 32 * MIB, **values})


def wiring(power: RecordedPower | None = None, sink: bytearray | None = None) -> Wiring:
    return Wiring(
        lock=threading.Lock(),
        clock=FakeClock(),
        new_timer=BoardTimer,
        power=power or RecordedPower(),
        console_sink=(bytearray() if sink is None else sink).append,
        console_room=lambda: None,
        add_reader=lambda _fd, _callback: None,
        remove_reader=lambda _fd: None,
    )


def test_machine_creates_chips_before_processors_and_registers_memory() -> None:
    accel = FakeAccel()
    with Machine(spec(cpus=3), accel, wiring()):
        assert accel.vm.order == ["irqchip", "pit", "vcpu0", "vcpu1", "vcpu2"]
        assert accel.vm.slots == [(0, 0, 32 * MIB)]
        assert all(vcpu.cpuid for vcpu in accel.vm.vcpus)
        assert [accel.vm.chips[chip_id].chip.pic.irq_base for chip_id in (0, 1)] == [0x08, 0x70]
        assert accel.vm.vcpus[2].lapic.regs[0x351] == 0x07
        assert all(vcpu.xcrs.xcrs[0].value == 0b111 for vcpu in accel.vm.vcpus)
    assert accel.vm.closed


def test_pc_routes_put_pit_on_pin_2_and_leave_cascade_out() -> None:
    routes = {(route.gsi, route.chip, route.pin) for route in pc_routes() if isinstance(route, IrqRoute)}
    assert {(0, 0, 0), (0, 2, 2), (4, 0, 4), (4, 2, 4), (9, 1, 1), (23, 2, 23)} <= routes
    assert not [route for route in routes if route[0] == 2]


def test_load_pvh_enters_flat_protected_mode_and_announces_memory() -> None:
    accel = FakeAccel()
    image = kernels.elf64(note=kernels.xen_note(0x10_0010))
    with Machine(spec(), accel, wiring()) as machine:
        machine.load(parse_kernel(memoryview(image), "kernel.img"), initrd=None, cmdline="quiet")
        assert machine.memory.read(0xE_0000, 8) == b"RSD PTR "
    cpu = accel.vm.vcpus[0]
    assert (cpu.regs.rip, cpu.regs.rbx, cpu.regs.rflags) == (0x10_0010, 0x6000, 2)
    assert (cpu.sregs.cr0 & 1, cpu.sregs.efer, cpu.sregs.cs.db, cpu.sregs.cs.limit) == (1, 0, 1, 0xFFFF_FFFF)
    assert (0x10_0000, 64) in accel.vm.written


def test_load_elf64_enters_long_mode() -> None:
    accel = FakeAccel()
    with Machine(spec(), accel, wiring()) as machine:
        machine.load(parse_kernel(memoryview(kernels.elf64()), "kernel.img"), initrd=None, cmdline="")
    sregs = accel.vm.vcpus[0].sregs
    assert (sregs.cs.l, sregs.efer, sregs.cr3, sregs.cr0 >> 31) == (1, 0x500, 0x9000, 1)


def test_machine_named_model_that_accelerator_lacks_is_refused_and_default_is_masked() -> None:
    poor = FakeAccel(supported_model="ostler-v1.1")
    with Machine(spec(), poor, wiring()) as machine:
        assert "popcnt" in machine.masked_features
    with Machine(spec(cpu="ostler-v1.1"), poor, wiring()) as machine:
        assert machine.masked_features == []


def test_machine_by_default_has_the_newest_level_that_is_there_whole() -> None:
    for there, expected in (("ostler-v3.1", "ostler-v3.1"), ("ostler-v3.1,-f16c", "ostler-v2.2")):
        with Machine(spec(), FakeAccel(supported_model=there), wiring()) as machine:
            assert (machine.model.name, machine.masked_features) == (expected, [])


def test_board_ports_reach_devices() -> None:
    power, sent = RecordedPower(), bytearray()
    with Machine(spec(cpus=2), FakeAccel(), wiring(power, sent)) as machine:
        ports = machine.board.ports
        ports.write(0x3F8, 1, 0x41)
        ports.write(0xE9, 1, 0x42)
        ports.write(0x64, 1, 0xFE)
        ports.write(0x604, 2, 0x2000)
        ports.write(0x505, 1, 1)
        ports.write(0x510, 2, 5)
        cpus = ports.read(0x511, 1)
        ports.write(0x70, 1, 0x34)
        above_16m = ports.read(0x71, 1)
        unclaimed = ports.read(0x61, 1)
    assert sent == b"AB"
    assert [event for event, _ in power.events] == [PowerEvent.RESET, PowerEvent.POWER_OFF, PowerEvent.PANIC]
    assert (cpus, above_16m, unclaimed) == (2, 0x00, 0xFF)


def test_board_test_devices_only_on_request() -> None:
    def names(claims: list[Claim]) -> set[str]:
        return {claim.name for claim in claims}

    with Machine(spec(), FakeAccel(), wiring()) as machine:
        assert "test echo" not in names(machine.board.ports.claims())
    accel = FakeAccel()
    with Machine(spec(test_devices=True), accel, wiring()) as machine:
        assert "test lines" in names(machine.board.ports.claims())
        machine.board.ports.write(0x200E, 1, 1)
        machine.board.ports.write(0xE4, 4, 0x12345)
        machine.board.mmio.write(0xFF00_0000, 4, 7)
        assert machine.board.mmio.read(0xFF00_0000, 4) == 7
    assert accel.vm.lines == [(14, 1)]
    assert accel.vm.written[-1] == (0x12000, 0x1000)


def test_machine_memory_above_hole_gets_second_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ostler.config.guest.host_memory_bytes", lambda: 64 << 30)
    accel = FakeAccel()
    with Machine(spec(memory="4G"), accel, wiring()):
        assert accel.vm.slots == [(0, 0, 0xC000_0000), (1, HIGH_RAM_START, 0x4000_0000)]


def test_load_kernel_beyond_memory_is_refused() -> None:
    image = kernels.elf64(load=0x1000_0000)
    with Machine(spec(), FakeAccel(), wiring()) as machine, pytest.raises(BadRequest, match="guest has 32 MiB"):
        machine.load(parse_kernel(memoryview(image), "kernel.img"), initrd=None, cmdline="")


def test_machine_more_processors_than_accelerator_gives_is_refused() -> None:
    with pytest.raises(BadRequest, match="cpus 9: fake on this host gives a guest at most 8"):
        Machine(spec(cpus=9), FakeAccel(), wiring())


def test_board_saved_state_restores_on_another_board() -> None:
    with (
        Machine(spec(), FakeAccel(), wiring()) as one,
        Machine(spec(), FakeAccel(), wiring()) as other,
    ):
        one.board.ports.write(0x80, 1, 0x55)
        one.board.ports.write(0x3FF, 1, 0x66)
        one.board.ports.write(0x510, 2, 0)
        one.board.ports.read(0x511, 1)
        other.board.restore(one.board.save())
        read = other.board.ports.read
        assert (read(0x80, 1), read(0x3FF, 1), read(0x511, 1)) == (0x55, 0x66, ord("E"))
        assert other.board.save().keys() == one.board.save().keys()
        with pytest.raises(StateError, match="COM9"):
            other.board.restore({**one.board.save(), "COM9": {}})


TRAFFIC = st.tuples(
    st.one_of(
        st.integers(0, 0xFFFF),
        st.sampled_from([0x60, 0x64, 0x70, 0x71, 0x80, 0x92, 0xE9, 0xF4, 0x3F8, 0x3F9, 0x3FC, 0x505, 0x510, 0x511]),
        st.sampled_from([0x600, 0x602, 0x604, 0x608, 0xCF9, 0xE0, 0xE4, 0xE8, 0x2000, 0x2017]),
    ),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 0xFFFF_FFFF),
)


@settings(max_examples=150, deadline=None)
@given(traffic=st.lists(TRAFFIC, max_size=60), test_devices=st.booleans())
def test_board_any_port_traffic_is_answered(traffic: list[tuple[int, int, int]], *, test_devices: bool) -> None:
    accel = FakeAccel()
    with Machine(spec(memory="16M", test_devices=test_devices), accel, wiring()) as machine:
        ports, mmio = machine.board.ports, machine.board.mmio
        for port, size, value in traffic:
            ports.write(port, size, value & ((1 << size * 8) - 1))
            assert 0 <= ports.read(port, size) < 1 << size * 8
            mmio.write(0xFF00_0000 + port, size, value & ((1 << size * 8) - 1))
            assert 0 <= mmio.read(0xFEFF_FFF8 + port, size) < 1 << size * 8
        assert all(0 <= gsi < 24 and level in (0, 1) for gsi, level in accel.vm.lines)
        machine.board.restore(machine.board.save())

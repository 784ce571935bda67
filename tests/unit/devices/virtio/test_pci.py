"""The PCI transport and the rules of initialisation, through a whole board."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Self

import pytest

from ostler.abi.virtio import pci as abi
from ostler.abi.virtio.common import VIRTIO_F_VERSION_1, Status
from ostler.config import parse_guest
from ostler.devices.pci.config import COMMAND, Command
from ostler.devices.state import Saved
from ostler.devices.virtio.chain import QueueError
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.pci_function import NOTIFY
from ostler.devices.virtio.queue import Virtqueue
from ostler.devices.virtio.transport import RING_FEATURES
from ostler.errors import BadRequest, StateError
from ostler.machine.board import Wiring
from ostler.machine.machine import Machine
from ostler.testing.fake_accel import FakeAccel
from ostler.testing.fakes import FakeClock, FakeTimer, RecordedPower
from ostler.testing.virtio_pci import PciDriver

OWN_FEATURE = 1 << 5


class Echo(VirtioDevice):
    """Copies what is readable into what is writable."""

    device_type = 4
    queue_sizes: tuple[int, ...] = (64, 64)
    features = OWN_FEATURE

    def __init__(self) -> None:
        super().__init__()
        self.queues: Sequence[Virtqueue] = ()
        self.log: list[str] = []
        self.value = 7

    def activate(self, queues: Sequence[Virtqueue], features: int) -> None:
        self.queues = queues
        self.log.append(f"activate {features:#x}")

    def kicked(self, index: int) -> None:
        queue = self.queues[index]
        while (chain := queue.pop()) is not None:
            queue.push(chain, chain.write(chain.read()))
        queue.flush()

    def reset(self) -> None:
        self.queues = ()
        self.log.append("reset")

    def read_config(self, offset: int, size: int) -> int:  # noqa: ARG002
        return self.value >> 8 * offset

    def write_config(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        self.value = value

    def save(self) -> Saved:
        return {"value": self.value}

    def restore(self, data: Mapping[str, object]) -> None:
        assert isinstance(data["value"], int)
        self.value = data["value"]


class Timer(FakeTimer):
    """A timer that nobody moves."""

    def call(self, expired: object) -> None:
        self.expired = expired


class Rig:
    """A machine with devices; the event loop is a dictionary that `turn` looks through."""

    def __init__(self, *devices: VirtioDevice) -> None:
        self.readers: dict[int, object] = {}
        self.accel = FakeAccel()
        wiring = Wiring(
            lock=threading.Lock(), clock=FakeClock(), new_timer=Timer, power=RecordedPower(),
            console_sink=bytearray().append, console_room=lambda: None,
            add_reader=self.readers.__setitem__, remove_reader=self.readers.__delitem__,
        )  # fmt: skip
        functions = [(f"device{number}", device) for number, device in enumerate(devices)]
        spec = parse_guest(kernel="kernel.img", memory="16M")
        self.machine = Machine(spec, self.accel, wiring, functions=functions)
        self.board = self.machine.board
        self.driver = PciDriver(self.board.mmio, self.machine.memory, 1)

    def turn(self) -> None:
        """One round of the event loop."""
        for callback in list(self.readers.values()):
            callback()  # type: ignore[operator]

    @property
    def messages(self) -> list[int]:
        return [data for _, data in self.accel.vm.messages]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.machine.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def rig(stack: ExitStack, echo: Echo) -> Rig:
    return stack.enter_context(Rig(echo))


def test_request_goes_in_by_notification_and_comes_back_by_message(rig: Rig) -> None:
    rig.driver.start()
    sent = rig.driver.send(1, [b"hello"], [8])
    rig.turn()
    assert rig.driver.queues[1].collect() == [sent]
    assert rig.driver.queues[1].contents(sent)[: sent.written] == b"hello"
    assert rig.messages == [2]


def test_request_without_msix_raises_the_wire_until_isr_is_read(rig: Rig) -> None:
    rig.driver.start(msix=False)
    rig.driver.send(0, [b"hello"], [8])
    rig.turn()
    assert rig.accel.vm.lines == [(17, 1)]
    assert (rig.driver.isr(), rig.driver.isr()) == (abi.VIRTIO_PCI_ISR_QUEUE, 0)
    assert rig.accel.vm.lines == [(17, 1), (17, 0)]


def test_doorbells_listen_only_while_driver_is_ready_and_window_decoded(rig: Rig) -> None:
    rig.driver.start()
    at = [address for _, address, _ in rig.accel.vm.ioeventfds]
    assert at == [rig.driver.bar + NOTIFY, rig.driver.bar + NOTIFY + 4]
    rig.driver.config(COMMAND, 2, Command.MASTER)
    assert rig.accel.vm.ioeventfds == []
    rig.driver.enable()
    rig.driver.common(abi.COMMON_STATUS, 1, 0)
    assert rig.accel.vm.ioeventfds == []


def test_kick_while_not_bus_master_is_served_when_it_is_again(rig: Rig) -> None:
    rig.driver.start()
    rig.driver.config(COMMAND, 2, Command.MEMORY)
    rig.driver.send(0, [b"x"], [1])
    rig.turn()
    assert rig.driver.queues[0].collect() == []
    rig.driver.enable()
    rig.turn()
    assert len(rig.driver.queues[0].collect()) == 1
    assert rig.messages == [1]


@pytest.mark.parametrize(
    ("features", "accepted"),
    [
        (RING_FEATURES, True),
        (RING_FEATURES | OWN_FEATURE, True),
        (1 << VIRTIO_F_VERSION_1, True),
        (OWN_FEATURE, False),
        (RING_FEATURES | 1 << 6, False),
        (RING_FEATURES | 1 << 63, False),
    ],
)
def test_features_ok_sticks_only_for_a_modern_driver_within_the_offer(
    rig: Rig, features: int, *, accepted: bool
) -> None:
    rig.driver.enable()
    assert bool(rig.driver.negotiate(features) & Status.FEATURES_OK) is accepted
    rig.driver.common(abi.COMMON_STATUS, 1, rig.driver.status | Status.DRIVER_OK)
    assert bool(rig.driver.status & Status.DRIVER_OK) is accepted


def test_features_after_features_ok_and_addresses_after_driver_ok_are_ignored(rig: Rig, echo: Echo) -> None:
    rig.driver.start(features=RING_FEATURES)
    rig.driver.common(abi.COMMON_GFSELECT, 4, 0)
    rig.driver.common(abi.COMMON_GF, 4, 0xFFFF_FFFF)
    rig.driver.common(abi.COMMON_Q_SELECT, 2, 0)
    before = rig.driver.common(abi.COMMON_Q_DESCLO, 8)
    rig.driver.common(abi.COMMON_Q_DESCLO, 8, 0)
    assert rig.driver.common(abi.COMMON_GF, 4) == RING_FEATURES & 0xFFFF_FFFF
    assert rig.driver.common(abi.COMMON_Q_DESCLO, 8) == before != 0
    assert echo.log[-1] == f"activate {RING_FEATURES:#x}"


def test_broken_ring_needs_reset_tells_the_driver_and_reset_heals(rig: Rig, echo: Echo) -> None:
    rig.driver.start()
    rig.driver.queues[0].raw_descriptor(0, 0, 0, 0, 0)
    rig.driver.queues[0].raw_available(0)
    rig.driver.kick(0)
    rig.turn()
    assert rig.driver.status & Status.NEEDS_RESET
    assert (rig.messages, echo.queues) == ([0], ())
    assert "no bytes" in rig.machine.transports[0].core.last_error
    rig.driver.send(1, [b"x"], [1])
    rig.turn()
    assert rig.driver.queues[1].collect() == []
    rig.driver.start()
    rig.driver.send(1, [b"x"], [1])
    rig.turn()
    assert len(rig.driver.queues[1].collect()) == 1


def test_broken_reported_later_by_the_device_stops_it_too(rig: Rig, echo: Echo) -> None:
    rig.driver.start()
    echo.broken(QueueError("no longer"))
    assert rig.driver.status & Status.NEEDS_RESET
    assert rig.accel.vm.ioeventfds == []


def test_queue_outside_of_memory_needs_reset_at_driver_ok(rig: Rig) -> None:
    rig.driver.enable()
    rig.driver.negotiate(RING_FEATURES)
    rig.driver.common(abi.COMMON_Q_SELECT, 2, 0)
    rig.driver.common(abi.COMMON_Q_DESCLO, 8, 0xFFFF_FFFF_FFFF_0000)
    rig.driver.common(abi.COMMON_Q_ENABLE, 2, 1)
    rig.driver.common(abi.COMMON_STATUS, 1, rig.driver.status | Status.DRIVER_OK)
    assert rig.driver.status & (Status.NEEDS_RESET | Status.DRIVER_OK) == Status.NEEDS_RESET | Status.DRIVER_OK


def test_queue_that_does_not_exist_has_size_zero_and_vectors_beyond_the_table_are_none(rig: Rig) -> None:
    rig.driver.enable()
    rig.driver.common(abi.COMMON_MSIX, 2, 3)
    assert rig.driver.common(abi.COMMON_MSIX, 2) == abi.VIRTIO_MSI_NO_VECTOR
    rig.driver.common(abi.COMMON_MSIX, 2, 2)
    assert rig.driver.common(abi.COMMON_MSIX, 2) == 2
    rig.driver.common(abi.COMMON_Q_SELECT, 2, 9)
    assert (rig.driver.common(abi.COMMON_Q_SIZE, 2), rig.driver.common(abi.COMMON_Q_MSIX, 2)) == (0, 0xFFFF)
    rig.driver.common(abi.COMMON_Q_SELECT, 2, 1)
    rig.driver.common(abi.COMMON_Q_SIZE, 2, 4096)
    assert (rig.driver.common(abi.COMMON_Q_SIZE, 2), rig.driver.common(abi.COMMON_Q_NOFF, 2)) == (64, 1)


def test_config_change_counts_a_generation_and_interrupts(rig: Rig, echo: Echo) -> None:
    rig.driver.start()
    before = rig.driver.common(abi.COMMON_CFGGENERATION, 1)
    echo.config_changed()
    assert rig.driver.common(abi.COMMON_CFGGENERATION, 1) == before + 1
    assert rig.messages == [0]


def test_pci_access_capability_reads_and_writes_the_window(rig: Rig, echo: Echo) -> None:
    at = rig.driver.config(0x34, 1)
    while rig.driver.config(at + 3, 1) != abi.VIRTIO_PCI_CAP_PCI_CFG or rig.driver.config(at, 1) != abi.CAP_VENDOR:
        at = rig.driver.config(at + 1, 1)
    rig.driver.config(at + 4, 1, 0)
    rig.driver.config(at + 8, 4, 0x2000)
    rig.driver.config(at + 12, 4, 4)
    assert rig.driver.config(at + 16, 4) == 7
    rig.driver.config(at + 16, 4, 0x55)
    assert echo.value == 0x55
    rig.driver.config(at + 12, 4, 3)
    rig.driver.config(at + 16, 4, 0x66)
    assert echo.value == 0x55


def test_capabilities_name_every_structure(rig: Rig) -> None:
    kinds, at = [], rig.driver.config(0x34, 1)
    while at:
        if rig.driver.config(at, 1) == abi.CAP_VENDOR:
            kinds.append(rig.driver.config(at + 3, 1))
        at = rig.driver.config(at + 1, 1)
    assert kinds == [1, 2, 3, 4, 5]


def test_saved_board_goes_on_where_it_was(rig: Rig, stack: ExitStack) -> None:
    rig.driver.start()
    rig.driver.send(0, [b"one"], [3])
    rig.turn()
    rig.driver.queues[0].collect()
    sent = rig.driver.queues[0].add([b"two"], [3])
    saved = rig.board.save()
    other = stack.enter_context(Rig(Echo()))
    for start in range(0, 16 << 20, 1 << 20):
        other.machine.memory.write(start, rig.machine.memory.read(start, 1 << 20))
    other.board.restore(saved)
    other.turn()
    used = other.machine.memory.read_int(rig.driver.queues[0].used + 2, 2)
    assert (used, other.machine.memory.read(sent.writable[0][0], 3)) == (2, b"two")
    assert other.messages == [1]
    assert other.board.save().keys() == saved.keys()


def test_restore_with_other_features_or_queues_is_refused(rig: Rig, stack: ExitStack) -> None:
    class Poor(Echo):
        features = 0
        queue_sizes = (64,)

    rig.driver.start()
    other = stack.enter_context(Rig(Poor()))
    with pytest.raises(StateError, match="other queues or features"):
        other.board.restore(rig.board.save())


def test_machine_more_functions_than_slots_is_refused() -> None:
    with pytest.raises(BadRequest, match="more than 31 devices"):
        Rig(*(Echo() for _ in range(32)))

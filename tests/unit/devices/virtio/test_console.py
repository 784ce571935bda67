"""The console and its ports against a scripted driver."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Self

import pytest

from ostler.devices.virtio import console
from ostler.devices.virtio.console import CONTROL, CONTROL_RX, CONTROL_TX, ConsoleDevice
from ostler.devices.virtio.console_port import Port, PortEvents
from ostler.errors import StateError
from ostler.testing.fakes import scatter
from ostler.testing.virtio import FakeDriver

HVC_RX, HVC_TX, AGENT_RX, AGENT_TX = 0, 1, 4, 5


class FakePeer:
    """The host's end in byte arrays."""

    def __init__(self) -> None:
        self.incoming, self.outgoing = bytearray(), bytearray()
        self.room = 1 << 30
        self.reading = self.writing = False
        self.calls: list[Callable[[], None]] = []

    def bind(self, events: PortEvents) -> None:
        self.events = events

    def watch(self, *, read: bool, write: bool) -> None:
        self.reading, self.writing = read, write

    def read_into(self, views: Sequence[memoryview]) -> int:
        return scatter(self.incoming, views)

    def write(self, views: Sequence[memoryview]) -> int:
        taken = b"".join(views)[: self.room]
        self.room -= len(taken)
        self.outgoing += taken
        return len(taken)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.calls.append(callback)

    def type(self, data: bytes) -> None:
        self.incoming += data
        while self.reading and self.incoming:
            self.events.readable()


class Guest:
    """A terminal and a named port, with their driver."""

    def __init__(self, *, features: int | None = None) -> None:
        self.terminal, self.agent = FakePeer(), FakePeer()
        self.emergency = bytearray()
        self.device = ConsoleDevice(
            [Port("console", self.terminal, is_console=True), Port("org.ostler.agent", self.agent)],
            emergency=self.emergency.append,
        )
        self.driver = FakeDriver(self.device, features=features)
        self.queues = self.driver.queues

    def connect(self) -> None:
        """The host's programs come, the driver makes both ports ready and gives room for input."""
        for peer in (self.terminal, self.agent):
            peer.events.opened(is_open=True)
        self.control(0, console.DEVICE_READY, 1)
        self.messages()
        for number in (0, 1):
            self.control(number, console.PORT_READY, 1)
            self.control(number, console.PORT_OPEN, 1)
        self.messages()
        for index in (HVC_RX, AGENT_RX):
            self.give(index)

    def give(self, index: int, size: int = 16) -> None:
        self.queues[index].add(writable=[size])
        self.driver.kick(index)

    def send(self, index: int, *parts: bytes) -> None:
        self.queues[index].add(parts)
        self.driver.kick(index)

    def control(self, number: int, event: int, value: int) -> None:
        self.send(CONTROL_TX, CONTROL.pack(number, event, value))
        self.queues[CONTROL_TX].collect()

    def messages(self) -> list[tuple[int, int, int, bytes]]:
        """What the device has said, in as many buffers as it wants."""
        found = []
        while True:
            self.queues[CONTROL_RX].add(writable=[64])
            self.driver.kick(CONTROL_RX)
            done = self.queues[CONTROL_RX].collect()
            for sent in done:
                raw = self.queues[CONTROL_RX].contents(sent)[: sent.written]
                found.append((*CONTROL.unpack_from(raw), raw[CONTROL.size :]))
            if not done:
                return found

    def received(self, index: int) -> bytes:
        queue = self.queues[index]
        return b"".join(queue.contents(sent)[: sent.written] for sent in queue.collect())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.driver.close()


def test_driver_is_told_of_ports_their_names_and_their_kinds() -> None:
    with Guest() as guest:
        guest.agent.events.opened(is_open=True)
        guest.control(0, console.DEVICE_READY, 1)
        added = guest.messages()
        guest.control(0, console.PORT_READY, 1)
        guest.control(1, console.PORT_READY, 1)
        told = guest.messages()

    assert added == [(0, console.DEVICE_ADD, 1, b""), (1, console.DEVICE_ADD, 1, b"")]
    assert told == [
        (0, console.CONSOLE_PORT, 1, b""), (0, console.PORT_NAME, 1, b"console"), (0, console.PORT_OPEN, 1, b""),
        (1, console.PORT_NAME, 1, b"org.ostler.agent"), (1, console.PORT_OPEN, 1, b""),
    ]  # fmt: skip


def test_bytes_go_both_ways_and_to_their_own_port() -> None:
    with Guest() as guest:
        guest.connect()
        guest.send(HVC_TX, b"login", b": ")
        guest.send(AGENT_TX, b"hello")
        guest.terminal.type(b"root\n")
        guest.agent.type(b"run")
        got = guest.received(HVC_RX), guest.received(AGENT_RX)

    assert (bytes(guest.terminal.outgoing), bytes(guest.agent.outgoing)) == (b"login: ", b"hello")
    assert got == (b"root\n", b"run")


def test_input_waits_for_the_guest_to_give_buffers() -> None:
    with Guest() as guest:
        guest.connect()
        guest.agent.type(b"x" * 40)
        first = guest.received(AGENT_RX)
        assert not guest.agent.reading
        rest = b""
        while len(first + rest) < 40:
            guest.give(AGENT_RX)
            guest.agent.type(b"")
            rest += guest.received(AGENT_RX)

    assert first + rest == b"x" * 40


def test_input_waits_for_a_program_in_the_guest_to_open_the_port() -> None:
    with Guest() as guest:
        guest.connect()
        guest.control(1, console.PORT_OPEN, 0)
        guest.agent.type(b"early")
        before = guest.received(AGENT_RX)
        guest.control(1, console.PORT_OPEN, 1)
        guest.agent.type(b"")
        after = guest.received(AGENT_RX)

    assert (before, after) == (b"", b"early")


def test_output_that_is_not_taken_stays_with_the_guest_and_goes_on_where_it_was() -> None:
    with Guest() as guest:
        guest.connect()
        guest.agent.room = 3
        guest.send(AGENT_TX, b"ab", b"cd", b"ef")
        assert guest.queues[AGENT_TX].collect() == []
        assert guest.agent.writing
        guest.agent.room = 100
        guest.agent.events.writable()
        assert len(guest.queues[AGENT_TX].collect()) == 1

    assert bytes(guest.agent.outgoing) == b"abcdef"
    assert not guest.agent.writing


def test_output_without_a_peer_is_thrown_away() -> None:
    with Guest() as guest:
        guest.send(AGENT_TX, b"nobody listens")
        assert len(guest.queues[AGENT_TX].collect()) == 1

    assert guest.agent.outgoing == b""


def test_peer_that_goes_is_announced() -> None:
    with Guest() as guest:
        guest.connect()
        guest.agent.events.opened(is_open=False)
        assert guest.messages() == [(1, console.PORT_OPEN, 0, b"")]


def test_driver_without_multiport_has_the_terminal() -> None:
    with Guest(features=0) as guest:
        guest.terminal.events.opened(is_open=True)
        guest.give(HVC_RX)
        guest.send(HVC_TX, b"out")
        guest.terminal.type(b"in")
        assert guest.received(HVC_RX) == b"in"

    assert bytes(guest.terminal.outgoing) == b"out"


def test_configuration_has_size_ports_and_the_emergency_byte() -> None:
    with Guest() as guest:
        guest.device.resize(80, 24)
        config = b"".join(guest.device.read_config(at, 1).to_bytes(1, "little") for at in range(12))
        guest.device.write_config(console.EMERG_WRITE_OFFSET, 4, ord("!"))

    assert struct.unpack("<HHII", config) == (80, 24, 2, 0)
    assert guest.emergency == b"!"


@pytest.mark.parametrize("message", [b"", b"1234567", CONTROL.pack(9, console.PORT_OPEN, 1), CONTROL.pack(0, 99, 1)])
def test_control_message_that_is_none_is_counted(message: bytes) -> None:
    with Guest() as guest:
        guest.send(CONTROL_TX, message or b"\0")
        assert len(guest.queues[CONTROL_TX].collect()) == 1

    assert guest.device.malformed == 1


def test_restored_console_knows_its_ports_and_says_what_is_open() -> None:
    with Guest() as guest:
        guest.connect()
        guest.control(0, console.PORT_OPEN, 0)
        saved = guest.device.save()
    with Guest() as guest:
        guest.device.reset()
        guest.device.restore(saved)
        guest.device.activate(guest.driver.virtqueues, guest.driver.features)
        told = guest.messages()

    assert told == [(0, console.PORT_OPEN, 1, b""), (1, console.PORT_OPEN, 0, b"")]
    assert saved["guest_open"] == b"\0\1"


@pytest.mark.parametrize("change", [{"ready": 4}, {"guest_open": b"\0"}, {"columns": 1 << 16}, {"x": 1}])
def test_hostile_saved_state_is_refused(change: dict[str, object]) -> None:
    with Guest() as guest, pytest.raises(StateError):
        guest.device.restore(guest.device.save() | change)

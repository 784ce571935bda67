"""A processor that is held or barred, on a scripted vCPU: in the guest or out of it, and where its time goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from ostler.accel.api import ExitReason
from ostler.vmm import processors
from ostler.vmm.processors import Outcome, Processor

LIMIT_S = 30


class KickedVcpu:
    """Runs until it is kicked, and says that it is in the guest."""

    id = 0
    exit = None

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self._kicked = threading.Event()

    def run(self) -> ExitReason:
        self.entered.release()
        self._kicked.wait()
        self._kicked.clear()
        return ExitReason.INTR

    def kick(self) -> None:
        self._kicked.set()

    def wait_until_entered(self) -> None:
        assert self.entered.acquire(timeout=LIMIT_S)


class NoBoard:
    """What no scripted exit needs."""

    ports = mmio = lock = None


class Guest:
    """One processor, and what it was told of its turns."""

    def __init__(self) -> None:
        self.vcpu = KickedVcpu()
        self.processor = Processor(self.vcpu, NoBoard(), None, Outcome())  # type: ignore[arg-type]
        self.turns: list[int] = []
        self.had_turn = threading.Event()
        self.processor.after_turn = self._after_turn

    def _after_turn(self, waited_ns: int) -> None:
        self.turns.append(waited_ns)
        self.had_turn.set()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.processor.ask_to_stop()
    made.processor.join()


def test_barred_processor_stays_out_until_its_turn_and_its_time_counts_as_waiting(guest: Guest) -> None:
    guest.processor.start()
    guest.vcpu.wait_until_entered()
    guest.processor.bar()
    guest.processor.unbar()
    guest.processor.bar()
    while guest.processor.usage().barred_ns == 0:
        guest.vcpu.kick()
    assert guest.processor.usage().wait_ns > 0
    guest.processor.unbar()
    assert guest.had_turn.wait(LIMIT_S)
    assert guest.turns[0] > 0
    guest.vcpu.wait_until_entered()


def test_barred_processor_can_be_held_and_stays_out_when_only_one_of_both_ends(guest: Guest) -> None:
    guest.processor.bar()
    guest.processor.start()
    guest.processor.hold()
    guest.processor.wait_until_held()
    guest.processor.unbar()
    guest.processor.hold()
    guest.processor.wait_until_held()
    assert not guest.vcpu.entered.acquire(blocking=False)
    assert guest.processor.usage().held_ns > 0
    guest.processor.go_on()
    guest.vcpu.wait_until_entered()


def test_barred_processor_stops_when_asked_to(guest: Guest) -> None:
    guest.processor.bar()
    guest.processor.start()
    guest.processor.ask_to_stop()
    guest.processor.join()
    assert not guest.processor.is_alive
    assert guest.turns == []


class AllDelay:
    """A kernel by whose account a thread has waited for a host CPU in all of its time."""

    def __init__(self, _tid: int) -> None:
        pass

    def read_ns(self) -> int:
        return time.monotonic_ns()

    def close(self) -> None:
        pass


def test_waiting_for_a_host_cpu_after_a_turn_is_not_counted_as_waiting_for_the_turn_too(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "RunDelay", AllDelay)
    guest.processor.bar()
    guest.processor.start()
    guest.processor.hold()
    guest.processor.wait_until_held()
    guest.processor.go_on()
    guest.processor.unbar()
    guest.vcpu.wait_until_entered()
    assert guest.processor.usage().barred_ns == 0
    assert guest.turns == []

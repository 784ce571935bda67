"""Policies and injection, on a guest of scripted processors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ostler.accel.api import ExitReason
from ostler.control.connection import Connection
from ostler.errors import BadRequest
from ostler.testing.fake_script import Halt, Out, Script, Stop
from ostler.vmm.injection import serve_faults
from ostler.vmm.run import GuestProcess
from ostler.vmm.service import GuestService
from tests.unit.vmm.serving import Served, idle

PVPANIC, WATCHDOG = 0x505, 0x620
Start = Callable[..., Served]
LIMIT_S = 30.0


class Faults:
    """The service has nothing to end."""

    def __init__(self, process: GuestProcess, service: GuestService) -> None:
        serve_faults(process, service)

    def __enter__(self) -> None: ...

    def __exit__(self, *_exc: object) -> None: ...


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Served] = []

    def run(script: Callable[[], Script] = idle, **options: object) -> Served:
        made.append(Served(tmp_path, script, extra=Faults, paused=True, **options))
        return made[0]

    yield run
    for each in made:
        each.__exit__()


def panics() -> Script:
    yield Out(PVPANIC, 1)
    yield from idle()


def triple_faults() -> Script:
    yield Stop(ExitReason.SHUTDOWN)
    yield from idle()


def starts_its_watchdog() -> Script:
    yield Out(WATCHDOG, 1, size=4)
    yield Out(WATCHDOG + 8, 1, size=4)
    yield Halt()
    yield from idle()


def events_of(guest: Served, connection: Connection, *, until: str) -> list[dict[str, Any]]:
    """Let the guest go and collect what happens, to an event of that name."""
    found = []
    with guest.connect() as other:
        events = connection.events(timeout_s=LIMIT_S)
        other.request("resume")
        for each in events:
            found.append(each)
            if each["event"] == until:
                break
    return found


@pytest.mark.parametrize(
    ("script", "fault"), [(panics, "panic"), (triple_faults, "triple-fault"), (starts_its_watchdog, "hang")]
)
@pytest.mark.parametrize("policy", ["pause", "poweroff"])
def test_fault_of_a_guest_is_told_and_ends_or_pauses_it(
    start: Start, script: Callable[[], Script], fault: str, policy: str
) -> None:
    guest = start(script, **{f"on_{fault.replace('-', '_')}": policy})
    with guest.connect() as connection:
        events = events_of(guest, connection, until="paused" if policy == "pause" else "ended")
        told = next(each for each in events if each["event"] == "fault")
        assert (told["fault"], told["policy"], told["injected"]) == (fault, policy, False)
        if policy == "pause":
            with guest.connect() as other:
                assert other.request("status")["state"] == "paused"
        else:
            assert guest.join()["reason"] in {"panic", "triple fault", "hang"}


def test_panic_that_is_ignored_leaves_the_guest_running(start: Start) -> None:
    guest = start(panics, on_panic="ignore")
    with guest.connect() as connection:
        assert events_of(guest, connection, until="fault")[-1]["policy"] == "ignore"
        with guest.connect() as other:
            assert other.request("status")["state"] == "running"


def test_watchdog_of_a_paused_guest_waits(start: Start) -> None:
    guest = start(starts_its_watchdog, on_hang="poweroff")
    watchdog = guest.process.machine.board.watchdog
    with guest.process.lock:
        watchdog.write(0, 4, 1)
        watchdog.write(8, 4, 1)
        watchdog.expired()
    with guest.connect() as connection:
        assert connection.request("status")["state"] == "paused"
    assert guest.process.machine.board.watchdog.is_running


def test_injected_panic_is_marked_as_such(start: Start) -> None:
    guest = start(on_panic="pause")
    with guest.connect() as connection, guest.connect() as other:
        events = connection.events(timeout_s=LIMIT_S)
        other.request("resume")
        other.request("inject", fault="panic")
        told = next(each for each in events if each["event"] == "fault")
        assert (told["fault"], told["injected"], told["policy"]) == ("panic", True, "pause")
        assert next(events)["event"] == "paused"


def test_injected_hang_holds_the_processors_until_it_is_cleared(start: Start) -> None:
    guest = start()
    with guest.connect() as connection:
        connection.request("resume")
        answer = connection.request("inject", fault="hang", seconds=3600)
        assert answer == {"watchdog": False, "watchdog_timeout_s": 30.0}
        guest.process.processors[0].wait_until_held()
        runs = guest.process.machine.vcpus[0].runs  # type: ignore[attr-defined]
        connection.request("inject", fault="clear")
        deadline = time.monotonic() + LIMIT_S
        guest.process.processors[0].vcpu.kick()
        while guest.process.machine.vcpus[0].runs == runs and time.monotonic() < deadline:  # type: ignore[attr-defined]
            pass
        assert guest.process.machine.vcpus[0].runs > runs  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fault": "plague"}, "fault 'plague': expected one of panic"),
        ({"fault": "disk-error", "device": "disk7"}, "device 'disk7'"),
        ({"fault": "hang", "seconds": 1e9}, "seconds 1000000000.0"),
        ({"fault": "backend-lost"}, "device 'net0'"),
        ({"fault": "memory-error", "address": 1 << 40}, "address 0x10000000000"),
        ({"fault": "nmi", "vcpu": 9}, "vcpu 9"),
    ],
)
def test_injection_that_makes_no_sense_is_refused(start: Start, arguments: dict[str, Any], message: str) -> None:
    guest = start()
    with guest.connect() as connection:
        connection.request("resume")
        with pytest.raises(BadRequest, match=message):
            connection.request("inject", **arguments)


def test_injection_into_a_paused_guest_is_refused(start: Start) -> None:
    with start().connect() as connection, pytest.raises(BadRequest, match="this one is paused"):
        connection.request("inject", fault="panic")


def test_policies_are_told_and_changed_but_not_to_a_reset_nobody_prepared(start: Start) -> None:
    with start().connect() as connection:
        assert connection.request("fault-policy")["no-space"] == "pause"
        assert connection.request("fault-policy", panic="ignore")["panic"] == "ignore"
        with pytest.raises(BadRequest, match="policy 'ignore' of triple-fault"):
            connection.request("fault-policy", timeout_s=30, **{"triple-fault": "ignore"})
        with pytest.raises(BadRequest, match="expected a guest that was started with"):
            connection.request("fault-policy", panic="reset")
        with pytest.raises(BadRequest, match="fault 'plague'"):
            connection.request("fault-policy", plague="reset")

"""The operations of the control protocol, on a guest of scripted processors."""

from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ostler.control.connection import ConnectionLost
from ostler.control.wire import MAX_LINE_BYTES, encode
from ostler.errors import BadRequest, GuestNotFound, HostError
from ostler.testing.fake_script import Halt, In, Out, Script
from tests.unit.vmm.serving import Served, idle

COM1 = 0x3F8
SCI_STATUS, SCI_ENABLE = 0x600, 0x602


@pytest.fixture
def served() -> Iterator[Callable[[Callable[[], Script]], Served]]:
    with tempfile.TemporaryDirectory(prefix="ostler-") as name, contextlib.ExitStack() as stack:
        yield lambda script: stack.enter_context(Served(Path(name), script))


def until_power_button() -> Script:
    yield Out(SCI_ENABLE, 0x100, size=2)
    while not (yield In(SCI_STATUS, size=2)) & 0x100:
        yield Halt()
    yield Out(0x604, 0x2000, size=2)


def echo() -> Script:
    yield Out(COM1 + 2, 0x01)
    yield Out(COM1 + 4, 0x0A)
    yield Out(COM1 + 1, 0x01)
    for byte in b"login: ":
        yield Out(COM1, byte)
    while True:
        if (yield In(COM1 + 5)) & 1:
            yield Out(COM1, (yield In(COM1)) ^ 0x20)
        else:
            yield Halt()


Start = Callable[[Callable[[], Script]], Served]


def test_status_names_the_guest_and_pause_changes_its_state(served: Start) -> None:
    with served(idle).connect() as connection:
        assert connection.hello["ostler-control"] == 1
        assert connection.request("status")["state"] == "running"
        assert connection.request("pause") == {}
        assert connection.request("pause") == {}
        assert connection.request("status")["state"] == "paused"
        assert connection.request("resume") == {}
        assert connection.request("status")["state"] == "running"
        assert connection.request("inspect")["spec"] == {"cpus": 1}


def test_stop_presses_the_power_button_and_answers_with_the_end(served: Start) -> None:
    guest = served(until_power_button)
    with guest.connect() as watcher, guest.connect() as connection:
        watcher.request("events")
        assert connection.request("stop", grace_s=60) == {"status": 0, "reason": "power-off", "message": ""}
        assert guest.join()["reason"] == "power-off"


def test_stop_kills_a_guest_that_does_not_care_even_a_paused_one(served: Start) -> None:
    guest = served(idle)
    with guest.connect() as connection:
        connection.request("pause")
        assert connection.request("stop", grace_s=0)["reason"] == "killed"
    assert not guest.path.exists() or guest.join()


def test_events_tell_the_story_to_its_end(served: Start) -> None:
    guest = served(idle)
    with guest.connect() as connection, guest.connect() as other:
        events = connection.events(timeout_s=30)
        other.request("pause")
        other.request("resume")
        other.request("kill")
        assert [event["event"] for event in events] == ["paused", "resumed", "ended"]


def test_everybody_who_waits_is_told_the_end(served: Start) -> None:
    guest = served(idle)
    with guest.connect() as first, guest.connect() as second, guest.connect() as killer:
        for connection in (first, second):
            # The answer to the second request says that the first has been taken.
            connection._socket.sendall(encode({"id": "w", "op": "wait"}))
            connection.request("status")
        killer.request("kill")
        end = {"status": 0, "reason": "killed", "message": ""}
        assert [connection._receive() for connection in (first, second)] == [{"id": "w", "ok": end}] * 2


def test_console_gives_backlog_and_carries_bytes_both_ways(served: Start) -> None:
    guest = served(echo)
    with guest.connect() as connection:
        console = connection.console(backlog_bytes=4096)
    got = console.backlog + console.first
    with console.socket as stream:
        stream.settimeout(30)
        while b"login: " not in got:
            got += stream.recv(100)
        stream.sendall(b"ABC")
        while b"abc" not in got:
            got += stream.recv(100)
    assert got == b"login: abc"
    assert guest.log.read_bytes() == b"login: abc"


def test_stats_count_processor_time_and_memory(served: Start) -> None:
    with served(idle).connect() as connection:
        stats = connection.request("stats")
    assert [each["id"] for each in stats["vcpus"]] == [0]
    assert stats["vcpus"][0]["cpu_time_ns"] > 0
    assert stats["engine"] == {"instructions": 1000, "exits": 2}
    assert 0 <= stats["memory"]["touched_bytes"] <= stats["memory"]["size_bytes"] == 16 << 20


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("fly", {}, "'fly': not known"),
        ("stop", {"grace_s": "soon"}, "grace_s 'soon': expected a number from 0 to 3600"),
        ("stop", {"grace_s": True}, "grace_s True"),
        ("console", {"backlog_bytes": -1}, "backlog_bytes -1"),
    ],
)
def test_bad_request_is_answered_and_the_connection_lives(
    served: Start, op: str, arguments: dict[str, Any], message: str
) -> None:
    with served(idle).connect() as connection:
        with pytest.raises(BadRequest, match=message):
            connection.request(op, **arguments)
        assert connection.request("status")["state"] == "running"


def test_schedule_shows_and_changes_shares_and_the_guest_keeps_them(served: Start) -> None:
    guest = served(idle)
    with guest.connect() as connection:
        assert {"weight": 100, "cap": None, "reserve": 0.0, "pin": None}.items() <= connection.request(
            "schedule"
        ).items()
        changed = connection.request("schedule", weight=400, cap="50%")
        assert (changed["weight"], changed["cap"]) == (400, 50.0)
        assert connection.request("schedule", cap=None)["cap"] is None
        assert connection.request("inspect")["spec"]["cpu_weight"] == 400
        assert guest.service._process.machine.spec.schedule.weight == 400


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"weight": 0}, "weight '0': expected 1 to 10000"),
        ({"cap": 10, "reserve": 20}, "at most the cap"),
        ({"reserve": 101}, "reserve 101: expected at most 100 percent for each of 1 vCPUs"),
        ({"pin": [1023]}, "pin 1023: expected host CPUs of"),
        ({"pin": {"a": 1}}, "pin"),
    ],
)
def test_share_that_cannot_be_had_changes_nothing(served: Start, wish: dict[str, Any], message: str) -> None:
    with served(idle).connect() as connection:
        with pytest.raises(BadRequest, match=message):
            connection.request("schedule", **wish)
        assert connection.request("schedule")["weight"] == 100


def test_stats_account_for_all_of_a_processors_time(served: Start) -> None:
    with served(idle).connect() as connection:
        # The service may answer before the processor's thread has begun to count.
        while not (vcpu := connection.request("stats")["vcpus"][0])["wall_ns"]:
            pass
        parts = [vcpu[name] for name in ("run_ns", "wait_ns", "halt_ns", "held_ns")]
        assert all(part >= 0 for part in parts)
        assert sum(parts) >= vcpu["wall_ns"]


def test_client_that_speaks_no_json_is_told_and_cut_off(served: Start) -> None:
    guest = served(idle)
    for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"x" * MAX_LINE_BYTES):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(30)
            stranger.connect(str(guest.path))
            stranger.sendall(nonsense)
            # The end may overtake the complaint where the server had not read everything yet.
            with contextlib.suppress(ConnectionResetError), stranger.makefile("rb") as stream:
                assert b"control request: line" in stream.read()
    with guest.connect() as connection:
        assert connection.request("status")["state"] == "running"


def test_connection_of_an_ended_guest_is_lost_and_a_new_one_refused(served: Start) -> None:
    guest = served(idle)
    with guest.connect() as connection, guest.connect() as other:
        other.request("kill")
        guest.join()
        with pytest.raises(ConnectionLost):
            connection.request("status")
    with pytest.raises(GuestNotFound, match="is not running"):
        guest.connect()


def test_bug_in_an_operation_is_answered_and_the_guest_lives(served: Start, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> dict[str, object]:
        raise KeyError(0)

    guest = served(idle)
    with guest.connect() as connection:
        guest.service.sources["broken"] = broken
        with pytest.raises(HostError, match="internal error: KeyError: 0"):
            connection.request("stats")
        assert connection.request("status")["state"] == "running"
    assert "Traceback" in capsys.readouterr().err

"""What calls do: rights, limits, errors, and calls that a client answers."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ostler.client.calls import CallsOf
from ostler.control.runtime import Entry
from ostler.errors import BadRequest
from ostler.vmm.calls import DELETE, GET, LOG, MAX_PENDING, PING, POLL, PUT, READY, SNAPSHOT, Bucket, Call, CallService
from ostler.vmm.run import GuestProcess
from ostler.vmm.service import GuestService
from tests.unit.vmm.serving import Served, idle

NONE = (0,) * 6
OWN = 0x1000


class Serving:
    """Keeps the service for the test to call as a processor would."""

    service: CallService

    def __init__(self, process: GuestProcess, service: GuestService) -> None:
        Serving.service = CallService(process, service, "fake")

    def __enter__(self) -> None: ...

    def __exit__(self, *_exc: object) -> None: ...


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Served]:
    with Served(tmp_path, idle, extra=Serving) as served:
        yield served


def call(guest: Served, number: int, data: bytes = b"", *arguments: int) -> tuple[int, bytes]:
    with guest.process.lock:
        return Serving.service.serve(number, (*arguments, *NONE)[:6], data)


def test_log_and_readiness_are_events(guest: Served) -> None:
    with guest.connect() as connection:
        events = connection.events(timeout_s=30)
        assert call(guest, LOG, b"hello\x1b[31m w\xff") == (0, b"")
        assert next(events)["text"] == "hello?[31m w\ufffd"
        assert call(guest, READY) == (0, b"")
        told = next(events)
        assert (told["event"], told["status"]) == ("ready", 0)
    assert CallsOf(Entry("fake", guest.path.parent)).is_ready


def test_keys_are_seen_from_both_sides(guest: Served) -> None:
    host = CallsOf(Entry("fake", guest.path.parent))
    assert call(guest, PUT, b"colour\0blue") == (0, b"")
    assert host.keys == {"colour": "blue"}
    host.put("shape", "round")
    assert call(guest, GET, b"shape") == (5, b"round")
    host.put("shape", None)
    assert call(guest, GET, b"shape")[0] == -errno.ENOENT
    assert call(guest, DELETE, b"colour")[0] == 0
    assert call(guest, DELETE, b"colour")[0] == -errno.ENOENT
    with pytest.raises(BadRequest, match="ENOSPC"):
        host.put("big", "x" * 70_000)


@pytest.mark.parametrize(
    ("number", "data", "error"),
    [
        (99, b"", errno.ENOSYS), (OWN, b"", errno.ENOSYS), (PUT, b"no separator", errno.EINVAL),
        (PUT, b"\0value", errno.EINVAL), (LOG, bytes(2000), errno.EMSGSIZE), (POLL, b"", errno.ESTALE),
        (SNAPSHOT, b"mine", errno.EPERM),
    ],
)  # fmt: skip
def test_errors_are_like_a_system_calls(guest: Served, number: int, data: bytes, error: int) -> None:
    assert call(guest, number, data) == (-error, b"")


def test_ping_answers_with_the_version_and_is_never_limited(guest: Served) -> None:
    assert {call(guest, PING) for _ in range(10_000)} == {(1, b"")}


def test_rights_are_the_specifications(tmp_path: Path) -> None:
    with Served(tmp_path, idle, extra=Serving, calls=("log",)) as guest:
        assert call(guest, LOG, b"x")[0] == 0
        assert call(guest, GET, b"x")[0] == -errno.EPERM
        assert call(guest, READY)[0] == -errno.EPERM
        with guest.connect() as connection:
            assert connection.request("calls")["counts"] == {"served": 1, "refused": 2, "limited": 0}


def test_limit_is_a_bucket_that_fills_again(guest: Served) -> None:
    now = [0.0]
    bucket = Bucket(10, 2, lambda: now[0])
    Serving.service.register(50, Call(lambda _arguments, _data: (7, b""), None, bucket))
    assert [call(guest, 50)[0] for _ in range(3)] == [7, 7, -errno.EAGAIN]
    now[0] = 0.1
    assert [call(guest, 50)[0] for _ in range(2)] == [7, -errno.EAGAIN]
    with pytest.raises(ValueError, match="call 0x32 is taken"):
        Serving.service.register(50, Call(lambda _arguments, _data: (7, b"")))


def poll(guest: Served, token: int) -> tuple[int, bytes]:
    """The answer, once it is there."""
    while (found := call(guest, POLL, b"", token))[0] == -errno.EINPROGRESS:
        pass
    return found


def test_own_call_is_answered_by_the_client_that_serves_it(guest: Served) -> None:
    host = CallsOf(Entry("fake", guest.path.parent))
    seen: list[Any] = []

    def handler(arguments: Any, data: bytes) -> bytes:
        seen.append(list(arguments))
        if data == b"bad":
            raise PermissionError(errno.EACCES, "not you")
        return data.upper()

    with host.serving(OWN, handler):
        with pytest.raises(BadRequest, match="is served already"), host.serving(OWN, handler):
            pass
        token, _ = call(guest, OWN, b"abc", 1, 2)
        assert token > 0
        assert poll(guest, token) == (3, b"ABC")
        assert call(guest, POLL, b"", token)[0] == -errno.ESTALE
        assert poll(guest, call(guest, OWN, b"bad")[0])[0] == -errno.EACCES
    assert seen[0] == [1, 2, 0, 0, 0, 0]


def test_own_call_of_a_client_that_has_gone_fails(guest: Served) -> None:
    entered, leave = threading.Event(), threading.Event()

    def handler(_arguments: Any, _data: bytes) -> int:
        entered.set()
        leave.wait(30)
        return 0

    with CallsOf(Entry("fake", guest.path.parent)).serving(OWN, handler):
        token, _ = call(guest, OWN)
        assert entered.wait(30)
        threading.Timer(0, leave.set).start()
    assert poll(guest, token)[0] in {-errno.EPIPE, 0}


def test_calls_without_answers_are_bounded(guest: Served) -> None:
    with guest.connect() as connection:
        connection.request("calls-serve", call=OWN)
        results = [call(guest, OWN)[0] for _ in range(MAX_PENDING + 1)]
        assert results[-1] == -errno.EBUSY
        with pytest.raises(BadRequest, match="token 'x'"):
            connection.request("calls-answer", token="x")
        connection.request("calls-answer", token=results[0], result=4)
        assert call(guest, OWN)[0] > 0


@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("calls-serve", {"call": 1}, "call 1: expected a number from 0x1000"),
        ("calls-put", {"key": 1, "value": "x"}, "key 1"),
        ("calls-answer", {"token": 1, "data": "zz"}, "hexadecimal"),
        ("calls-answer", {"token": 1, "result": -5000}, "result -5000"),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    guest: Served, op: str, arguments: dict[str, Any], message: str
) -> None:
    with guest.connect() as connection, pytest.raises(BadRequest, match=message):
        connection.request(op, **arguments)

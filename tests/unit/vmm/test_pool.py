"""The pool: children that wait get what they are given and nothing else; more at once than wait are served too."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from ostler.control import pool as client
from ostler.vmm import pool
from ostler.vmm.pool_ahead import Task

WAIT_S = 60


def say_and_end(asked: socket.socket, task: Task | None) -> NoReturn:
    """Life of a child here: makes what it is to, says its request where it is told to, ends when that is closed."""
    if task is not None:
        if task.spec == "impossible":
            os._exit(1)
        asked.send(b"!")
    data, fds, _, _ = socket.recv_fds(asked, client.MAX_REQUEST_BYTES, pool.MAX_FDS)
    if data:
        os.write(fds[0], data.replace(b'"plain"', b'"made ahead"') if task else data)
        os.close(fds[0])
        # The other end of what it was given, closed by the client, is how it learns that all is over.
        os.read(fds[1], 1)
    os._exit(0)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ostler-") as name:
        path = Path(name) / "pool.sock"
        monkeypatch.setenv("OSTLER_POOL", "on")
        monkeypatch.setattr(client, "socket_path", lambda: path)
        if not os.fork():
            pool._serve_one = say_and_end
            made = pool.Pool(path)
            made.run()
            made.close()
            os._exit(0)
        assert client.wait_until_warm(WAIT_S)
        yield path
        client.stop()
        os.wait()


def ask(number: int, **more: object) -> bytes:
    """Ask, and read what the child says to its end."""
    (reading, writing), (theirs, ours) = os.pipe(), os.pipe()
    process = client.request({"number": number, **more}, [writing, theirs])
    assert process is not None
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        # To the end of the pipe: nobody but the child that was asked may hold its other end.
        data = said.read()
    assert process.poll() is None
    os.close(ours)
    os.close(theirs)
    process.wait(WAIT_S)
    return data


def test_many_at_once_each_get_their_own_child(served: Path) -> None:
    with ThreadPoolExecutor(12) as workers:
        found = sorted(json.loads(data)["number"] for data in workers.map(ask, range(24)))
    assert found == [*range(24)]
    assert served.exists()


def test_pool_that_is_off_or_gone_is_none(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setenv("OSTLER_POOL", "off")
        assert client.request({}, []) is None
        other.setenv("OSTLER_POOL", "on")
        other.setattr(client, "socket_path", lambda: served.with_name("none.sock"))
        assert client.request({}, []) is None


def test_request_that_is_nonsense_ends_nothing(served: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
        asked.connect(str(served))
        asked.sendall(b"nonsense\n")
        assert asked.recv(10) == b""
    assert json.loads(ask(1))["number"] == 1


@pytest.mark.usefixtures("served")
def test_guest_that_went_on_from_a_snapshot_has_the_next_one_made_ahead() -> None:
    wanted = {"kind": "plain", "spec": "{}", "origin": {"snapshot": "/a"}, "environment": {"OSTLER_DATA": "/b"}}
    first = ask(1, **wanted)
    assert client.wait_until_warm(WAIT_S, ready=1)
    other = ask(2, **{**wanted, "environment": {"OSTLER_DATA": "/c"}})
    second = ask(3, **wanted)

    assert [json.loads(each)["kind"] for each in (first, other, second)] == ["plain", "plain", "made ahead"]


@pytest.mark.usefixtures("served")
def test_guest_that_cannot_be_made_ahead_is_not_tried_again_and_nobody_is_the_worse() -> None:
    wanted = {"kind": "plain", "spec": "impossible", "origin": {"snapshot": "/a"}, "environment": {}}
    ask(1, **wanted)
    possible = {**wanted, "spec": "{}"}
    ask(2, **possible)
    assert client.wait_until_warm(WAIT_S, ready=1)

    assert json.loads(ask(3, **wanted))["kind"] == "plain"
    assert json.loads(ask(4, **possible))["kind"] == "made ahead"

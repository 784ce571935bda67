"""Which guests are made ahead: what was asked for last, a few, for a while."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ostler.vmm.pool_ahead import KEPT_S, MOST, Ahead, Task

PLACE = Path("/nowhere")


MADE: list[socket.socket] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while MADE:
        MADE.pop().close()


class FakeSpare:
    """A child that is ready, or has ended, as the test says."""

    def __init__(self, *, lives: bool = True) -> None:
        self.pid = 1
        self.socket = socket.socket()
        MADE.append(self.socket)
        self.is_ready = False
        self.lives = lives
        self.dismissed = False

    def hear(self) -> bool:
        self.is_ready = self.lives
        return self.lives

    def give(self, request: bytes, fds: list[int]) -> int:
        raise AssertionError((request, fds))

    def dismiss(self) -> None:
        self.dismissed = True
        self.socket.close()


def task(name: str = "a", **changes: Any) -> Task:
    request = {"spec": "{}", "origin": {"snapshot": f"/{name}"}, "environment": {"PATH": "/bin"}, **changes}
    made = Task.of(request, PLACE)
    assert made is not None
    return made


def waiting(ahead: Ahead, wanted: Task) -> FakeSpare:
    """One that was asked for once and made, and has said so."""
    assert ahead.take(wanted, 0) is None
    spare = FakeSpare()
    ahead.add(wanted, spare)
    ahead.hear([spare.socket])
    return spare


def test_guest_asked_for_again_is_the_one_that_waits_and_then_another_is_missing() -> None:
    ahead, wanted = Ahead(), task()
    spare = waiting(ahead, wanted)
    assert (ahead.missing(), ahead.ready) == (None, 1)

    assert ahead.take(wanted, 1) is spare
    assert ahead.missing() == wanted


def test_guest_that_is_not_ready_is_nobodys() -> None:
    ahead, wanted = Ahead(), task()
    ahead.take(wanted, 0)
    ahead.add(wanted, FakeSpare())

    assert ahead.take(wanted, 1) is None
    assert ahead.missing() is None


def test_guest_that_died_is_not_made_again() -> None:
    ahead, wanted = Ahead(), task()
    ahead.take(wanted, 0)
    spare = FakeSpare(lives=False)
    ahead.add(wanted, spare)
    ahead.hear([spare.socket])

    assert (ahead.spares, ahead.missing()) == ([], None)


def test_only_those_asked_for_last_are_kept() -> None:
    ahead = Ahead()
    spares = [waiting(ahead, task(str(number))) for number in range(MOST + 1)]

    assert [spare.dismissed for spare in spares] == [True] + [False] * MOST


def test_guest_nobody_asks_for_is_dismissed_after_a_while() -> None:
    ahead = Ahead()
    spare = waiting(ahead, task())
    ahead.forget_old(KEPT_S)
    assert not spare.dismissed
    ahead.forget_old(KEPT_S + 1)
    assert (spare.dismissed, ahead.missing()) == (True, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"origin": None},
        {"origin": {"snapshot": "/a", "once": True}},
        {"environment": {"OSTLER_POOL": "bare"}},
        {"spec": 3},
    ],
)
def test_guests_that_boot_or_come_but_once_are_not_made_ahead(changes: dict[str, Any]) -> None:
    request = {"spec": "{}", "origin": {"snapshot": "/a"}, "environment": {}, **changes}
    assert Task.of(request, PLACE) is None


def test_guest_is_another_under_another_environment_but_not_for_every_variable() -> None:
    assert task().key == task(environment={"PATH": "/bin", "TERM": "linux"}).key
    assert task().key != task(environment={"PATH": "/usr/bin"}).key
    assert task().key != task(environment={"PATH": "/bin", "OSTLER_ENGINE": "interp"}).key

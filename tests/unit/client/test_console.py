"""A console for programs, with a socket pair in place of a guest."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from ostler.client.console import GuestConsole
from ostler.control.connection import Console
from ostler.errors import GuestGone, HostError


@pytest.fixture
def ends() -> Iterator[tuple[GuestConsole, socket.socket]]:
    ours, theirs = socket.socketpair()
    with GuestConsole(Console(ours, b"before ", b"since ")) as console, theirs:
        yield console, theirs


Ends = tuple[GuestConsole, socket.socket]


def test_expect_finds_what_came_before_and_comes_later(ends: Ends) -> None:
    console, guest = ends
    assert console.expect("since").group() == b"since"
    guest.sendall(b"login: ")
    assert console.expect(r"(\w+): ").group(1) == b"login"
    guest.sendall(b"rest")
    assert console.read() == b"rest"


def test_write_types(ends: Ends) -> None:
    console, guest = ends
    console.write("root\n")
    console.write(b"\x03")
    assert guest.recv(100) == b"root\n\x03"


def test_what_does_not_come_is_an_error_that_shows_what_did(ends: Ends) -> None:
    console, guest = ends
    with pytest.raises(HostError, match=r"'login' did not come within 0\.01 s; last was 'before since '"):
        console.expect("login", timeout_s=0.01)
    guest.close()
    with pytest.raises(GuestGone, match="the guest ended before"):
        console.expect("login")
    assert console.read() == b"before since "
    assert console.read() == b""

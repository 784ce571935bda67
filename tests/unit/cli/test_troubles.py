"""A device's trouble reaches whoever is attached."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from ostler.cli import troubles
from ostler.control.connection import Connection
from ostler.control.runtime import Entry
from tests.unit.vmm.serving import Served, idle


def test_trouble_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="ostler-") as name,
        Served(Path(name), idle) as guest,
        troubles.shown(Entry("fake", Path(name))),
        Connection(guest.path) as connection,
    ):
        guest.service.on_loop(lambda: guest.service.report("net0", "passt: died"))
        # The loop makes its calls between rounds of requests: with two answered, the trouble was sent.
        connection.request("status")
        connection.request("status")
    assert "ostler: net0: passt: died" in capsys.readouterr().err.splitlines()

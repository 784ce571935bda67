"""VM processes and their registry, with programs of a few instructions instead of a system."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ostler.client import guests
from ostler.config import parse_guest
from ostler.control import launch, runtime
from ostler.control.connection import Connection
from ostler.control.launch import Launched
from ostler.errors import BadRequest, GuestNotFound, KernelError
from ostler.testing import kernels

LIMIT_S = 60
# mov $'A', %al; mov $0x3f8, %dx; out %al, (%dx); then hlt for ever.
SAYS_A = bytes.fromhex("b041 66baf803 ee f4 ebfd")
# mov $0x2000, %ax; mov $0x604, %dx; out %ax, (%dx)
POWERS_OFF = bytes.fromhex("66b80020 66ba0406 66ef f4")
FAULTS = bytes.fromhex("0f0b")
Start = Callable[..., Launched]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(code, name, …)` runs 32-bit code in a VM process."""
    made: list[Launched] = []

    def run(code: bytes, name: str, *, leash: bool = False, remove: bool = False) -> Launched:
        kernel = tmp_path / "kernel"
        kernel.write_bytes(kernels.elf64(code + b"\xf4" * 30, note=kernels.xen_note(0x10_0000)))
        spec = parse_guest(kernel=kernel, memory="16M", accel="soft")
        made.append(launch.launch(name, spec.model_dump_json(), facts={"remove": remove}, leash=leash))
        return made[-1]

    yield run
    for each in made:
        each.process.kill()
        each.process.wait()
    for each in made:
        runtime.remove(each.entry)


def test_guest_runs_by_itself_and_is_stopped(start: Start) -> None:
    launched = start(SAYS_A, "vmp-runs")
    with Connection.to(launched.entry) as connection:
        assert connection.request("status")["state"] == "running"
        console = connection.console(backlog_bytes=10)
        with console.socket as stream:
            stream.settimeout(LIMIT_S)
            assert (console.backlog + console.first or stream.recv(1)) == b"A"
    assert [each.state for each in guests.summaries() if each.name == "vmp-runs"] == ["running"]
    assert guests.kill(launched.entry)["reason"] == "killed"
    assert launched.process.wait(LIMIT_S) == 0
    assert guests.summary(launched.entry).state == "ended"
    assert launched.entry.console_log.read_bytes() == b"A"
    with pytest.raises(GuestNotFound):
        guests.request(launched.entry, "status")


def test_guest_that_powers_off_says_so_and_leaves_nothing_if_that_was_wanted(start: Start) -> None:
    launched = start(POWERS_OFF, "vmp-gone", remove=True)
    assert launched.process.wait(LIMIT_S) == 0
    assert not launched.entry.path.exists()


def test_guest_that_crashes_ends_with_its_status_and_message(start: Start) -> None:
    launched = start(FAULTS, "vmp-crash")
    assert launched.process.wait(LIMIT_S) == 3
    assert launched.entry.end["reason"] == "TripleFault"
    assert "triple fault on vCPU 0" in launched.entry.end["message"]


def test_leash_ends_the_guest_with_its_holder(start: Start) -> None:
    launched = start(SAYS_A, "vmp-leash", leash=True)
    assert launched.leash_fd is not None
    os.close(launched.leash_fd)
    assert launched.process.wait(LIMIT_S) == 0
    assert launched.entry.end["status"] == 0


def test_guest_outlives_its_launcher_and_its_launchers_session(start: Start, tmp_path: Path) -> None:
    start(POWERS_OFF, "vmp-first").process.wait(LIMIT_S)
    spec = parse_guest(kernel=tmp_path / "kernel", memory="16M", accel="soft")
    (tmp_path / "kernel").write_bytes(kernels.elf64(SAYS_A, note=kernels.xen_note(0x10_0000)))
    script = f"from ostler.control import launch; launch.launch('vmp-orphan', {spec.model_dump_json()!r}, facts={{}})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=LIMIT_S)
    entry = runtime.find("vmp-orphan")
    assert entry.is_running()
    assert guests.kill(entry)["reason"] == "killed"
    assert not entry.path.exists()


def test_killed_process_leaves_an_entry_that_is_known_for_dead(start: Start) -> None:
    launched = start(SAYS_A, "vmp-killed")
    launched.process.kill()
    launched.process.wait(LIMIT_S)
    assert guests.summary(launched.entry).state == "died"
    assert guests.wait(launched.entry)["reason"] == "died"
    again = start(SAYS_A, "vmp-killed")
    assert again.entry.is_running()


def test_name_that_is_taken_is_refused_without_harm(start: Start) -> None:
    first = start(SAYS_A, "vmp-name")
    with pytest.raises(BadRequest, match="a guest of that name is running"):
        start(SAYS_A, "vmp-name")
    assert first.entry.is_running()


def test_specification_that_cannot_run_is_reported_and_nothing_stays(tmp_path: Path) -> None:
    before = time.monotonic()
    spec = parse_guest(kernel=tmp_path / "nonsense", memory="16M", accel="soft")
    (tmp_path / "nonsense").write_bytes(b"not a kernel")
    with pytest.raises(KernelError, match="nonsense"):
        launch.launch("vmp-bad", spec.model_dump_json(), facts={})
    assert time.monotonic() - before < LIMIT_S
    assert not (runtime.root() / "guests" / "vmp-bad").exists()

"""Guests of an image as users meet them: one command, one guest that many commands share, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ostler
from ostler.client import guests
from ostler.control import runtime
from ostler.errors import CommandFailed, CommandNotFound, CommandTimeout, GuestGone, GuestPaused
from tests.guest.harness import OSTLER

pytestmark = pytest.mark.usefixtures("needs_an_agent")

Cli = Callable[..., "subprocess.CompletedProcess[bytes]"]
WAIT_S = 200


@pytest.fixture
def cli() -> Cli:
    """`cli(arguments...)` is the `ostler` command, without a terminal."""

    def run(*arguments: str, stdin: bytes = b"", cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*OSTLER, *arguments], input=stdin, capture_output=True, check=False, timeout=WAIT_S, cwd=cwd
        )

    return run


def lines(name: str) -> dict[str, object]:
    """What `ostler ps --json` says of a guest."""
    done = subprocess.run([*OSTLER, "ps", "--all", "--json"], capture_output=True, check=True)
    found = {each["name"]: each for each in json.loads(done.stdout)}
    return dict(found[name]) if name in found else {}


def test_one_command_has_its_output_its_status_and_leaves_nothing(cli: Cli) -> None:
    done = cli(
        "run", "--accel", "soft", "--net", "none", "--name", "once", "debian", "--",
        "sh", "-c", "python3 -c 'print(6*7)'; echo sad >&2; exit 7",
    )  # fmt: skip

    assert done.stdout == b"42\n", done.stderr
    assert done.returncode == 7
    assert done.stderr.splitlines()[-1] == b"sad"
    assert lines("once") == {}
    assert not (runtime.root() / "guests" / "once").exists()


def test_detached_guest_is_its_command_with_log_and_status(cli: Cli) -> None:
    started = cli(
        "run", "-d", "--accel", "soft", "--net", "none", "--name", "svc", "-e", "WORD=moon", "-w", "/tmp",
        "debian", "--", "sh", "-c", "echo $WORD; pwd >&2; while [ ! -e go ]; do sleep 0.1; done; exit 5",
    )  # fmt: skip
    try:
        assert started.stdout == b"svc\n", started.stderr
        assert lines("svc")["state"] == "running"
        assert cli("run", "-d", "--net", "none", "--name", "svc", "debian").returncode == 2
        assert cli("exec", "svc", "touch", "/tmp/go").returncode == 0
        waited = cli("wait", "svc")
        assert (waited.returncode, waited.stdout) == (5, b"5\n")
        assert cli("logs", "svc").stdout == b"moon\n/tmp\n"
        assert cli("logs", "-n", "1", "svc").stdout == b"/tmp\n"
        assert lines("svc") | {"state": "ended", "status": 5} == lines("svc")
    finally:
        assert cli("rm", "-f", "svc").returncode == 0
    assert lines("svc") == {}
    assert cli("exec", "svc", "true").returncode == 2


@pytest.fixture(scope="module")
def vm() -> Iterator[ostler.VM]:
    """One guest for all tests below."""
    with ostler.VM("debian", memory="384M", accel="soft", nets=["none"], env={"FROM": "vm"}) as vm:
        yield vm


def test_exec_relays_streams_and_status(vm: ostler.VM, cli: Cli) -> None:
    done = cli("exec", "-e", "A=b c", vm.name, "--", "sh", "-c", "echo $A; cat >&2; exit 3", stdin=b"typed")
    assert (done.stdout, done.stderr, done.returncode) == (b"b c\n", b"typed", 3)


@pytest.mark.parametrize(("program", "status"), [("no-such-program", 127), ("/etc/passwd", 126)])
def test_exec_of_what_cannot_be_run_is_as_a_shell_has_it(vm: ostler.VM, cli: Cli, program: str, status: int) -> None:
    done = cli("exec", vm.name, program)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == 1


def test_exec_command_that_dies_of_a_signal_is_128_and_its_number(vm: ostler.VM, cli: Cli) -> None:
    assert cli("exec", vm.name, "sh", "-c", "kill -9 $$").returncode == 137


def test_exec_passes_interrupts_on_to_the_command(vm: ostler.VM) -> None:
    script = "trap 'echo caught; exit 42' INT; echo ready; while :; do sleep 0.1; done"
    with subprocess.Popen([*OSTLER, "exec", vm.name, "sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"caught\n"
    assert process.returncode == 42


def test_cp_brings_trees_both_ways(vm: ostler.VM, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "file").write_bytes(os.urandom(100_000))
    assert cli("cp", "in", f"{vm.name}:/tmp/tree", cwd=tmp_path).returncode == 0
    assert cli("cp", f"{vm.name}:/tmp/tree", "out", cwd=tmp_path).returncode == 0
    assert (tmp_path / "out/deep/file").read_bytes() == (tmp_path / "in/deep/file").read_bytes()
    assert cli("cp", "in", "out", cwd=tmp_path).returncode == 2


def test_inspect_stats_and_ps_say_what_runs(vm: ostler.VM, cli: Cli) -> None:
    known = json.loads(cli("inspect", vm.name).stdout)
    assert (known["image"], known["state"], known["spec"]["memory"]) == ("debian", "running", 384 << 20)
    stats = json.loads(cli("stats", "--json", vm.name).stdout)[vm.name]
    assert stats["vcpus"][0]["cpu_time_ns"] > 10**8
    assert 0 < stats["memory"]["touched_bytes"] <= 384 << 20
    assert vm.name.encode() in cli("ps", "-q").stdout.split()


def test_run_gives_status_streams_environment_and_input(vm: ostler.VM) -> None:
    done = vm.run(["sh", "-c", "echo $FROM; cat; echo bad >&2; exit 4"], input="in")
    assert (done.returncode, done.stdout, done.stderr) == (4, b"vm\nin", b"bad\n")


def test_run_errors_have_types(vm: ostler.VM) -> None:
    with pytest.raises(CommandFailed, match="ended with status 1"):
        vm.run(["false"], check=True)
    with pytest.raises(CommandNotFound):
        vm.run(["no-such-program"])
    with pytest.raises(CommandTimeout):
        vm.run(["sleep", "100"], timeout_s=0.2)


def test_files_are_written_and_read(vm: ostler.VM, tmp_path: Path) -> None:
    vm.write("/tmp/a b", "text\n")
    assert vm.read("/tmp/a b") == b"text\n"
    vm.get("/tmp/a b", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"text\n"


def test_popen_talks_to_a_command(vm: ostler.VM) -> None:
    with vm.popen(["cat"]) as process:
        process.stdin.write(b"abc")
        assert process.stdout.read(3) == b"abc"
        process.stdin.close()
        assert process.wait() == 0


def test_paused_guest_uses_no_processor_and_goes_on(vm: ostler.VM) -> None:
    with vm.paused():
        before = vm.stats()["vcpus"][0]["run_ns"]
        assert guests.summary(runtime.find(vm.name)).state == "paused"
        time.sleep(0.3)
        # What it takes the thread to fall asleep may come after the first look.
        assert vm.stats()["vcpus"][0]["run_ns"] - before < 10_000_000
        with pytest.raises(GuestPaused):
            vm.run(["true"])
    assert vm.run(["echo", "on"]).text == "on\n"


def test_events_are_seen_as_they_happen(vm: ostler.VM) -> None:
    with vm.events(timeout_s=WAIT_S) as events:
        vm.pause()
        vm.resume()
        assert [next(events)["event"] for _ in range(2)] == ["paused", "resumed"]


def test_console_is_read_and_expected(vm: ostler.VM) -> None:
    with vm.console() as console:
        vm.run(["sh", "-c", "echo moon-$((6*7)) >/dev/console"])
        assert console.expect(r"moon-(\d+)", timeout_s=WAIT_S).group(1) == b"42"


def test_logs_of_a_guest_without_a_command_are_its_consoles(vm: ostler.VM, cli: Cli) -> None:
    vm.run(["sh", "-c", "echo said-on-console >/dev/console"])
    assert b"said-on-console" in cli("logs", vm.name).stdout


def test_guest_that_ends_in_mid_command_says_so(vm: ostler.VM) -> None:
    """The last of these tests: the guest is gone after it."""
    with pytest.raises(GuestGone, match="ended before the command did"):
        vm.run(["sh", "-c", "echo o >/proc/sysrq-trigger; sleep 1000"])
    assert vm.wait(timeout_s=WAIT_S)["reason"] == "power-off"
    assert lines(vm.name) == {}

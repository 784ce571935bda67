"""Helper programs: real ones, that come up, die, refuse to die, and lose their parent."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from ostler.errors import HostError
from ostler.host.helpers import Helper, find_program
from ostler.vmm.loop import EventLoop


def ready_pipe() -> tuple[int, int]:
    return os.pipe()


def test_ready_helper_is_stopped_and_reaped() -> None:
    reading, writing = ready_pipe()
    with Helper("sleeper", ["sh", "-c", "echo ready; exec sleep 600"], stdout=writing) as helper:
        os.close(writing)
        said = helper.wait_for(reading)
        pid = helper.pid
    os.close(reading)

    assert said == b"ready\n"
    assert not Path(f"/proc/{pid}").exists()


def test_helper_that_ignores_being_asked_is_killed() -> None:
    reading, writing = ready_pipe()
    helper = Helper("stubborn", ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 600; done"], stdout=writing)
    os.close(writing)
    helper.wait_for(reading)
    helper.stop(timeout_s=0.05)
    os.close(reading)

    assert not Path(f"/proc/{helper.pid}").exists()


def test_helper_that_dies_at_start_is_reported_with_its_last_words() -> None:
    reading, writing = ready_pipe()
    with Helper("broken", ["sh", "-c", "echo no such port >&2; exit 7"], stdout=writing) as helper:
        os.close(writing)
        with pytest.raises(HostError, match=r"^broken: ended with status 7: no such port$"):
            helper.wait_for(reading)
    os.close(reading)


def test_helper_that_says_nothing_in_time_is_stopped() -> None:
    reading, writing = ready_pipe()
    helper = Helper("silent", ["sleep", "600"], stdout=writing)
    os.close(writing)
    with pytest.raises(HostError, match=r"silent: not ready after 0\.05 s"):
        helper.wait_for(reading, timeout_s=0.05)
    os.close(reading)

    assert not helper.alive


def test_death_is_announced_on_the_loop() -> None:
    with EventLoop() as loop, Helper("mortal", ["sh", "-c", "echo bye >&2; kill -9 $$"]) as helper:
        reports: list[str] = []

        def died(dead: Helper) -> None:
            reports.append(dead.obituary())
            loop.stop()

        helper.watch(loop, died)
        loop.run()

    assert reports == ["mortal: killed by SIGKILL: bye"]


def test_talkative_helper_is_not_blocked_and_only_its_end_is_kept() -> None:
    script = "import sys\nfor n in range(50000):\n try: print(n, file=sys.stderr)\n except BlockingIOError: pass\n"
    with Helper("talker", [sys.executable, "-c", script]) as helper:
        status = helper._process.wait(60)
        said = helper.said()

    assert status == 0
    assert 0 < len(said) <= 4096


def test_program_that_cannot_be_started_is_one_line(tmp_path: Path) -> None:
    plain = tmp_path / "not-executable"
    plain.write_text("")

    reading, writing = ready_pipe()
    os.close(writing)
    with Helper("odd", [str(plain)]) as helper, pytest.raises(HostError, match=r"^odd: ended with status 12[67]"):
        helper.wait_for(reading)
    os.close(reading)


def test_missing_program_names_the_package_and_the_way_around() -> None:
    with pytest.raises(HostError, match=r"^ostler-none: not found .*: install the package foo, or use bar$"):
        find_program("ostler-none", package="foo", instead="use bar")


def test_helper_dies_with_the_process_that_started_it() -> None:
    script = (
        "import os, signal, sys; from ostler.host.helpers import Helper\n"
        "h = Helper('orphan', ['sleep', '600']); print(h.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False)
    try:
        # It may still be on its way; a pidfd says when it is gone.
        fd = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    gone = poll.poll(20_000)
    os.close(fd)

    assert gone

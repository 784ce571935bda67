"""`python -m ostler.client.keeper FOLDER`: stays with the command of a detached guest.

Somebody has to hold the agent's connection, keep what the command says, and end the guest with the command's status
when it is over: this process does, in a session of its own. It reads the job from standard input and says on standard
output that the command runs, or why not. When the guest ends first, there is nothing left to do. When it begins anew,
by a policy (docs/faults.md), its agent is given its settings and the command is started again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ostler.agent.client import AgentClient
from ostler.agent.process import Process
from ostler.client import guests
from ostler.client.job import Job
from ostler.client.running import BOOT_TIMEOUT_S, network_of
from ostler.control.logfile import RotatedLog
from ostler.control.runtime import VMM_LOG, Entry
from ostler.control.wire import pack_error, unpack_error
from ostler.errors import AgentError, HostError, KeptAlready, OstlerError

CHUNK_BYTES = 64 << 10
LOCK = "keeper.lock"


def start(entry: Entry, job: Job, settings: Mapping[str, Any], *, again: bool = False) -> None:
    """Start a keeper; returns when the command runs. Raises what the agent refused it with.

    `settings` are the plan's, for a guest that begins anew.

    A guest has one keeper at most. With `again` it is fine that there is one: whoever started it was killed meanwhile.
    """
    with (entry.path / VMM_LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ostler.client.keeper", str(entry.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        process.stdin.write(json.dumps({"job": dataclasses.asdict(job), "settings": dict(settings)}).encode())
        process.stdin.close()
        said = process.stdout.read()
    try:
        message = json.loads(said)
    except ValueError:
        raise HostError(f"guest {entry.name!r}: nobody stays with its command; see {entry.path / VMM_LOG}") from None
    if "error" in message:
        process.wait()
        error = unpack_error(message["error"])
        if again and isinstance(error, KeptAlready):
            return
        raise error
    # It is meant to outlive this process; nobody here waits for it.
    process.returncode = 0


def keep(entry: Entry, job: Job, settings: Mapping[str, Any]) -> None:
    """Run the job to its end, and end the guest with its status."""
    try:
        _be_the_only_one(entry)
        resets = _resets(entry)
        agent = _reach(entry, timeout_s=30)
        process = _start(agent, job)
    except OstlerError as error:
        _say({"error": pack_error(error)})
        return
    _say({"ready": True})
    reading, writing = os.pipe()
    logger = threading.Thread(target=_write_log, args=(RotatedLog(entry.output_log), reading))
    logger.start()
    try:
        while (returncode := _stay(agent, process, writing)) is None:
            # The guest has ended, or its agent has: then the guest is what somebody will look at.
            if (now := _resets(entry)) == resets:
                return
            resets = now
            agent = _reach(entry, timeout_s=BOOT_TIMEOUT_S)
            agent.configure(**network_of(entry)[0], **settings)
            process = _start(agent, job)
    except OstlerError:
        return
    finally:
        os.close(writing)
        logger.join()
    _end_guest(entry, returncode)


def _reach(entry: Entry, *, timeout_s: float) -> AgentClient:
    return AgentClient.connect(entry.vsock_socket, timeout_s=timeout_s, alive=entry.is_running)


def _start(agent: AgentClient, job: Job) -> Process:
    return agent.start(job.argv, env=job.env, cwd=job.cwd, user=job.user)


def _stay(agent: AgentClient, process: Process, output: int) -> int | None:
    """With the command to its end; None where its guest, or the agent, was gone before."""
    try:
        with agent, process:
            return process.relay(None, output, output)
    except AgentError:
        return None


def _resets(entry: Entry) -> int:
    """How often the guest has begun anew. Raises OstlerError where it has ended."""
    # A VM process of an older Ostler's does not say, and has none.
    return int(guests.request(entry, "status", timeout_s=guests.LOOK_TIMEOUT_S).get("resets", 0))


def _be_the_only_one(entry: Entry) -> None:
    """Take the keeper's lock, for as long as this process lives. Raises KeptAlready."""
    fd = os.open(entry.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise KeptAlready(f"guest {entry.name!r}: its command runs already, and somebody stays with it") from None


def _end_guest(entry: Entry, returncode: int) -> None:
    verdict = guests.Verdict(returncode if returncode >= 0 else 128 - returncode, "command ended")
    with contextlib.suppress(OstlerError):
        if entry.facts.get("durable"):
            guests.stop(entry, verdict=verdict)
        else:
            guests.kill(entry, verdict=verdict)


def _write_log(log: RotatedLog, reading: int) -> None:
    with open(reading, "rb", buffering=0) as stream:
        while data := stream.read(CHUNK_BYTES):
            log.write(data)
    log.close()


def _say(message: dict[str, object]) -> None:
    """Tell the launcher, once: standard output is closed to say that this was all."""
    sys.stdout.write(json.dumps(message))
    sys.stdout.flush()
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    os.close(nothing)


def main() -> None:
    """Read the job and stay with it."""
    folder = Path(sys.argv[1])
    said = json.load(sys.stdin)
    values = said["job"]
    job = Job(tuple(values["argv"]), dict(values["env"]), values["cwd"], values["user"])
    keep(Entry(folder.name, folder), job, said["settings"])


if __name__ == "__main__":
    main()

"""Starting a VM process: a session of its own, registered in the runtime folder, ready when this returns.

The launcher makes the entry and takes its lock; the new process inherits the lock, reads its specification from the
entry, and says on a pipe that it is ready, or in one line why not. Until then nothing survives a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from io import FileIO
from typing import Any

from ostler.control import pool, runtime
from ostler.control.runtime import Entry
from ostler.control.wire import unpack_error
from ostler.errors import HostError

SHOWN_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Launched:
    """A running guest. Closing `leash_fd` ends it, if it was started on a leash."""

    entry: Entry
    process: pool.VmProcess
    leash_fd: int | None


def launch(
    name: str, spec: str, *, facts: dict[str, Any], leash: bool = False, origin: dict[str, Any] | None = None
) -> Launched:
    """Start a guest from its specification (JSON) and wait until its machine is loaded.

    With `leash` the guest ends when this process does, however it does: it holds the writing end of a pipe. `origin` is
    what `ostler.vmm.origin` reads: where a guest that is not booted goes on from.

    Raises BadRequest for a taken name, whatever the VM process refused its specification with, HostError.
    """
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as always:
        claim = always.enter_context(runtime.claim(name, facts, spec, origin))
        undo.callback(_forget, claim.entry)
        ready, ready_child = _pipe(always)
        names, inherited = ["lock", "ready"], [claim.lock_fd, ready_child.fileno()]
        holder = None
        if leash:
            leash_child, holder = _pipe(always)
            names.append("leash")
            inherited.append(leash_child.fileno())
        options = [each for name, fd in zip(names, inherited, strict=True) for each in (f"--{name}", str(fd))]
        log = always.enter_context((claim.entry.path / runtime.VMM_LOG).open("ab"))
        process: pool.VmProcess | None = pool.request(
            {
                "folder": str(claim.entry.path),
                "environment": dict(os.environ),
                "descriptors": [*names, "log"],
                "spec": spec,
                "origin": origin,
            },
            [*inherited, log.fileno()],
        )
        if process is None:
            process = subprocess.Popen(
                [sys.executable, "-m", "ostler.vmm", str(claim.entry.path), *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=inherited,
            )  # fmt: skip
            if origin is not None:
                # For the next one: what goes on from somewhere is what must be quick.
                pool.start()
        undo.callback(_kill, process)
        ready_child.close()
        _wait_until_ready(claim.entry, process, ready.read())
        leash_fd = os.dup(holder.fileno()) if holder else None
        undo.pop_all()
    return Launched(claim.entry, process, leash_fd)


def _pipe(owner: contextlib.ExitStack) -> tuple[FileIO, FileIO]:
    """Reading and writing end, closed with `owner`."""
    read, write = os.pipe()
    return owner.enter_context(FileIO(read, "rb")), owner.enter_context(FileIO(write, "wb"))


def _kill(process: pool.VmProcess) -> None:
    process.kill()
    process.wait()


def _forget(entry: Entry) -> None:
    with contextlib.suppress(Exception):
        runtime.forget_own(entry)


def _wait_until_ready(entry: Entry, process: pool.VmProcess, said: bytes) -> None:
    try:
        message = json.loads(said)
    except ValueError:
        status = process.wait()
        log = (entry.path / runtime.VMM_LOG).read_bytes()[-SHOWN_BYTES:].decode(errors="replace").strip()
        last = log.splitlines()[-1] if log else "it said nothing"
        raise HostError(
            f"VM process of {entry.name!r}: ended with status {status} before it was ready: {last}"
        ) from None
    if "error" in message:
        raise unpack_error(message["error"])

"""One guest as a process of its own: from its folder's specification to its end, behind the control socket.

The launcher (`ostler.control.launch`) has made the folder and holds out three descriptors: the folder's lock, which
lives as long as this process; `ready`, which takes one line of JSON, that the guest runs or why it cannot; and perhaps
a leash, a pipe whose other end closes when the launcher is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ostler.config import GuestSpec
from ostler.control import runtime
from ostler.control.wire import Message, pack_error
from ostler.errors import HostError, OstlerError
from ostler.machine.networks import merged_settings
from ostler.vmm.calls import CallService
from ostler.vmm.injection import serve_faults
from ostler.vmm.memory_service import MemoryService
from ostler.vmm.prepared import make
from ostler.vmm.run import GuestProcess, command_line, read_material
from ostler.vmm.server import ControlServer
from ostler.vmm.service import GuestService, describe
from ostler.vmm.snapshots import SnapshotService

if TYPE_CHECKING:
    from ostler.vmm.origin import Origin
    from ostler.vmm.prepared import Prepared


class Readiness:
    """The launcher's pipe: takes one message, then it is closed."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        if fd is not None:
            os.set_inheritable(fd, False)

    def say(self, message: Message) -> bool:
        """Whether the launcher still waited for it."""
        if self._fd is None:
            return False
        fd, self._fd = self._fd, None
        with contextlib.suppress(BrokenPipeError):
            os.write(fd, json.dumps(message).encode())
        os.close(fd)
        return True


def serve(
    folder: Path, *, lock: int | None = None, ready: int | None = None, leash: int | None = None,
    prepared: Prepared | None = None,
) -> int:  # fmt: skip
    """Run the guest described in `folder` to its end; returns the exit status of this process.

    `prepared` is one that may be it, and is closed here.
    """
    entry = runtime.Entry(folder.name, folder)
    readiness = Readiness(ready)
    for fd in (lock, leash):
        if fd is not None:
            os.set_inheritable(fd, False)
    (folder / runtime.PID).write_text(f"{os.getpid()}\n")
    try:
        end = _run(entry, readiness, leash, prepared)
    except OstlerError as error:
        if readiness.say({"error": pack_error(error)}):
            return error.exit_status
        end = {"status": error.exit_status, "reason": type(error).__name__, "message": str(error)}
    except Exception as error:
        traceback.print_exc()
        text = f"internal error: {type(error).__name__}: {error} (a bug of Ostler's)"
        if readiness.say({"error": pack_error(HostError(text))}):
            return 1
        end = {"status": 1, "reason": "internal error", "message": text}
    leave(entry, end)
    return int(end["status"])


def leave(entry: runtime.Entry, end: Message) -> None:
    """Record the end, or leave nothing: as the launcher wanted it."""
    with contextlib.suppress(OSError, OstlerError):
        if entry.facts.get("remove", True):
            runtime.forget_own(entry)
        else:
            runtime.write_end(entry, {**end, "ended": time.time()})


def _run(entry: runtime.Entry, readiness: Readiness, leash: int | None, prepared: Prepared | None) -> Message:
    spec = GuestSpec.model_validate_json((entry.path / runtime.SPEC).read_text())
    with contextlib.ExitStack() as stack:
        if prepared is not None:
            stack.enter_context(prepared)
        if prepared is not None and prepared.is_for(entry):
            origin: Origin | None = prepared.origin
            made = prepared.become(entry)
        else:
            origin, prepared = _origin(entry), None
            made = make(spec, entry.path, stack, beginning=origin)
        process = made.process
        server = stack.enter_context(listen(entry, process))
        facts = {
            "name": entry.name,
            "accelerator": made.accelerator,
            "masked_features": list(process.machine.masked_features),
            "spec": json.loads(spec.model_dump_json()),
            # As the agent's `configure` takes it.
            "network": merged_settings(process.networks),
            "troubles": process.early_troubles,
        }
        service = GuestService(process, server, made.hub, facts, entry)
        server.service = service
        stack.callback(service.close)
        process.report = service.report
        stack.enter_context(SnapshotService(process, service, entry, base=origin.base if origin else None))
        stack.enter_context(MemoryService(process, service))
        serve_faults(process, service)
        CallService(process, service, entry.name)
        if origin is None:
            _boot(process, spec)
        else:
            if prepared is None:
                origin.complete(process.machine.memory)
                process.restore_state(origin.saved)
            process.machine.begin_generation()
            # It still uses the addresses of the guest it was; its agent can be told those that belong to this one.
            facts["macs"] = [
                {"mac": card.mac.hex(":"), "new_mac": card.own_mac.hex(":")}
                for card in (network.device for network in process.networks)
                if card.mac != card.own_mac
            ]
        handle_signals(process)
        if leash is not None:
            process.loop.add_reader(leash, process.quit)
        # Nobody is told that the guest is ready before the loop can answer.
        process.loop.call_soon(lambda: _announce_start(readiness, service))
        return _to_the_end(process, service, readiness)


def _boot(process: GuestProcess, spec: GuestSpec) -> None:
    kernel, initrd = read_material(spec)
    process.machine.load(kernel, initrd=initrd, cmdline=command_line(spec.append, kernel))


def _origin(entry: runtime.Entry) -> Origin | None:
    """Where a guest that is not booted goes on from. Many modules, and a boot needs none of them."""
    if not (entry.path / runtime.ORIGIN).exists():
        return None
    from ostler.vmm.origin import Origin

    return Origin.of(entry, report=_say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the VM process's own log


def _to_the_end(process: GuestProcess, service: GuestService, readiness: Readiness) -> Message:
    try:
        ended = process.run()
        # A guest of a few instructions is over before the loop has made its first call.
        readiness.say({"ready": True})
        process.judge(ended)
        end = {**describe(ended, killed=service.killed), **service.verdict}
    except OstlerError as error:
        end = {"status": error.exit_status, **pack_error(error)}
        end["reason"] = end.pop("kind")
    service.ended(end)
    return end


def _announce_start(readiness: Readiness, service: GuestService) -> None:
    readiness.say({"ready": True})
    service.announce("started")


def listen(entry: runtime.Entry, process: GuestProcess) -> ControlServer:
    """The control socket. Raises HostError."""
    try:
        return ControlServer(entry.control_socket, process.loop, entry.name)
    except OSError as error:
        raise HostError(f"control socket {entry.control_socket}: {error.strerror or error}") from error


def handle_signals(process: GuestProcess) -> None:
    """SIGTERM and SIGQUIT end the guest; what a terminal sends is not for it."""

    def quit_soon(_number: int, _frame: FrameType | None) -> None:
        process.loop.call_soon(process.quit)

    for each in (signal.SIGTERM, signal.SIGQUIT):
        signal.signal(each, quit_soon)
    # A terminal's keys are for whoever is attached to the guest, not for the guest's process.
    for each in (signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    sys.stdout.flush()

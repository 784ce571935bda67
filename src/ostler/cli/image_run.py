"""`ostler run IMAGE`: a guest of an image, attached to this terminal or by itself."""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ostler.cli import console, progress, relay, terminal, troubles
from ostler.cli.phases import Phases
from ostler.client import keeper, plan, warm
from ostler.control.connection import Connection
from ostler.errors import AgentError, BadRequest, GuestGone

if TYPE_CHECKING:
    from ostler.client.plan import Plan
    from ostler.client.running import RunningGuest
    from ostler.config import GuestRequest


def run_attached(request: GuestRequest, *, tty: bool | None, timing: bool) -> int:
    """Run the image's command, or the one given, and end the guest with it; the exit status.

    Without any command: a shell on a terminal, or the console of an image with an init of its own.
    """
    phases = Phases()
    with progress.shown() as shown:
        wanted = plan.make(request, progress=shown)
    phases.end("image")
    if not wanted.job.argv and wanted.boot == "agent":
        if not os.isatty(0):
            raise BadRequest(f"image {request.image!r}: has no command of its own, expected -- COMMAND")
        wanted = dataclasses.replace(wanted, job=dataclasses.replace(wanted.job, argv=plan.SHELL))
    with terminal.orderly_signals():
        with warm.start(wanted, leash=True, remove=True, cold=request.cold) as guest:
            phases.end("start")
            status = _serve(guest, wanted, phases, tty=tty)
        phases.end("end")
    if timing:
        sys.stderr.write(phases.table() + "\n")
    return status


def _serve(guest: RunningGuest, wanted: Plan, phases: Phases, *, tty: bool | None) -> int:
    if not wanted.job.argv:
        with Connection.to(guest.entry) as connection:
            attached = connection.console(backlog_bytes=1 << 20)
        with attached.socket:
            console.attach(attached.socket, attached.backlog + attached.first)
        return 0
    if sys.stderr.isatty():
        with progress.shown() as shown:
            shown("starting the guest")
            guest.configure()
    else:
        guest.configure()
    troubles.tell(guest.troubles)
    phases.end("boot")
    try:
        with troubles.shown(guest.entry):
            status = relay.run(guest.agent, wanted.job, tty=tty)
    except AgentError as error:
        explained = guest.explain(error)
        # Whoever types `poweroff` into a shell gets what was asked for.
        if isinstance(explained, GuestGone) and os.isatty(0) and guest.ended_in_order():
            return 0
        raise explained from error
    phases.end("command")
    return status


def run_detached(request: GuestRequest, *, remove: bool) -> None:
    """Start the guest, wait until its agent answers and its command runs, print its name and leave it alone.

    A guest that was given no command, and whose image has none that works without a terminal, runs until it is stopped.
    """
    with progress.shown() as shown, ExitStack() as undo:
        wanted = plan.make(request, progress=shown)
        undo.enter_context(terminal.orderly_signals())
        guest = undo.enter_context(warm.start(wanted, leash=False, remove=remove, cold=request.cold))
        if wanted.boot == "agent" or wanted.job.argv:
            shown("waiting for the guest")
            guest.configure()
            troubles.tell(guest.troubles)
        if wanted.job.argv and wanted.is_service:
            keeper.start(guest.entry, wanted.job)
        guest.release()
        undo.pop_all()
    sys.stdout.write(f"{guest.entry.name}\n")

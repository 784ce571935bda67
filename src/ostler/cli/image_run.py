"""`ostler run IMAGE`: a guest of an image, attached to this terminal or by itself."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ostler.cli import attached, progress, terminal, troubles
from ostler.cli.phases import Phases
from ostler.client import keeper, plan, ticket, warm
from ostler.errors import BadRequest
from ostler.images import store
from ostler.images.initrd import agent_program
from ostler.snapshot.manifest import MANIFEST

if TYPE_CHECKING:
    from ostler.client.plan import Plan
    from ostler.config import GuestRequest


def run_attached(
    request: GuestRequest, *, tty: bool | None, timing: bool, planned: Callable[[Plan], None] | None = None
) -> int:
    """Run the image's command, or the one given, and end the guest with it; the exit status.

    Without any command: a shell on a terminal, or the console of an image with an init of its own. `planned` is told,
    at the end, what the guest was made from.
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
            status = attached.serve(guest, phases, tty=tty)
        phases.end("end")
    if planned is not None:
        planned(wanted)
    if timing:
        sys.stderr.write(phases.table() + "\n")
    return status


def leave_ticket(words: Mapping[str, object], command: Sequence[str], wanted: Plan) -> None:
    """Have the next plain run of the image begin at once, if there is a booted guest to begin with."""
    found = warm.cached(wanted)
    if found is not None and wanted.spec.initrd is not None:
        as_saved, folder = found
        image = str(wanted.facts["image"])
        files = [*store.files_of(image), wanted.spec.kernel, wanted.spec.initrd, agent_program(), folder / MANIFEST]
        ticket.leave(words, command, as_saved, folder=folder, files=files)


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
            keeper.start(guest.entry, wanted.job, wanted.settings)
        guest.release()
        undo.pop_all()
    sys.stdout.write(f"{guest.entry.name}\n")

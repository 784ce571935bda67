"""A guest and the terminal it was started from, until its command ends."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ostler.cli import relay, troubles
from ostler.control.connection import Connection
from ostler.errors import AgentError, GuestGone

if TYPE_CHECKING:
    from ostler.cli.phases import Phases
    from ostler.client.running import RunningGuest


def serve(guest: RunningGuest, phases: Phases, *, tty: bool | None) -> int:
    """Run the job of the guest's plan with this process's streams; the exit status. Without one: its console."""
    wanted = guest.plan
    if not wanted.job.argv:
        from ostler.cli import console

        with Connection.to(guest.entry) as connection:
            attached = connection.console(backlog_bytes=1 << 20)
        with attached.socket:
            console.attach(attached.socket, attached.backlog + attached.first)
        return 0
    if sys.stderr.isatty():
        from ostler.cli import progress

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

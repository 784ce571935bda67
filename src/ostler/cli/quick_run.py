"""`ostler run IMAGE -- COMMAND…` where a ticket says what guest that is: started by the pool, with few modules read.

The same as `image_run.run_attached` does. Whatever is not as it should be is that one's to understand and to complain
about, as long as no guest has been started.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from ostler.cli import attached, terminal
from ostler.cli.phases import Phases
from ostler.client import running, ticket
from ostler.client.restored import RestoredGuest
from ostler.errors import OstlerError

if TYPE_CHECKING:
    from ostler.client.plan import Plan
    from ostler.control.launch import Launched


def run(words: Mapping[str, object], command: Sequence[str]) -> int | None:
    """Run the command; its exit status, or None where it has to go the long way."""
    brief = ticket.find(words, command)
    if brief is None:
        return None
    plan = cast("Plan", brief)
    with terminal.orderly_signals():
        launched = _launch(plan, str(brief.folder))
        if launched is None:
            return None
        with running.hold(launched, lambda: RestoredGuest(launched, plan)) as guest:
            return attached.serve(guest, Phases(), tty=None)


def _launch(plan: Plan, folder: str) -> Launched | None:
    try:
        return running.launch_plan(plan, leash=True, remove=True, origin={"snapshot": folder})
    except OstlerError:
        return None

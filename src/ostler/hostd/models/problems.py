"""Why something was not done."""

from __future__ import annotations

from ostler.hostd.models.base import View


class Refusal(View):
    """What admission refused: `asked` is more than `left` of `capacity`, over-commitment included."""

    resource: str
    """`memory`, `cpu` (thousandths of a processor), `disk`, `disk_bandwidth`, `network_bandwidth`, or what only one
    guest can have: `port tcp/8080`, `address 10.0.0.2`, `disk /srv/data.img`, `persist web`."""
    asked: int
    left: int
    capacity: int
    holder: str | None = None
    """Who has it, of what only one can have."""


class Problem(View):
    """Why something was not done: the body of every answer of 400 and above."""

    status: int
    kind: str
    """A class of `ostler.errors`, or `Unauthorized`, `Forbidden`, `NotFound`, `TooLarge`, `NoSpace`, `Internal`."""
    message: str
    """One line: what failed, the value, what was expected."""
    refusal: Refusal | None = None
    """Of admission only."""

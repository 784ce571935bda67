"""`ostler inject`, and `ostler run --on FAULT=POLICY`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ostler.cli.guests import Running
from ostler.cli.output import Json, print_json


def policies(given: list[str] | None) -> dict[str, str]:
    """Fields of a request, of texts such as panic=reset. Raises BadRequest."""
    from ostler.config.defaults import POLICIES
    from ostler.errors import BadRequest

    found = {}
    for each in given or ():
        name, _, policy = each.partition("=")
        fault = next((fault for fault in POLICIES if fault.value == name), None)
        if fault is None:
            raise BadRequest(f"--on {each!r}: expected FAULT=POLICY, FAULT one of "
                             f"{', '.join(fault.value for fault in POLICIES)}")  # fmt: skip
        found[f"on_{fault.name.lower()}"] = policy
    return found


def command(  # noqa: PLR0913 - one parameter per option
    name: Running,
    fault: Annotated[
        str, typer.Argument(metavar="FAULT", help="panic, triple-fault, hang, nmi, disk-error, no-space, backend-lost, "
                                                  "memory-error, clear")
    ],
    device: Annotated[str | None, typer.Option(metavar="NAME", help="disk0, net0, share0, …")] = None,
    requests: Annotated[str | None, typer.Option(metavar="KINDS", help="Of a disk: read,write,flush.")] = None,
    count: Annotated[int | None, typer.Option(min=1, metavar="N", help="So many requests fail; 1.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, max=3600, metavar="S", help="How long it hangs; 60.")] = None,
    vcpu: Annotated[int | None, typer.Option(min=0, metavar="N", help="Which processor; 0.")] = None,
    address: Annotated[str | None, typer.Option(metavar="GPA", help="Where memory goes bad; 0.")] = None,
    as_json: Json = False,  # noqa: FBT002
) -> None:  # fmt: skip
    """Make something go wrong in a guest on purpose; its policies say what comes of it, its events that it came.

    [bold]Examples:[/bold]  ostler inject web hang     ostler inject web disk-error --device disk0 --count 3
    """
    from ostler.client import guests
    from ostler.control import runtime
    from ostler.errors import BadRequest

    options: dict[str, Any] = {"device": device, "count": count, "seconds": seconds, "vcpu": vcpu}
    options["requests"] = requests.split(",") if requests is not None else None
    if address is not None:
        try:
            options["address"] = int(address, 0)
        except ValueError as error:
            raise BadRequest(f"address {address!r}: expected a number such as 0x1000") from error
    given = {key: value for key, value in options.items() if value is not None}
    answer = guests.request(runtime.find(name), "inject", fault=fault, **given)
    if as_json:
        print_json(answer)

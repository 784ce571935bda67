"""`ostler host …`: the host service, and what is asked of it on its own host."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ostler.cli.output import Json, print_json, print_table, size

if TYPE_CHECKING:
    from ostler.api.client import Client

app = typer.Typer(help="A service that starts guests with this host and watches them.", no_args_is_help=True)
token_app = typer.Typer(help="Tokens for the REST API.", no_args_is_help=True)
app.add_typer(token_app, name="token")
EXTRA = (
    "alembic",
    "argon2",
    "fastapi",
    "httptools",
    "httpx",
    "prometheus_client",
    "sqlalchemy",
    "uvicorn",
    "websockets",
)
StatePath = Annotated[
    Path | None, typer.Option("--state", metavar="FOLDER", help="Where it keeps what it knows.", show_default=False)
]


def need_extra() -> None:
    """Raise BadRequest, which says what to install, where the extra is not there."""
    from importlib.util import find_spec

    from ostler.errors import BadRequest

    if missing := [name for name in EXTRA if find_spec(name) is None]:
        raise BadRequest(f"host: {missing[0]} is not installed; expected `pip install 'ostler[host]'`")


@app.command()
def serve(
    state: StatePath = None,
    guests: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Guests' definitions, a TOML file each; they win.")
    ] = None,
    socket: Annotated[Path | None, typer.Option(metavar="PATH", help="The UNIX socket.", show_default=False)] = None,
    listen: Annotated[
        list[str] | None, typer.Option(metavar="ADDRESS:PORT", help="TCP, too; with TLS, or on a loopback address.")
    ] = None,
    cert: Annotated[Path | None, typer.Option("--tls-cert", metavar="FILE", help="The service's, PEM.")] = None,
    key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="Its key, PEM.")] = None,
    authority: Annotated[
        Path | None, typer.Option("--tls-ca", metavar="FILE", help="Whoever signed clients' certificates, PEM.")
    ] = None,
    stop_guests: Annotated[  # noqa: FBT002
        bool, typer.Option("--stop-guests", help="Stop guests, in reverse order, when the service is stopped.")
    ] = False,
) -> None:
    """Run the host service until SIGTERM or Ctrl-C. Guests outlive it, and are found again.

    [bold]Examples:[/bold]

      ostler host serve --guests /etc/ostler/guests

      ostler host serve --listen 127.0.0.1:8420
    """
    need_extra()
    from ostler.api import dashboard, places, running
    from ostler.api.serving import Tls
    from ostler.errors import BadRequest

    if (cert is None) != (key is None) or (authority is not None and cert is None):
        raise BadRequest("TLS: expected --tls-cert and --tls-key together, and --tls-ca beside them only")
    options = running.Options(
        state=(state or places.default_state()).absolute(), socket=(socket or places.default_socket()).absolute(),
        listen=tuple(listen or ()), tls=Tls(cert, key, authority) if cert is not None and key is not None else None,
        guests=guests.absolute() if guests is not None else None, stop_guests=stop_guests,
    )  # fmt: skip
    if listen and not dashboard.is_built():
        _tell(dashboard.NOT_BUILT)
    running.run(options, say=_tell, extend=dashboard.add)


@app.command()
def recover(state: StatePath = None) -> None:
    """Put a damaged database aside, and go on from its last whole copy. Guests are not touched."""
    need_extra()
    from ostler.api import places
    from ostler.hostd import database

    with database.StateFolder((state or places.default_state()).absolute()) as folder:
        _tell(database.recover(folder))


@app.command()
def define(
    files: Annotated[list[Path], typer.Argument(metavar="TOML", help="Guests' descriptions.")],
    replace: Annotated[bool, typer.Option("--replace", help="Define anew what is defined already.")] = False,  # noqa: FBT002
    start: Annotated[bool, typer.Option("--start", help="And start them.")] = False,  # noqa: FBT002
) -> None:
    """Define guests; those they depend on first.

    [bold]Example:[/bold]  ostler host define db.toml web.toml --start
    """
    from ostler.hostd import definition

    found = [definition.read(path, name=None) for path in files]
    with reach() as client:
        for each in found:
            body = {"definition": each.table, "start": start}
            if replace:
                client.call("PUT", f"/v1/guests/{each.name}", body=body)
            else:
                client.post("/v1/guests", body)
            sys.stdout.write(f"{each.name}\n")


@app.command()
def up() -> None:
    """Start all guests that start with the host and do not run; wait until they are ready."""
    with reach() as client:
        _wait_for_all(client, client.post("/v1/host/up")["jobs"])


@app.command()
def down() -> None:
    """Stop all guests that are defined, each before what it depends on."""
    with reach() as client:
        _wait_for_all(client, client.post("/v1/host/down")["jobs"])


@app.command()
def show(as_json: Json = False) -> None:  # noqa: FBT002
    """What the host is, has, and has promised."""
    with reach() as client:
        found = client.get("/v1/host")
    if as_json:
        print_json(found)
        return
    facts = found["inventory"]
    cpu, memory = facts["cpu"], facts["memory"]
    sys.stdout.write(
        f"{facts['hostname']}: {cpu['count']} processors ({cpu['model']}), {size(memory['size_bytes'])} memory, "
        f"Linux {facts['kernel']}\n"
    )
    rows = [
        (name, _amount(name, each["capacity"]), _amount(name, each["promised"]), _amount(name, each["left"]))
        for name, each in found["resources"].items()
    ]
    print_table(("RESOURCE", "CAPACITY", "PROMISED", "LEFT"), rows)


@app.command()
def audit(count: Annotated[int, typer.Option("--tail", "-n", min=1, max=1000)] = 100) -> None:
    """Who changed what, newest last; a line of JSON each."""
    with reach() as client:
        for each in reversed(client.get("/v1/audit", limit=count)["entries"]):
            sys.stdout.write(json.dumps(each) + "\n")


@app.command()
def unit(
    name: Annotated[str, typer.Argument(metavar="host|guests", help="The service; or guests' end with the host's.")],
    user: Annotated[bool, typer.Option("--user", help="For a user's own systemd.")] = False,  # noqa: FBT002
) -> None:
    """Print a unit for systemd, which starts this installation of Ostler.

    [bold]Example:[/bold]  ostler host unit host >/etc/systemd/system/ostler-host.service
    """
    from ostler.errors import BadRequest
    from ostler.hostd import units

    if name not in units.UNITS:
        raise BadRequest(f"unit {name!r}: expected one of {', '.join(units.UNITS)}")
    sys.stdout.write(units.text(name, program(), user=user))


def program() -> str:
    """The whole path of the command that runs now."""
    beside = Path(sys.executable).parent / "ostler"
    started = Path(sys.argv[0])
    return str(started.absolute() if started.name == "ostler" and started.exists() else beside)


@token_app.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    role: Annotated[str, typer.Option(metavar="viewer|operator|admin")] = "viewer",
    days: Annotated[float | None, typer.Option(min=0, max=36_500, help="How long it is worth something.")] = None,
) -> None:
    """Make a token and print it: this once, the service keeps a hash."""
    body: dict[str, Any] = {"name": name, "role": role}
    if days is not None:
        body["expires_in_s"] = days * 86_400
    with reach() as client:
        sys.stdout.write(client.post("/v1/tokens", body)["token"] + "\n")


@token_app.command("ls")
def list_tokens(as_json: Json = False) -> None:  # noqa: FBT002
    """List tokens, without their secrets."""
    from ostler.cli.output import ago

    with reach() as client:
        found = client.get("/v1/tokens")["tokens"]
    if as_json:
        print_json(found)
        return
    rows = [(each["id"], each["name"], each["role"], ago(each["created"])) for each in found]
    print_table(("ID", "NAME", "ROLE", "AGE"), rows)


@token_app.command("rm")
def remove_token(identifiers: Annotated[list[str], typer.Argument(metavar="ID")]) -> None:
    """Make tokens worthless."""
    with reach() as client:
        for each in identifiers:
            client.delete(f"/v1/tokens/{each}")


def reach(url: str | None = None) -> Client:
    """A client of a service: the URL's, OSTLER_HOST's, else this user's own."""
    need_extra()
    import os

    from ostler.api.client import Client

    where = url or os.environ.get("OSTLER_HOST") or None
    ca, cert, key = (os.environ.get(f"OSTLER_HOST_{name}") for name in ("CA", "CERT", "KEY"))
    return Client(
        where, token=os.environ.get("OSTLER_TOKEN"), ca=Path(ca) if ca else None,
        certificate=(Path(cert), Path(key)) if cert and key else None,
    )  # fmt: skip


def _wait_for_all(client: Client, jobs: list[dict[str, Any]]) -> None:
    from ostler.errors import OstlerError

    failed: OstlerError | None = None
    for job in jobs:
        try:
            client.wait(job)
            sys.stdout.write(f"{job['guest']}\n")
        except OstlerError as error:
            _tell(str(error))
            failed = failed or error
    if failed is not None:
        raise typer.Exit(failed.exit_status)


def _amount(name: str, amount: int) -> str:
    if name == "cpu":
        return f"{amount / 1000:g}"
    return size(amount) + ("/s" if name.endswith("bandwidth") else "")


def _tell(line: str) -> None:
    sys.stderr.write(f"ostler: {line}\n")
    sys.stderr.flush()

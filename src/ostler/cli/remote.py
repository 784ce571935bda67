"""`ostler --host URL …`: the commands for guests, asked of a host service instead of this user's own processes.

URL is `local` (this user's service), `unix:PATH`, `http://…` or `https://…`; OSTLER_TOKEN holds the token. What takes
long is a job of the service's: these commands wait for it, and it goes on without them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ostler.cli.output import Json, ago, print_json, print_table, size

if TYPE_CHECKING:
    from ostler.api.client import Client

app = typer.Typer(
    name="ostler --host URL", help="Guests of a host service.", no_args_is_help=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
snapshot_app = typer.Typer(help="Save guests, and see what is saved.", no_args_is_help=True)
app.add_typer(snapshot_app, name="snapshot")
Names = Annotated[list[str], typer.Argument(metavar="GUEST")]
Name = Annotated[str, typer.Argument(metavar="GUEST")]


def run(arguments: list[str]) -> object:
    """Do what follows `--host URL` or `--host=URL`. Raises BadRequest where no URL does."""
    from ostler.errors import BadRequest

    option, equals, url = arguments[0].partition("=")
    rest = arguments[1:]
    if not equals and rest:
        url, *rest = rest
    if not url or url.startswith("-"):
        raise BadRequest(f"{option}: expected a URL behind it: local, unix:PATH, http://… or https://…")
    return app(rest, prog_name="ostler --host URL", standalone_mode=False, obj={"url": url})


@contextmanager
def _service(context: typer.Context) -> Iterator[Client]:
    from ostler.cli.host import reach

    url = str(context.obj["url"])
    with reach(None if url == "local" else url) as client:
        yield client


@app.command()
def ps(
    context: typer.Context,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Those that do not run, too.")] = False,  # noqa: FBT002
    names: Annotated[bool, typer.Option("--quiet", "-q", help="Names only.")] = False,  # noqa: FBT002
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """List guests."""
    with _service(context) as client:
        found = client.get("/v1/guests")["guests"]
    found = [each for each in found if everything or each["state"] not in {"defined", "ended", "failed"}]
    if as_json:
        print_json(found)
    elif names:
        sys.stdout.write("".join(f"{each['name']}\n" for each in found))
    else:
        rows = [
            (each["name"], each["image"] or "-", each["state"] + ("" if each["ready"] else " …" if each["job"] else ""),
             ago(each["created"]) if each["created"] else "-", ", ".join(each["ports"]) or "-", each["reason"] or "-")
            for each in found
        ]  # fmt: skip
        print_table(("NAME", "IMAGE", "STATE", "AGE", "PORTS", "REASON"), rows)


@app.command()
def start(context: typer.Context, names: Names) -> None:
    """Start guests, and first what they depend on; wait until they are ready."""
    _all(context, names, "start", None)


@app.command()
def stop(
    context: typer.Context, names: Names,
    grace: Annotated[float | None, typer.Option("--time", "-t", min=0, max=3600, metavar="S")] = None,
) -> None:  # fmt: skip
    """Shut guests down, and first what depends on them."""
    _all(context, names, "stop", {"grace_s": grace})


@app.command()
def restart(context: typer.Context, names: Names) -> None:
    """Shut guests down and start them again."""
    _all(context, names, "restart", None)


def _all(context: typer.Context, names: list[str], what: str, body: dict[str, Any] | None) -> None:
    with _service(context) as client:
        for job in [client.post(f"/v1/guests/{name}/{what}", body) for name in names]:
            client.wait(job)


@app.command()
def kill(context: typer.Context, names: Names) -> None:
    """End guests at once."""
    _now(context, names, "kill")


@app.command()
def pause(context: typer.Context, names: Names) -> None:
    """Hold guests' processors where they are."""
    _now(context, names, "pause")


@app.command()
def resume(context: typer.Context, names: Names) -> None:
    """Let paused guests go on."""
    _now(context, names, "resume")


def _now(context: typer.Context, names: list[str], what: str) -> None:
    with _service(context) as client:
        for name in names:
            client.post(f"/v1/guests/{name}/{what}")


@app.command()
def rm(
    context: typer.Context, names: Names,
    force: Annotated[bool, typer.Option("--force", "-f", help="Kill those that run.")] = False,  # noqa: FBT002
) -> None:  # fmt: skip
    """Forget guests: definitions, logs, how they ended."""
    with _service(context) as client:
        for name in names:
            client.delete(f"/v1/guests/{name}", force=force)


@app.command()
def define(
    context: typer.Context, files: Annotated[list[Path], typer.Argument(metavar="TOML")],
    start: Annotated[bool, typer.Option("--start", help="And start them.")] = False,  # noqa: FBT002
) -> None:  # fmt: skip
    """Define guests; paths in the files are the service's host's."""
    from ostler.hostd import definition

    with _service(context) as client:
        for each in [definition.read(path) for path in files]:
            client.post("/v1/guests", {"definition": each.table, "start": start})
            sys.stdout.write(f"{each.name}\n")


@app.command("exec", context_settings={"allow_interspersed_args": False})
def execute(
    context: typer.Context, name: Name, command: Annotated[list[str], typer.Argument(metavar="COMMAND")]
) -> None:
    """Run a command in a guest, without a terminal: its output, its exit status."""
    words = command[1:] if command[:1] == ["--"] else command
    with _service(context) as client:
        result = client.wait(client.post(f"/v1/guests/{name}/exec", {"argv": words})).result or {}
    sys.stdout.write(result["stdout"])
    sys.stderr.write(result["stderr"])
    code = int(result["returncode"])
    raise typer.Exit(code if code >= 0 else 128 - code)


@app.command()
def inspect(context: typer.Context, name: Name) -> None:
    """Print all that is known of a guest, as JSON."""
    with _service(context) as client:
        print_json(client.get(f"/v1/guests/{name}"))


@app.command()
def logs(
    context: typer.Context, name: Name,
    tail: Annotated[int | None, typer.Option("--tail", "-n", min=0, metavar="N")] = None,
    console: Annotated[bool, typer.Option("--console", help="The console's, not the command's.")] = False,  # noqa: FBT002
) -> None:  # fmt: skip
    """Print what a guest has said."""
    with _service(context) as client:
        found = client.get(f"/v1/guests/{name}/logs", tail=tail, source="console" if console else None)
    sys.stdout.write(found["text"])


@app.command()
def stats(context: typer.Context, as_json: Json = False) -> None:  # noqa: FBT002
    """Show what guests use."""
    with _service(context) as client:
        found = client.get("/v1/stats")
    if as_json:
        print_json(found)
        return
    rows = [
        (each["name"], f"{each['uptime_s']:.0f} s", f"{each['cpu_time_ns'] / 1e9:.1f} s",
         size(each["memory_resident_bytes"]), f"{size(each['disk_read_bytes'])} / {size(each['disk_written_bytes'])}",
         f"{size(each['net_received_bytes'])} / {size(each['net_sent_bytes'])}")
        for each in found["guests"]
    ]  # fmt: skip
    print_table(("NAME", "UP", "CPU TIME", "PROCESS", "READ / WRITTEN", "RECEIVED / SENT"), rows)


@app.command()
def fork(
    context: typer.Context, name: Name, count: Annotated[int, typer.Option("--count", "-n", min=1, max=100)] = 1,
    child: Annotated[str | None, typer.Option("--name", metavar="NAME")] = None,
) -> None:  # fmt: skip
    """Start children of a guest that go on from this instant; print their names."""
    with _service(context) as client:
        done = client.wait(client.post(f"/v1/guests/{name}/fork", {"count": count, "name": child}))
    sys.stdout.write("".join(f"{each}\n" for each in (done.result or {})["children"]))


@app.command()
def restore(
    context: typer.Context, name: Annotated[str, typer.Argument(metavar="SNAPSHOT")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=100)] = 1,
    guest: Annotated[str | None, typer.Option("--name", metavar="NAME")] = None,
) -> None:  # fmt: skip
    """Start guests that go on from a snapshot; print their names."""
    with _service(context) as client:
        done = client.wait(client.post(f"/v1/snapshots/{name}/restore", {"count": count, "name": guest}))
    sys.stdout.write("".join(f"{each}\n" for each in (done.result or {})["guests"]))


@app.command()
def migrate(
    context: typer.Context, name: Name, address: Annotated[str, typer.Argument(metavar="ADDRESS")],
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS on a network.")] = False,  # noqa: FBT002
) -> None:  # fmt: skip
    """Move a guest to where `ostler receive` listens, as the service's host reaches it."""
    with _service(context) as client:
        client.wait(client.post(f"/v1/guests/{name}/migrate", {"address": address, "insecure": insecure}))


@app.command()
def jobs(context: typer.Context, as_json: Json = False) -> None:  # noqa: FBT002
    """List jobs, newest first."""
    with _service(context) as client:
        found = client.get("/v1/jobs")["jobs"]
    if as_json:
        print_json(found)
        return
    rows = [
        (each["id"], each["kind"], each["guest"] or "-", each["state"], each["by"], each["message"]) for each in found
    ]
    print_table(("ID", "KIND", "GUEST", "STATE", "BY", "MESSAGE"), rows)


@snapshot_app.command("create")
def create_snapshot(
    context: typer.Context, guest: Name, name: Annotated[str, typer.Argument(metavar="NAME")],
    freeze: Annotated[bool, typer.Option("--freeze")] = False,  # noqa: FBT002
    replace: Annotated[bool, typer.Option("--replace")] = False,  # noqa: FBT002
) -> None:  # fmt: skip
    """Save a running guest; it goes on."""
    body = {"name": name, "freeze": freeze, "replace": replace}
    with _service(context) as client:
        client.wait(client.post(f"/v1/guests/{guest}/snapshots", body))
    sys.stdout.write(f"{name}\n")


@snapshot_app.command("ls")
def list_snapshots(context: typer.Context) -> None:
    """List snapshots."""
    with _service(context) as client:
        found = client.get("/v1/snapshots")["snapshots"]
    rows = [(each["name"], each["guest"] or "-", each["error"] or size(each["disk_bytes"] or 0)) for each in found]
    print_table(("NAME", "GUEST", "ON DISK"), rows)


@snapshot_app.command("rm")
def remove_snapshots(context: typer.Context, names: Annotated[list[str], typer.Argument(metavar="SNAPSHOT")]) -> None:
    """Remove snapshots."""
    with _service(context) as client:
        for name in names:
            client.delete(f"/v1/snapshots/{name}")

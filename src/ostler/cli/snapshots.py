"""`ostler snapshot …`, `ostler restore`, `ostler fork`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ostler.cli.guests import Running
from ostler.cli.output import Json, ago, print_json, print_table, size

app = typer.Typer(help="Save running guests, and see what is saved.", no_args_is_help=True)
MAX_COUNT = 1000


def complete_snapshot(incomplete: str) -> list[str]:
    """Names of snapshots, for the shell."""
    from ostler.snapshot import store

    return [name for name in store.names() if name.startswith(incomplete)]


SnapshotName = Annotated[str, typer.Argument(metavar="SNAPSHOT", autocompletion=complete_snapshot)]
Count = Annotated[int, typer.Option("--count", "-n", min=1, max=MAX_COUNT, metavar="COUNT", help="How many guests.")]


@app.command()
def create(
    guest: Running,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the snapshot is to be called.")],
    incremental: Annotated[bool, typer.Option("--incremental", "-i", help="Only what changed since the last.")] = False,  # noqa: FBT002
    freeze: Annotated[bool, typer.Option("--freeze", help="Freeze the guest's file systems meanwhile.")] = False,  # noqa: FBT002
    replace: Annotated[bool, typer.Option("--replace", help="Replace a snapshot of that name.")] = False,  # noqa: FBT002
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """Save a running guest: memory, processors, devices, what it has written to its disks. It goes on.

    [bold]Example:[/bold]  ostler snapshot create web before-upgrade --freeze
    """
    from ostler.client import snapshots
    from ostler.control import runtime

    done = snapshots.create(runtime.find(guest), name, incremental=incremental, freeze=freeze, replace=replace)
    if as_json:
        print_json(done)
    else:
        sys.stdout.write(f"{name}\n")
        sys.stderr.write(f"paused for {done['pause_ms']:.1f} ms\n")


@app.command("ls")
def list_(
    names: Annotated[bool, typer.Option("--quiet", "-q", help="Names only.")] = False,  # noqa: FBT002
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """List snapshots.

    [bold]Example:[/bold]  ostler snapshot rm $(ostler snapshot ls -q)
    """
    from ostler.client import snapshots
    from ostler.snapshot import store

    if names:
        sys.stdout.write("".join(f"{name}\n" for name in store.names()))
        return
    found = snapshots.summaries()
    if as_json:
        print_json(found)
        return
    rows = []
    for each in found:
        if "error" in each:
            rows.append((each["name"], each["error"], "", "", "", ""))
        else:
            parent = (each["parent"] or "-").partition(":")[0]
            rows.append((
                each["name"], each["guest"], str(each["image"] or "-"), ago(each["created"]),
                f"{size(each['disk_bytes'])} / {size(each['memory_bytes'])}", parent,
            ))  # fmt: skip
    print_table(("NAME", "GUEST", "IMAGE", "AGE", "ON DISK / MEMORY", "PARENT"), rows)


@app.command("rm")
def remove(names: Annotated[list[str], typer.Argument(metavar="SNAPSHOT", autocompletion=complete_snapshot)]) -> None:
    """Remove snapshots. Guests that began with them go on.

    [bold]Example:[/bold]  ostler snapshot rm before-upgrade
    """
    from ostler.snapshot import store

    for name in names:
        store.remove(name)


@app.command()
def inspect(
    name: SnapshotName,
    verify: Annotated[bool, typer.Option("--verify", help="Look at every file's checksums too.")] = False,  # noqa: FBT002
) -> None:
    """Print all that is known of a snapshot, as JSON.

    [bold]Example:[/bold]  ostler snapshot inspect before-upgrade --verify | jq .created
    """
    from ostler.client import snapshots
    from ostler.snapshot import store

    found = store.find(name)
    if verify:
        store.verify(found, everything=True)
    print_json({**snapshots.summary(found), **snapshots.details(found.manifest)})


def restore(
    name: SnapshotName,
    guest_name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="What the guest is called.")] = None,
    count: Count = 1,
    accel: Annotated[str | None, typer.Option("--accel", metavar="auto|kvm|soft", help="Else the saved one's.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Remember how it ended: ostler wait, ostler rm.")] = False,  # noqa: FBT002
) -> None:
    """Start guests that go on from a snapshot, in milliseconds; print their names.

    Several share the snapshot's memory until they write to it; none of the host's ports lead to them.

    [bold]Example:[/bold]  ostler restore before-upgrade --name web2
    """
    from ostler.client import snapshots
    from ostler.snapshot import store

    snapshot = store.find(name)
    for wanted in _names(guest_name, count):
        guest = snapshots.start(snapshot, wanted, leash=False, remove=not keep, ports=count == 1, accel=accel)
        try:
            guest.configure()
        except BaseException:
            guest.end()
            raise
        guest.release()
        sys.stdout.write(f"{guest.entry.name}\n")
        sys.stdout.flush()


def fork(
    guest: Running,
    guest_name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="What the child is called.")] = None,
    count: Count = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Remember how they ended: ostler wait, ostler rm.")] = False,  # noqa: FBT002
    as_json: Json = False,  # noqa: FBT002
) -> None:
    """Start children of a running guest that go on from this instant; print their names.

    Each has a name, a hostname, a network, random numbers and disks of its own. The guest pauses for milliseconds.

    [bold]Example:[/bold]  for c in $(ostler fork web -n 3); do ostler exec $c -- hostname; done
    """
    from ostler.client import snapshots
    from ostler.control import runtime

    children, pause_ms = snapshots.fork(runtime.find(guest), _names(guest_name, count), remove=not keep)
    found: dict[str, Any] = {"pause_ms": pause_ms, "children": [child.entry.name for child in children]}
    for child in children:
        child.release()
    if as_json:
        print_json(found)
    else:
        sys.stdout.write("".join(f"{name}\n" for name in found["children"]))


def _names(name: str | None, count: int) -> list[str | None]:
    """One name for each: numbered where there are several."""
    if name is None or count == 1:
        return [name] * count
    return [f"{name}-{number}" for number in range(1, count + 1)]

"""The service as a process: everything opened in order, served until a signal, closed in reverse."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from ostler.api import serving
from ostler.api.app import create_app
from ostler.api.service import Service
from ostler.config.request import read_table
from ostler.errors import BadRequest
from ostler.hostd import admission, definition, inventory, settings, stopping
from ostler.hostd.access import Access
from ostler.hostd.audit import Audit
from ostler.hostd.database import Database, StateFolder
from ostler.hostd.definition import Definition
from ostler.hostd.host import Host
from ostler.hostd.launcher import ProcessLauncher
from ostler.hostd.models import Role
from ostler.hostd.notify import notify
from ostler.hostd.opening import Looking, open_host
from ostler.hostd.pressure import Pressure
from ostler.hostd.sampling import Recorder
from ostler.hostd.stats import Statistics
from ostler.planning import history as usage

STOP_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Options:
    """What `ostler host serve` was asked for."""

    state: Path
    socket: Path
    listen: tuple[str, ...] = ()
    tls: serving.Tls | None = None
    guests: Path | None = None
    """A folder of definitions."""
    stop_guests: bool = False


def run(options: Options, *, say: Callable[[str], None], extend: Callable[[FastAPI], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Raises OstlerError."""
    asyncio.run(_run(options, say, extend))


async def _run(options: Options, say: Callable[[str], None], extend: Callable[[FastAPI], None] | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(each, stop.set)
    with ExitStack() as stack:
        folder = stack.enter_context(StateFolder(options.state))
        said = settings.read(options.state / settings.FILE)
        files = read_folder(options.guests)
        # Bound before guests are started: who cannot listen starts nothing.
        listeners = [serving.listen_unix(options.socket)]
        stack.callback(serving.forget_socket, options.socket)
        listeners += [serving.listen_tcp(each, options.tls) for each in options.listen]
        for listener in listeners:
            stack.callback(listener.socket.close)
        database = stack.enter_context(closing(Database(folder)))
        service = await asyncio.to_thread(
            open_service, database=database, said=said, state=options.state, files=files, stack=stack
        )
        app = create_app(service, extend=extend)
        serve = asyncio.create_task(serving.serve(app, listeners, stop))
        for listener in listeners:
            say(f"listening on {listener.shown}")
        # What is there now stays: the collector need not look at it again and again while clients wait.
        gc.collect()
        gc.freeze()
        notify("READY=1", f"STATUS={len(service.host.guests)} guests")
        await serve
        notify("STOPPING=1")
        if options.stop_guests:
            await asyncio.to_thread(stop_guests, service.host)
        await asyncio.to_thread(service.host.close)


def open_service(
    *, database: Database, said: settings.Settings, state: Path, files: dict[str, Definition], stack: ExitStack
) -> Service:
    """The service behind the routes; what it starts ends with `stack`."""
    found = inventory.inventory()
    peers = {0: Role.ADMIN, os.getuid(): Role.ADMIN, **said.peer_roles()}
    limits = admission.limits(said.capacities(inventory.capacities(found)), said.ratios())
    host = open_host(
        database, ProcessLauncher(), limits=limits, files=files, parallel_starts=said.parallel_starts,
        ratios={name: float(each) for name, each in said.ratios().items()},
    )  # fmt: skip
    statistics = Statistics(host)
    audit = stack.enter_context(closing(Audit(state)))
    stack.enter_context(Looking(host))
    stack.enter_context(Pressure(host, said.relief))
    stack.enter_context(Recorder(state / usage.FILE, statistics.sample))
    return Service(
        host=host, access=Access(host.store), audit=audit, statistics=statistics, inventory=found, peers=peers,
        certificates=said.certificates, samples=state / usage.FILE,
    )  # fmt: skip


def read_folder(folder: Path | None) -> dict[str, Definition]:
    """The definitions in a folder's TOML files; a file without a name has its guest's. Raises BadRequest."""
    found: dict[str, Definition] = {}
    if folder is None:
        return found
    if not folder.is_dir():
        raise BadRequest(f"guests {str(folder)!r}: expected a folder of TOML files")
    for path in sorted(folder.glob("*.toml")):
        table = read_table(path)
        try:
            each = definition.parse(str(table.get("name", path.stem)), table, folder=path.parent)
        except BadRequest as error:
            raise BadRequest(f"file {str(path)!r}: {error}") from error
        if each.name in found:
            raise BadRequest(f"file {str(path)!r}: guest {each.name!r}: is defined by another file, too")
        found[each.name] = each
    return found


def stop_guests(host: Host) -> None:
    """All that are defined, in reverse order."""
    jobs = stopping.begin_stop_all(host, "host")
    for job in jobs:
        host.jobs.wait(job.id, STOP_LIMIT_S)

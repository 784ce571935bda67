"""Routes of guests: defined, begun, ended, and what is done with those that run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Body, Path, Query, Response

from ostler.api.identity import TheCaller, TheService
from ostler.api.operations import operation
from ostler.errors import BadRequest
from ostler.hostd import definition, starting, stopping, work
from ostler.hostd.definition import NAME_PATTERN
from ostler.hostd.jobs import Job
from ostler.hostd.models import (
    BalloonWish,
    DefineWish,
    ExecWish,
    ForkWish,
    GuestDetail,
    GuestList,
    GuestStats,
    GuestView,
    JobView,
    Logs,
    MigrateWish,
    Role,
    ScheduleView,
    ScheduleWish,
    SnapshotWish,
    StopWish,
)
from ostler.hostd.problems import NotUnderstood

router = APIRouter(tags=["guests"])
Name = Annotated[str, Path(pattern=NAME_PATTERN, max_length=40)]
_BEGUN = (404, 409, 502, 507)
_ASKED = (404, 409, 502, 504, 507)
LOG_BYTES = 1 << 20


def begun(job: Job, response: Response) -> JobView:
    """The answer 202: where the job is."""
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job.view


@operation(router, "GET", "/v1/guests", Role.VIEWER, model=GuestList)
async def list_guests(service: TheService) -> Response:
    """All guests, by name. From memory: always quick."""
    return Response(service.host.list_json(), media_type="application/json")


@operation(router, "POST", "/v1/guests", Role.ADMIN, status=201, model=GuestView, problems=(404, 409, 507))
def define_guest(wish: DefineWish, service: TheService, caller: TheCaller, response: Response) -> GuestView:
    """Define a guest. Refused where its name is in use, or the host has not got what it reserves."""
    return _define(wish, None, service, caller.name, response, replace=False)


@operation(router, "PUT", "/v1/guests/{name}", Role.ADMIN, model=GuestView, problems=(404, 409, 507))
def redefine_guest(
    name: Name, wish: DefineWish, service: TheService, caller: TheCaller, response: Response
) -> GuestView:
    """Define a guest anew, or for the first time. A guest that runs is so from its next start on."""
    return _define(wish, name, service, caller.name, response, replace=True)


def _define(
    wish: DefineWish, name: str | None, service: TheService, by: str, response: Response, *, replace: bool
) -> GuestView:
    try:
        wanted = definition.parse(name, wish.definition)
    except BadRequest as error:
        raise NotUnderstood(str(error)) from error
    host = service.host
    if wish.start:
        host.admit(wanted, starts=True)
    host.define([wanted], replace=replace)
    response.headers["Location"] = f"/v1/guests/{wanted.name}"
    if wish.start:
        starting.begin_start(host, wanted.name, by)
    return host.find(wanted.name).view()


@operation(router, "GET", "/v1/guests/{name}", Role.VIEWER, model=GuestDetail, problems=(404,))
def show_guest(name: Name, service: TheService) -> GuestDetail:
    """All that is known of a guest."""
    guest = service.host.find(name)
    facts: dict[str, Any] = {}
    if guest.is_active:
        try:
            facts = service.host.ask(name, "inspect", timeout_s=5.0)
        except Exception:
            facts = {}
    return GuestDetail(guest=guest.view(), definition=guest.table, facts=facts)


@operation(router, "DELETE", "/v1/guests/{name}", Role.ADMIN, status=204, problems=_ASKED)
def remove_guest(name: Name, service: TheService, force: bool = False) -> Response:  # noqa: FBT001, FBT002
    """Forget a guest: its definition, its logs, how it ended."""
    guest = service.host.find(name)
    if force and guest.is_active:
        stopping.kill(service.host, name)
        service.host.wait_for(lambda: guest.job is None, 10)
    service.host.undefine(guest)
    return Response(status_code=204)


@operation(router, "POST", "/v1/guests/{name}/start", Role.OPERATOR, status=202, model=JobView, problems=_BEGUN)
def start_guest(name: Name, service: TheService, caller: TheCaller, response: Response) -> JobView:
    """Start a guest, and first what it depends on."""
    job = starting.begin_start(service.host, name, caller.name)
    if job is None:
        raise BadRequest(f"guest {name!r}: runs already")
    return begun(job, response)


@operation(router, "POST", "/v1/guests/{name}/stop", Role.OPERATOR, status=202, model=JobView, problems=_BEGUN)
def stop_guest(
    name: Name, service: TheService, caller: TheCaller, response: Response,
    wish: Annotated[StopWish | None, Body()] = None,
) -> JobView:  # fmt: skip
    """Shut a guest down, and first what depends on it."""
    grace_s = wish.grace_s if wish is not None else None
    return begun(stopping.begin_stop(service.host, name, caller.name, grace_s), response)


@operation(router, "POST", "/v1/guests/{name}/restart", Role.OPERATOR, status=202, model=JobView, problems=_BEGUN)
def restart_guest(
    name: Name, service: TheService, caller: TheCaller, response: Response,
    wish: Annotated[StopWish | None, Body()] = None,
) -> JobView:  # fmt: skip
    """Shut a guest down and start it again."""
    grace_s = wish.grace_s if wish is not None else None
    return begun(stopping.begin_restart(service.host, name, caller.name, grace_s), response)


@operation(router, "POST", "/v1/guests/{name}/kill", Role.OPERATOR, model=GuestView, problems=_ASKED)
def kill_guest(name: Name, service: TheService) -> GuestView:
    """End a guest at once."""
    stopping.kill(service.host, name)
    return service.host.find(name).view()


@operation(router, "POST", "/v1/guests/{name}/pause", Role.OPERATOR, model=GuestView, problems=_ASKED)
def pause_guest(name: Name, service: TheService) -> GuestView:
    """Hold a guest's processors where they are."""
    service.host.ask(name, "pause")
    return service.host.find(name).view()


@operation(router, "POST", "/v1/guests/{name}/resume", Role.OPERATOR, model=GuestView, problems=_ASKED)
def resume_guest(name: Name, service: TheService) -> GuestView:
    """Let a paused guest go on."""
    service.host.ask(name, "resume")
    return service.host.find(name).view()


@operation(router, "POST", "/v1/guests/{name}/balloon", Role.OPERATOR, model=GuestView, problems=_ASKED)
def set_balloon(name: Name, wish: BalloonWish, service: TheService) -> GuestView:
    """Ask a guest to keep so much of its memory; it gives what it can spare."""
    service.host.ask(name, "balloon", guest_bytes=wish.guest_bytes)
    return service.host.find(name).view()


@operation(router, "POST", "/v1/guests/{name}/schedule", Role.OPERATOR, model=ScheduleView, problems=_ASKED)
def schedule_guest(name: Name, wish: ScheduleWish, service: TheService) -> ScheduleView:
    """Change a running guest's shares of the host's processors. A reservation has to be there to be promised."""
    given = wish.model_dump(include=wish.model_fields_set)
    guest = service.host.running(name)
    if "reserve" in given:
        service.host.admit_share(guest, given["reserve"] or 0.0)
    return ScheduleView(shares=service.host.ask(name, "schedule", **given))


@operation(router, "POST", "/v1/guests/{name}/exec", Role.OPERATOR, status=202, model=JobView, problems=_BEGUN)
def run_command(name: Name, wish: ExecWish, service: TheService, caller: TheCaller, response: Response) -> JobView:
    """Run a command in a guest."""
    return begun(work.begin_exec(service.host, name, wish, caller.name), response)


@operation(router, "POST", "/v1/guests/{name}/snapshots", Role.OPERATOR, status=202, model=JobView, problems=_BEGUN)
def create_snapshot(
    name: Name, wish: SnapshotWish, service: TheService, caller: TheCaller, response: Response
) -> JobView:
    """Save a guest that runs; it goes on."""
    return begun(work.begin_snapshot(service.host, name, wish, caller.name), response)


@operation(router, "POST", "/v1/guests/{name}/fork", Role.OPERATOR, status=202, model=JobView, problems=_BEGUN)
def fork_guest(name: Name, wish: ForkWish, service: TheService, caller: TheCaller, response: Response) -> JobView:
    """Start children of a guest that go on from this instant."""
    return begun(work.begin_fork(service.host, name, wish, caller.name), response)


@operation(router, "POST", "/v1/guests/{name}/migrate", Role.ADMIN, status=202, model=JobView, problems=_BEGUN)
def migrate_guest(name: Name, wish: MigrateWish, service: TheService, caller: TheCaller, response: Response) -> JobView:
    """Move a guest to where `ostler receive` listens."""
    return begun(work.begin_migrate(service.host, name, wish, caller.name), response)


@operation(router, "GET", "/v1/guests/{name}/logs", Role.VIEWER, model=Logs, problems=(404, 409))
def read_logs(
    name: Name, service: TheService, source: Literal["console", "command"] | None = None,
    tail: Annotated[int | None, Query(ge=0, le=100_000)] = None,
) -> Logs:  # fmt: skip
    """What a guest has said: its command, where it has one, else its console; at most the last megabyte."""
    guest = service.host.find(name)
    chosen = source or ("command" if guest.facts.get("service") else "console")
    said = service.host.launcher.logs(name, console=chosen == "console", lines=tail)[-LOG_BYTES:]
    return Logs(text=said.decode(errors="replace"), source=chosen)


@operation(router, "GET", "/v1/guests/{name}/stats", Role.VIEWER, model=GuestStats, problems=_ASKED)
async def read_guest_stats(name: Name, service: TheService, raw: bool = False) -> GuestStats:  # noqa: FBT001, FBT002
    """What a guest uses."""
    service.host.running(name)
    return await to_thread.run_sync(lambda: service.statistics.guest(name, raw=raw))

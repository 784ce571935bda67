"""Routes of everything but guests: the host, snapshots, images, jobs, events, statistics, tokens, the audit log."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from starlette.requests import Request

from ostler.api.guests import Name, begun
from ostler.api.identity import CALLER, COOKIE, TheCaller, TheService, Unauthorized
from ostler.api.operations import operation
from ostler.hostd import sampling, starting, stopping, work
from ostler.hostd.host import Host
from ostler.hostd.jobs import ENDED
from ostler.hostd.models import (
    MAX_LIST,
    AuditList,
    Caller,
    Empty,
    EventList,
    EventView,
    HostView,
    ImageList,
    ImageView,
    JobList,
    JobState,
    JobView,
    NewToken,
    RestoreWish,
    Role,
    SampleList,
    SessionWish,
    SnapshotList,
    SnapshotView,
    StatsSample,
    TokenList,
    TokenWish,
)
from ostler.hostd.problems import NotFound
from ostler.planning import history

router = APIRouter()
Identifier = Annotated[str, Path(pattern=r"^[0-9a-f]{1,32}$", max_length=32)]
Limit = Annotated[int, Query(ge=1, le=MAX_LIST)]
Moment = Annotated[float, Query(ge=0, le=1e11, allow_inf_nan=False)]
MAX_WAIT_S = 60


@operation(router, "GET", "/healthz", None, model=Empty)
async def health() -> Empty:
    """The service is up."""
    return Empty()


@operation(router, "GET", "/v1/me", Role.VIEWER, model=Caller)
async def who_am_i(caller: TheCaller) -> Caller:
    """Who asks, as the service knows it."""
    return caller


@operation(router, "POST", "/v1/session", None, model=Caller, problems=(401,))
def begin_session(wish: SessionWish, service: TheService, request: Request, response: Response) -> Caller:
    """Show a token, get a cookie: for browsers."""
    found = service.access.begin_session(wish.token)
    if found is None:
        raise Unauthorized("token: not known, or expired")
    key, caller = found
    request.scope[CALLER] = caller
    is_tls = request.scope.get("scheme") == "https"
    response.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=is_tls, path="/")
    return caller


@operation(router, "DELETE", "/v1/session", Role.VIEWER, status=204)
async def end_session(service: TheService, request: Request) -> Response:
    """The cookie is worth nothing from now on."""
    if (key := request.cookies.get(COOKIE)) is not None:
        service.access.end_session(key)
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, path="/")
    return response


@operation(router, "GET", "/v1/host", Role.VIEWER, model=HostView)
def show_host(service: TheService) -> HostView:
    """The host, and what it has promised."""
    from importlib.metadata import version

    states = Counter(each.state.value for each in service.host.listed().guests)
    return HostView(
        version=version("ostler"), started=service.host.started, inventory=service.inventory,
        resources=service.host.resources(), guests=dict(states),
    )  # fmt: skip


@operation(router, "POST", "/v1/host/down", Role.ADMIN, status=202, model=JobList, problems=(502, 507))
def stop_all(service: TheService, caller: TheCaller) -> JobList:
    """Stop every guest that is defined, each before what it depends on."""
    return JobList(jobs=[job.view for job in stopping.begin_stop_all(service.host, caller.name)])


@operation(router, "POST", "/v1/host/up", Role.ADMIN, status=202, model=JobList, problems=(409, 502, 507))
def start_all(service: TheService, caller: TheCaller) -> JobList:
    """Start every guest that starts with the host and does not run."""
    names = [each.name for each in service.host.listed().guests if each.autostart]
    return JobList(jobs=[job.view for job in starting.begin_all(service.host, names, caller.name)])


@operation(router, "GET", "/v1/snapshots", Role.VIEWER, model=SnapshotList)
def list_snapshots() -> SnapshotList:
    """All there are."""
    from ostler.client import snapshots

    known = set(SnapshotView.model_fields)
    found = [{key: value for key, value in each.items() if key in known} for each in snapshots.summaries()]
    return SnapshotList(snapshots=[SnapshotView.model_validate(each) for each in found])


@operation(router, "DELETE", "/v1/snapshots/{name}", Role.OPERATOR, status=204, problems=(404, 409, 502))
def remove_snapshot(name: Name) -> Response:
    """Guests that began with it go on."""
    from ostler.snapshot import store

    if name not in store.names():
        raise NotFound(f"snapshot {name!r}: not known")
    store.remove(name)
    return Response(status_code=204)


@operation(
    router,
    "POST",
    "/v1/snapshots/{name}/restore",
    Role.OPERATOR,
    status=202,
    model=JobView,
    problems=(404, 409, 502, 507),
)
def restore_snapshot(
    name: Name, wish: RestoreWish, service: TheService, caller: TheCaller, response: Response
) -> JobView:
    """Start guests that go on from it."""
    return begun(work.begin_restore(service.host, name, wish, caller.name), response)


@operation(router, "GET", "/v1/images", Role.VIEWER, model=ImageList)
def list_images() -> ImageList:
    """Those in the store."""
    from ostler.images import store

    found = []
    for name, digest in sorted(store.names().items()):
        image = store.find(name)
        found.append(ImageView(name=name, digest=digest, size_bytes=image.disk_bytes if image is not None else None))
    return ImageList(images=found)


@operation(router, "GET", "/v1/jobs", Role.VIEWER, model=JobList)
def list_jobs(
    service: TheService, guest: Annotated[str | None, Query(max_length=40)] = None, state: JobState | None = None,
    limit: Limit = 100,
) -> JobList:  # fmt: skip
    """Newest first."""
    return JobList(jobs=service.host.jobs.listed(guest=guest, state=state, limit=limit))


@operation(router, "GET", "/v1/jobs/{identifier}", Role.VIEWER, model=JobView, problems=(404,))
async def show_job(
    identifier: Identifier, service: TheService,
    wait_s: Annotated[float, Query(ge=0, le=MAX_WAIT_S, allow_inf_nan=False)] = 0,
) -> JobView:  # fmt: skip
    """A job; with `wait_s` once it has ended, or after that time."""
    jobs = service.host.jobs
    found = jobs.get(identifier)
    if found is not None and wait_s and found.state not in ENDED:
        await _until_ended(service.host, identifier, wait_s)
        found = jobs.get(identifier)
    if found is None:
        raise NotFound(f"job {identifier!r}: not known")
    return found


async def _until_ended(host: Host, identifier: str, timeout_s: float) -> None:
    """No thread waits: an event wakes this task."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def hear(event: EventView) -> None:
        if event.kind == "job" and event.data["id"] == identifier and event.data["ended"] is not None:
            loop.call_soon_threadsafe(ended.set)

    host.events.listen(hear)
    try:
        if host.jobs.under_way(identifier) is not None:
            await asyncio.wait_for(ended.wait(), timeout_s)
    except TimeoutError:
        pass
    finally:
        host.events.leave(hear)


@operation(router, "POST", "/v1/jobs/{identifier}/cancel", Role.OPERATOR, model=JobView, problems=(404, 409, 502))
def cancel_job(identifier: Identifier, service: TheService) -> JobView:
    """Call a job off; it may take a moment to end."""
    if service.host.jobs.get(identifier) is None:
        raise NotFound(f"job {identifier!r}: not known")
    return service.host.jobs.cancel(identifier)


@operation(router, "GET", "/v1/events", Role.VIEWER, model=EventList)
async def list_events(
    service: TheService, since: Annotated[int, Query(ge=0, le=2**53)] = 0, limit: Limit = MAX_LIST
) -> EventList:
    """What happened after that number, as far as it is kept."""
    return EventList(events=service.host.events.since(since, limit), last=service.host.events.last)


@operation(router, "GET", "/v1/stats", Role.VIEWER, model=StatsSample)
def read_stats(service: TheService) -> StatsSample:
    """What the host and its guests use."""
    return service.statistics.sample()


@operation(router, "GET", "/v1/samples", Role.VIEWER, model=SampleList, problems=(502,))
def list_samples(
    service: TheService, since: Moment = 0, until: Moment | None = None,
    guest: Annotated[str | None, Query(max_length=40)] = None, limit: Annotated[int, Query(ge=1, le=100_000)] = 10_000,
) -> SampleList:  # fmt: skip
    """What was used, a row a minute and guest, oldest first."""
    end = until if until is not None else time.time()
    found = history.read(service.samples, since_s=since, until_s=end, guest=guest, limit=limit)
    return SampleList(samples=[sampling.row(each) for each in found])


@operation(router, "GET", "/v1/tokens", Role.ADMIN, model=TokenList)
def list_tokens(service: TheService) -> TokenList:
    """Without their secrets."""
    return TokenList(tokens=service.access.tokens())


@operation(router, "POST", "/v1/tokens", Role.ADMIN, status=201, model=NewToken, problems=(409, 507))
def make_token(wish: TokenWish, service: TheService) -> NewToken:
    """A new token; it is shown once."""
    return service.access.make_token(wish.name, wish.role, wish.expires_in_s)


@operation(router, "DELETE", "/v1/tokens/{identifier}", Role.ADMIN, status=204, problems=(404, 507))
def drop_token(identifier: Identifier, service: TheService) -> Response:
    """It is worth nothing from now on."""
    if not service.access.drop_token(identifier):
        raise NotFound(f"token {identifier!r}: not known")
    return Response(status_code=204)


@operation(router, "GET", "/v1/audit", Role.ADMIN, model=AuditList)
def read_audit(service: TheService, limit: Limit = 100) -> AuditList:
    """Newest first."""
    return AuditList(entries=service.audit.read(limit))

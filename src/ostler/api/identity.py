"""Who asks: from the socket's peer, a certificate, a token, or a session's cookie; and whether that is enough.

Credentials that are shown count, those of the connection only where none are: who shows a token is who it says.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from anyio import to_thread
from fastapi import Depends
from starlette.requests import HTTPConnection

from ostler.api.service import Service
from ostler.errors import BadRequest
from ostler.hostd.models import Caller, Role

COOKIE = "ostler_session"
CALLER = "ostler.caller"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Unauthorized(BadRequest):
    """No credentials, or wrong ones."""


class Forbidden(BadRequest):
    """Known, and not allowed to."""


def service_of(connection: HTTPConnection) -> Service:
    """The service behind the application."""
    found: Service = connection.app.state.service
    return found


async def authorize(connection: HTTPConnection, role: Role) -> Caller:
    """Who asks. Raises Unauthorized, Forbidden."""
    caller = await identify(connection)
    connection.scope[CALLER] = caller
    if not caller.role.allows(role):
        raise Forbidden(f"{caller.name}: is {caller.role.value}, expected {role.value}")
    return caller


async def identify(connection: HTTPConnection) -> Caller:
    """Who asks. Raises Unauthorized, and Forbidden for somebody known who has no role."""
    service = service_of(connection)
    if (header := connection.headers.get("authorization")) is not None:
        return await _by_token(service, header)
    if (cookie := connection.cookies.get(COOKIE)) is not None:
        if (caller := service.access.caller_of_session(cookie)) is not None:
            _check_origin(connection)
            return caller
        raise Unauthorized("session: not known, or over; expected a new one")
    return by_connection(service, connection.scope.get("state") or {})


async def _by_token(service: Service, header: str) -> Caller:
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized(f"authorization {scheme[:20]!r}: expected Bearer and a token")
    token = token.strip()
    caller = service.access.known_token(token) or await to_thread.run_sync(service.access.caller_of_token, token)
    if caller is None:
        raise Unauthorized("token: not known, or expired; expected one of `ostler host token`")
    return caller


def by_connection(service: Service, state: dict[str, object]) -> Caller:
    """Who is at the other end of the socket."""
    if isinstance(uid := state.get("peer_uid"), int):
        if (role := service.peers.get(uid)) is None:
            raise Forbidden(f"uid {uid}: has no role here; [peers] of host.toml gives it one")
        return Caller(name=f"uid {uid}", role=role, by="peer")
    if isinstance(name := state.get("certificate"), str):
        if (role := service.certificates.get(name)) is None:
            raise Forbidden(f"certificate {name!r}: has no role here; [certificates] of host.toml gives it one")
        return Caller(name=f"certificate {name}", role=role, by="certificate")
    raise Unauthorized("credentials: missing, expected a token, a client's certificate, or the UNIX socket")


def _check_origin(connection: HTTPConnection) -> None:
    """A browser sends cookies wherever a page points it: what changes something has to come from our own pages."""
    if connection.scope["type"] == "http" and connection.scope["method"] in _SAFE:
        return
    origin = connection.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != connection.headers.get("host"):
        raise Forbidden(f"origin {origin[:80]!r}: expected this service's own")


def _caller(connection: HTTPConnection) -> Caller:
    found: Caller = connection.scope[CALLER]
    return found


def _service(connection: HTTPConnection) -> Service:
    return service_of(connection)


TheCaller = Annotated[Caller, Depends(_caller)]
TheService = Annotated[Service, Depends(_service)]

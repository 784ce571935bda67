"""Who may use which route: a test of every route there is, made of the route table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from ostler.api import app, guests, identity, others, streams
from ostler.api.operations import role_of
from ostler.api.service import Service
from ostler.hostd.models import Role
from tests.unit.api.fakes import client, served

OPEN = {("GET", "/healthz"), ("POST", "/v1/session")}
LESSER = {Role.OPERATOR: Role.VIEWER, Role.ADMIN: Role.OPERATOR}


def routes() -> list[APIRoute]:
    """Every HTTP route of the application."""
    own = app._own(FastAPI())
    return [
        each for router in (own, guests.router, others.router) for each in router.routes if isinstance(each, APIRoute)
    ]


CASES = [(next(iter(each.methods or ())), each.path, role_of(each)) for each in routes()]
SOCKETS = [each.path for each in streams.router.routes if isinstance(each, WebSocketRoute)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tmp_path_factory.mktemp("state")) as found:
        yield found


@pytest.fixture(scope="module")
def clients(service: Service) -> dict[Role | None, TestClient]:
    return {role: client(service, role) for role in (None, *Role)}


def concrete(path: str) -> str:
    return re.sub(r"\{identifier\}", "abc123", re.sub(r"\{name\}", "nobody", path))


def test_routes_every_one_of_the_application_is_in_the_table(service: Service) -> None:
    built = app.build(service)
    found = {each.path for each in _all_routes(built.routes) if isinstance(each, APIRoute)}

    assert found == {path for _, path, _ in CASES}
    assert len(CASES) > 35
    assert set(SOCKETS) == set(streams.ROLES)


def _all_routes(found: Sequence[object]) -> Iterator[object]:
    for each in found:
        inner = getattr(each, "original_router", None)
        if inner is not None:
            yield from _all_routes(inner.routes)
        else:
            yield each


@pytest.mark.parametrize(("method", "path", "role"), CASES)
def test_route_without_credentials_is_refused(
    clients: dict[Role | None, TestClient], method: str, path: str, role: Role | None
) -> None:
    answer = clients[None].request(method, concrete(path))

    if (method, path) in OPEN:
        assert role is None
        assert answer.status_code in {200, 422}
        return
    assert answer.status_code == 401
    assert answer.json()["kind"] == "Unauthorized"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path", "role"), CASES)
def test_route_with_a_wrong_token_is_refused(
    clients: dict[Role | None, TestClient], method: str, path: str, role: Role | None
) -> None:
    if role is not None:
        wrong = {"authorization": "Bearer ostler_00_00"}
        assert clients[None].request(method, concrete(path), headers=wrong).status_code == 401


@pytest.mark.parametrize(("method", "path", "role"), [case for case in CASES if case[2] in LESSER])
def test_route_with_a_lesser_role_is_refused(
    clients: dict[Role | None, TestClient], method: str, path: str, role: Role
) -> None:
    answer = clients[LESSER[role]].request(method, concrete(path))

    assert answer.status_code == 403
    assert f"expected {role.value}" in answer.json()["message"]


@pytest.mark.parametrize(("method", "path", "role"), [case for case in CASES if case[2] is not None])
def test_route_with_its_role_is_reached(
    clients: dict[Role | None, TestClient], method: str, path: str, role: Role
) -> None:
    assert clients[role].request(method, concrete(path)).status_code not in {401, 403, 405, 500}


@pytest.mark.parametrize("path", SOCKETS)
def test_socket_is_closed_without_credentials_and_with_a_lesser_role(
    clients: dict[Role | None, TestClient], path: str
) -> None:
    def code(who: Role | None) -> int:
        with (
            pytest.raises(WebSocketDisconnect) as caught,
            clients[who].websocket_connect(concrete(path)) as opened,
        ):
            opened.receive_text()
        return caught.value.code

    assert code(None) == streams.UNAUTHORIZED
    if (role := streams.ROLES[path]) in LESSER:
        assert code(LESSER[role]) == streams.FORBIDDEN


def test_peer_and_certificate_have_the_roles_they_are_given(service: Service) -> None:
    assert identity.by_connection(service, {"peer_uid": 0}).role is Role.ADMIN
    strangers: list[dict[str, object]] = [{"peer_uid": 12345}, {"certificate": "stranger"}]
    for state in strangers:
        with pytest.raises(identity.Forbidden, match="has no role here"):
            identity.by_connection(service, state)


def test_session_cookie_counts_only_from_own_pages(service: Service) -> None:
    token = service.access.make_token("browser", Role.ADMIN, None).token
    browser = client(service, None)
    assert browser.post("/v1/session", json={"token": "wrong"}).status_code == 401
    cookie = browser.post("/v1/session", json={"token": token}).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie

    assert browser.get("/v1/me").json() == {"name": "token browser", "role": "admin", "by": "session"}
    elsewhere = {"origin": "http://evil.example"}
    assert browser.post("/v1/host/up", headers=elsewhere).status_code == 403
    assert browser.post("/v1/host/up", headers={"origin": "http://testserver"}).status_code == 202
    assert browser.delete("/v1/session").status_code == 204
    browser.cookies.set("ostler_session", cookie.partition("=")[2].partition(";")[0])
    assert browser.get("/v1/me").status_code == 401


def test_token_that_was_removed_is_worth_nothing(service: Service) -> None:
    made = service.access.make_token("short", Role.VIEWER, None)
    one = client(service, None)
    header = {"authorization": f"Bearer {made.token}"}
    assert one.get("/v1/me", headers=header).status_code == 200

    service.access.drop_token(made.view.id)

    assert one.get("/v1/me", headers=header).status_code == 401


def test_token_that_is_over_is_worth_nothing(service: Service) -> None:
    made = service.access.make_token("over", Role.VIEWER, 0)

    assert client(service, None).get("/v1/me", headers={"authorization": f"Bearer {made.token}"}).status_code == 401


def test_audit_log_tells_who_was_refused_and_who_changed_what(service: Service) -> None:
    client(service, None).post("/v1/guests", json={})
    client(service, Role.ADMIN).post("/v1/host/up")

    newest, before = service.audit.read(2)

    assert (newest.method, newest.path, newest.status, newest.role) == ("POST", "/v1/host/up", 202, "admin")
    assert (before.path, before.status, before.caller) == ("/v1/guests", 401, "unknown")

"""How routes are declared: with the least role they need, and with every answer they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.routing import APIRoute
from starlette.requests import HTTPConnection

from ostler.api.identity import authorize
from ostler.hostd.models import Problem, Role

ROLE = "x-ostler-role"
_PROBLEMS = {
    400: "Not HTTP, or not JSON.", 401: "No credentials, or wrong ones.", 403: "A lesser role.", 404: "Not there.",
    409: "Understood, and cannot be.", 413: "Too large.", 422: "Not understood.",
    502: "The guest or its agent refused.", 504: "The guest or its agent did not answer.",
    507: "No space for the database.",
}  # fmt: skip
_OPEN_PROBLEMS = (400, 413)
Handler = Callable[..., Any]


def operation(
    router: APIRouter, method: str, path: str, role: Role | None, *, status: int = 200, model: Any = None,
    answers: dict[int | str, dict[str, Any]] | None = None, problems: tuple[int, ...] = (),
) -> Callable[[Handler], Handler]:  # fmt: skip
    """Declare a route. `role` None: anybody may. `problems`: what it may answer beside what every route may."""
    statuses = {*_OPEN_PROBLEMS, *problems, 422, *((401, 403) if role is not None else ())}
    responses: dict[int | str, dict[str, Any]] = {
        each: {"model": Problem, "description": _PROBLEMS[each]} for each in sorted(statuses)
    }
    responses |= answers or {}

    def declare(handler: Handler) -> Handler:
        router.add_api_route(
            path, handler, methods=[method], status_code=status, response_model=model, responses=responses,
            dependencies=[Depends(_allow(role))] if role is not None else [], operation_id=handler.__name__,
            openapi_extra={ROLE: role.value if role is not None else None}, response_model_exclude_unset=False,
        )  # fmt: skip
        return handler

    return declare


def _allow(role: Role) -> Callable[[HTTPConnection], Any]:
    async def allow(connection: HTTPConnection) -> None:
        await authorize(connection, role)

    return allow


def role_of(route: APIRoute) -> Role | None:
    """What a declared route needs."""
    found = (route.openapi_extra or {})[ROLE]
    return Role(found) if found is not None else None

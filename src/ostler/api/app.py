"""The application: routes, errors as problems, and what is around them. See docs/rest-api.md."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp

from ostler.api import guests, others, streams
from ostler.api.around import Around
from ostler.api.identity import Forbidden, Unauthorized
from ostler.api.metrics import CONTENT_TYPE, Metrics
from ostler.api.operations import operation
from ostler.api.service import Service
from ostler.errors import OstlerError
from ostler.hostd.models import Problem, Role
from ostler.hostd.problems import problem_of

_KINDS = {400: "BadRequest", 404: "NotFound", 405: "NotAllowed", 413: "TooLarge"}


def create_app(service: Service, *, extend: Callable[[FastAPI], None] | None = None) -> ASGIApp:
    """What a listener serves. `extend` adds routes of its own: the dashboard's pages."""
    app = build(service, extend=extend)
    return Around(app, service, app.state.metrics)


def build(service: Service, *, extend: Callable[[FastAPI], None] | None = None) -> FastAPI:
    """The same without what is around it."""
    app = FastAPI(
        title="Ostler host", version=version("ostler"), docs_url=None, redoc_url=None, openapi_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    app.state.service = service
    app.state.metrics = Metrics(service.host, service.statistics)
    app.include_router(_own(app))
    for module in (guests, others, streams):
        app.include_router(module.router)
    if extend is not None:
        extend(app)
    app.add_exception_handler(OstlerError, _ostler_error)
    app.add_exception_handler(RequestValidationError, _not_understood)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
    return app


def _own(app: FastAPI) -> APIRouter:
    """Routes that are about the application itself."""
    router = APIRouter()

    @operation(router, "GET", "/openapi.json", Role.VIEWER, answers={200: {"content": {"application/json": {}}}})
    def describe_api() -> Response:
        """This description."""
        return JSONResponse(app.openapi())

    text: dict[str, Any] = {"content": {"text/plain": {"schema": {"type": "string"}}}}

    @operation(router, "GET", "/metrics", Role.VIEWER, answers={200: text})
    def read_metrics() -> Response:
        """For Prometheus."""
        return Response(app.state.metrics.render(), headers={"content-type": CONTENT_TYPE})

    return router


def _answer(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    return Response(
        problem.model_dump_json(), status_code=problem.status, headers=headers, media_type="application/json"
    )


async def _ostler_error(_request: Request, error: Exception) -> Response:
    if isinstance(error, Unauthorized):
        problem = Problem(status=401, kind="Unauthorized", message=str(error))
        return _answer(problem, {"WWW-Authenticate": "Bearer"})
    if isinstance(error, Forbidden):
        return _answer(Problem(status=403, kind="Forbidden", message=str(error)))
    return _answer(problem_of(error))


async def _not_understood(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    shown = " ".join(repr(first.get("input")).split())[:80]
    message = f"{where} {shown}: {first['msg'].removeprefix('Value error, ')}"
    return _answer(Problem(status=422, kind="NotUnderstood", message=message))


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = _KINDS.get(error.status_code, "Error")
    headers = dict(error.headers) if error.headers else None
    return _answer(Problem(status=error.status_code, kind=kind, message=str(error.detail)), headers)


async def _bug(_request: Request, error: Exception) -> Response:
    return _answer(problem_of(error))

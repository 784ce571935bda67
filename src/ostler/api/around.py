"""What happens around every request: a bound on its body, the audit log, the metrics. Plain ASGI: it costs little."""

from __future__ import annotations

import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ostler.api.identity import CALLER
from ostler.api.metrics import Metrics
from ostler.api.service import Service
from ostler.hostd.models import AuditEntry, Problem

MAX_BODY_BYTES = 1 << 20
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
KIND = "TooLarge"


class Around:
    """Outermost."""

    def __init__(self, app: ASGIApp, service: Service, metrics: Metrics) -> None:
        self._app, self._service, self._metrics = app, service, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun = 500, time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._bounded(scope, receive, noted)
        finally:
            self._note(scope, status, time.perf_counter() - begun)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive)
        if _announced(scope) > MAX_BODY_BYTES:
            await _too_large(send)
            return
        is_begun = False

        async def watched(message: Message) -> None:
            nonlocal is_begun
            if body.is_too_large and not is_begun:
                return
            is_begun = True
            await send(message)

        await self._app(scope, body.receive, watched)
        if body.is_too_large and not is_begun:
            await _too_large(send)

    def _note(self, scope: Scope, status: int, took_s: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"]
        self._metrics.requests.labels(method if len(method) < 16 else "other", route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(took_s)
        if method in _READING and status not in (401, 403):
            return
        caller = scope.get(CALLER)
        client = scope.get("client")
        self._service.audit.write(
            AuditEntry(
                time=time.time(), caller=caller.name if caller else "unknown",
                role=caller.role.value if caller else None, address=f"{client[0]}:{client[1]}" if client else "unix",
                method=method[:16], path=str(scope["path"])[:500], status=status, detail="",
            )
        )  # fmt: skip


class _Body:
    """Counts what comes; what is too much ends the request as if its sender had gone."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._size = receive, 0
        self.is_too_large = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            if self._size > MAX_BODY_BYTES:
                self.is_too_large = True
                return {"type": "http.disconnect"}
        return message


def _announced(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and len(value) < 20:
            return int(value)
    return 0


async def _too_large(send: Send) -> None:
    problem = Problem(status=413, kind=KIND, message=f"body: expected at most {MAX_BODY_BYTES} bytes")
    body = problem.model_dump_json().encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                          (b"connection", b"close")]  # fmt: skip
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""WebSockets: events, statistics, consoles. Refused ones are closed with 44xx, so that a browser can tell why."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Query, WebSocket
from starlette.websockets import WebSocketDisconnect

from ostler.api.identity import Forbidden, Unauthorized, authorize, service_of
from ostler.errors import OstlerError
from ostler.hostd.models import AuditEntry, Caller, EventView, Role
from ostler.hostd.problems import NotFound

router = APIRouter()
UNAUTHORIZED, FORBIDDEN, NOT_FOUND, CONFLICT, TOO_SLOW = 4401, 4403, 4404, 4409, 4008
WAITING_EVENTS = 1000
CHUNK_BYTES = 16 << 10
MAX_BACKLOG = 4 << 20
# Routes by path, for the tests of who may use them.
ROLES = {
    "/v1/events/stream": Role.VIEWER,
    "/v1/stats/stream": Role.VIEWER,
    "/v1/guests/{name}/console": Role.OPERATOR,
}


async def _admit(socket: WebSocket, role: Role) -> Caller | None:
    """Who asks; None where the socket was closed for it."""
    try:
        return await authorize(socket, role)
    except OstlerError as error:
        await _refuse(socket, error)
        return None


async def _refuse(socket: WebSocket, error: OstlerError) -> None:
    codes = ((Unauthorized, UNAUTHORIZED), (Forbidden, FORBIDDEN), (NotFound, NOT_FOUND))
    code = next((code for kind, code in codes if isinstance(error, kind)), CONFLICT)
    # A socket that was never accepted can only be answered 403: the code says what is meant.
    await socket.accept()
    await socket.close(code, str(error)[:120])


@router.websocket("/v1/events/stream")
async def stream_events(socket: WebSocket, since: Annotated[int | None, Query(ge=0, le=2**53)] = None) -> None:
    """What happens, as it happens."""
    if await _admit(socket, ROLES["/v1/events/stream"]) is None:
        return
    events = service_of(socket).host.events
    loop, waiting = asyncio.get_running_loop(), asyncio.Queue[EventView | None](WAITING_EVENTS)

    def put(event: EventView | None) -> None:
        if waiting.full():
            # The reader is told that it missed something by being cut off, and comes again with its last number.
            waiting.get_nowait()
            event = None
        waiting.put_nowait(event)

    def hear(event: EventView) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(put, event)

    await socket.accept()
    missed = events.listen(hear, since)
    try:
        for event in missed:
            await socket.send_text(event.model_dump_json())
        await _until_gone(socket, _send_events(socket, waiting))
    finally:
        events.leave(hear)


async def _send_events(socket: WebSocket, waiting: asyncio.Queue[EventView | None]) -> None:
    while (event := await waiting.get()) is not None:
        await socket.send_text(event.model_dump_json())
    await socket.close(TOO_SLOW, "too slow; come again with the last id")


@router.websocket("/v1/stats/stream")
async def stream_stats(
    socket: WebSocket, interval_s: Annotated[float, Query(ge=0.5, le=60, allow_inf_nan=False)] = 1
) -> None:
    """What the host and its guests use, again and again."""
    if await _admit(socket, ROLES["/v1/stats/stream"]) is None:
        return
    await socket.accept()
    statistics = service_of(socket).statistics

    async def send() -> None:
        while True:
            sample = await to_thread.run_sync(statistics.sample)
            await socket.send_text(sample.model_dump_json())
            await asyncio.sleep(interval_s)

    await _until_gone(socket, send())


@router.websocket("/v1/guests/{name}/console")
async def attach_console(
    socket: WebSocket, name: str, backlog_bytes: Annotated[int, Query(ge=0, le=MAX_BACKLOG)] = 65536
) -> None:
    """A guest's console, both ways."""
    if (caller := await _admit(socket, ROLES["/v1/guests/{name}/console"])) is None:
        return
    service = service_of(socket)
    try:
        service.host.running(name)
        stream, first = await to_thread.run_sync(service.host.launcher.console, name, backlog_bytes)
    except OstlerError as error:
        await _refuse(socket, error)
        return
    service.audit.write(
        AuditEntry(
            time=time.time(), caller=caller.name, role=caller.role.value, address=address_of(socket.scope),
            method="CONSOLE", path=socket.url.path, status=101, detail="",
        )
    )  # fmt: skip
    await socket.accept()
    loop = asyncio.get_running_loop()
    with stream:
        stream.setblocking(False)

        async def say() -> None:
            if first:
                await socket.send_bytes(first)
            while data := await loop.sock_recv(stream, CHUNK_BYTES):
                await socket.send_bytes(data)
            await socket.close(1000, "the guest has ended")

        async def hear(message: bytes) -> None:
            await loop.sock_sendall(stream, message)

        await _until_gone(socket, say(), hear)


async def _until_gone(socket: WebSocket, sending: object, hear: object = None) -> None:
    """Send until that is over or the other side has gone; what it says is for `hear`."""
    sender = asyncio.ensure_future(sending)  # type: ignore[call-overload]
    receiver = asyncio.ensure_future(_receive(socket, hear))
    try:
        await asyncio.wait([sender, receiver], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (sender, receiver):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, WebSocketDisconnect, OSError, RuntimeError):
                await task


async def _receive(socket: WebSocket, hear: object) -> None:
    while (message := await socket.receive())["type"] != "websocket.disconnect":
        data = message.get("bytes") or (message.get("text") or "").encode()
        if data and callable(hear):
            await hear(data)


def address_of(scope: object) -> str:
    """Where a request comes from, for the audit log."""
    client = scope.get("client") if isinstance(scope, dict) else getattr(scope, "get", lambda _: None)("client")
    return f"{client[0]}:{client[1]}" if client else "unix"

"""The dashboard's files: built from web/ into `static`, held in memory, answered with a policy that trusts no one else.

They are the same for everybody and say nothing of this host, so they need no credentials; what they show comes by the
REST API, which does. Left out on purpose: any file that is not in the folder when the service starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

STATIC = Path(__file__).parent / "static"
NOT_BUILT = "the dashboard is not built: `make setup` does that where npm is; the REST API does without"
POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "font-src 'self'",
    "connect-src 'self'", "base-uri 'none'", "form-action 'self'", "frame-ancestors 'none'",
))  # fmt: skip
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Names of built files hold a digest of their content.
_FOREVER, _ASK = "public, max-age=31536000, immutable", "no-cache"


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    headers: dict[str, str]


def is_built(folder: Path = STATIC) -> bool:
    """Whether there is a dashboard to serve."""
    return (folder / "index.html").is_file()


def add(app: Starlette, folder: Path = STATIC) -> None:
    """Give the application the pages: `/` and `/assets/…`. Where nothing was built, `/` says so."""
    files = _read(folder) if is_built(folder) else {}

    async def answer(request: Request) -> Response:
        path = request.url.path
        found = files.get("/index.html" if path == "/" else path)
        if found is not None:
            return Response(found.content, headers=found.headers)
        if path == "/" and not files:
            return PlainTextResponse(NOT_BUILT + "\n", status_code=503, headers=HEADERS)
        return PlainTextResponse("not found\n", status_code=404, headers=HEADERS)

    app.routes.append(Route("/", answer, methods=["GET"], include_in_schema=False))
    app.routes.append(Route("/assets/{path:path}", answer, methods=["GET"], include_in_schema=False))


def _read(folder: Path) -> dict[str, _File]:
    return {
        f"/{path.relative_to(folder).as_posix()}": _File(path.read_bytes(), _headers(path))
        for path in folder.rglob("*")
        if path.suffix in _TYPES and path.is_file()
    }


def _headers(path: Path) -> dict[str, str]:
    cache = _FOREVER if path.parent.name == "assets" else _ASK
    return {**HEADERS, "Content-Type": _TYPES[path.suffix], "Cache-Control": cache}

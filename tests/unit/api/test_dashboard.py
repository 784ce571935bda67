"""The dashboard's files over ASGI: what is served, how, and what is not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the service wants FastAPI")

from starlette.applications import Starlette

from ostler.api import dashboard


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "static" / "assets").mkdir(parents=True)
    (tmp_path / "static" / "index.html").write_text("<!doctype html>")
    (tmp_path / "static" / "assets" / "index-1a2b.js").write_text("1")
    (tmp_path / "static" / "secret.key").write_text("no page's business")
    (tmp_path / "outside.js").write_text("2")
    return tmp_path / "static"


def fetch(folder: Path, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    app = Starlette()
    dashboard.add(app, folder)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": [], "root_path": "", "scheme": "http", "server": ("test", 80)}  # fmt: skip
    asyncio.run(app(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(each.get("body", b"") for each in sent[1:])


def test_page_is_served_with_a_policy_that_allows_nothing_inline_and_nobody_else(folder: Path) -> None:
    status, headers, body = fetch(folder, "/")

    assert (status, body) == (200, b"<!doctype html>")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert headers["cache-control"] == "no-cache"


def test_asset_is_kept_for_ever(folder: Path) -> None:
    status, headers, _ = fetch(folder, "/assets/index-1a2b.js")

    assert status == 200
    assert "immutable" in headers["cache-control"]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["/assets/none.js", "/assets/../../outside.js", "/assets/%2e%2e/secret.key", "/secret.key", "/index.html"]
)
def test_other_paths_are_not_found(folder: Path, path: str) -> None:
    assert fetch(folder, path)[0] == 404


def test_other_methods_are_refused(folder: Path) -> None:
    assert fetch(folder, "/", "POST")[0] == 405


def test_dashboard_that_was_not_built_says_so_in_one_line(tmp_path: Path) -> None:
    status, _, body = fetch(tmp_path, "/")

    assert not dashboard.is_built(tmp_path)
    assert (status, body.decode()) == (503, dashboard.NOT_BUILT + "\n")


def test_built_dashboard_asks_nobody_else() -> None:
    if not dashboard.is_built():
        pytest.skip("the dashboard is not built here")
    page = (dashboard.STATIC / "index.html").read_text()

    assert "http://" not in page
    assert "https://" not in page
    assert "<style" not in page
    assert "<script>" not in page

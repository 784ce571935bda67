"""`ostler --host URL …` against a service in the same process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ostler import cli
from ostler.api.client import Client
from ostler.api.service import Service
from ostler.hostd.models import Role
from tests.unit.api.fakes import client, served
from tests.unit.hostd.fakes import guest


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with served(tmp_path) as found:
        http = client(found, Role.ADMIN)

        @contextlib.contextmanager
        def reach(_url: str | None) -> Iterator[Client]:
            reached = Client("http://testserver")
            reached._http.close()
            reached._http = http  # type: ignore[assignment]
            yield reached

        monkeypatch.setattr("ostler.cli.host.reach", reach)
        yield found


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--host", "local", *arguments])
    return int(caught.value.code or 0)


def test_host_start_and_stop_wait_for_their_jobs(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service.host.define([guest("db"), guest("web", depends_on=["db"])], replace=False)

    assert run("start", "web") == 0
    assert run("ps", "-q") == 0
    assert capsys.readouterr().out == "db\nweb\n"
    assert run("stop", "db") == 0
    assert run("ps", "-q") == 0
    assert capsys.readouterr().out == ""
    assert run("rm", "web", "db") == 0
    assert service.host.guests == {}


def test_host_error_of_the_service_is_one_line_and_its_status(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.host.define([guest("db")], replace=False)

    assert run("kill", "db") == 2
    assert capsys.readouterr().err == "ostler: guest 'db': is defined, expected one that runs\n"


def test_host_without_a_url_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--host"])

    assert caught.value.code == 2
    assert "expected a URL behind it" in capsys.readouterr().err


def test_host_serve_without_its_packages_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)

    with pytest.raises(SystemExit) as caught:
        cli.main(["host", "serve"])

    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "ostler: host: alembic is not installed; expected `pip install 'ostler[host]'`\n"
    )

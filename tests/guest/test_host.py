"""The host service with real guests: in order, adopted after a kill, ended in reverse."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ostler.api.client import Client
from ostler.client import guests
from ostler.control import pool, runtime
from ostler.errors import OstlerError
from tests.guest.harness import OSTLER

pytestmark = [pytest.mark.usefixtures("needs_an_agent"), pytest.mark.timeout(600)]
GUEST = {"image": "debian", "memory": "256M", "nets": ["none"], "accel": "soft"}


class Service:
    """`ostler host serve` in folders of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._environment = {**os.environ, "OSTLER_STATE": str(folder / "state")}
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> Client:
        """It says on standard error when it listens."""
        self._process = subprocess.Popen(
            [*OSTLER, "host", "serve"], env=self._environment, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        assert self._process.stderr.readline().startswith("ostler: listening on unix:")
        return Client(f"unix:{runtime.root() / 'host.sock'}")

    def end(self, number: int) -> int:
        """Send a signal and wait for the end."""
        assert self._process is not None
        self._process.send_signal(number)
        if self._process.stderr is not None:
            self._process.stderr.close()
        return self._process.wait()

    def kill(self) -> None:
        """If a test left it."""
        if self._process is not None and self._process.poll() is None:
            self.end(signal.SIGKILL)


@pytest.fixture
def service(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Service]:
    monkeypatch.setenv("OSTLER_RUNTIME", str(tmp_path_factory.mktemp("r")))
    made = Service(tmp_path)
    yield made
    made.kill()
    for entry in runtime.entries():
        guests.remove(entry, force=True)
    pool.stop()


def states(client: Client) -> dict[str, str]:
    return {each["name"]: each["state"] for each in client.get("/v1/guests")["guests"]}


def first(client: Client, guest: str, **wanted: Any) -> int:
    """The number of the first event in which a guest is so."""
    return next(
        int(each["id"]) for each in client.get("/v1/events")["events"]
        if each["kind"] == "guest" and each["guest"] == guest and wanted.items() <= each["data"].items()
    )  # fmt: skip


def test_guests_start_in_order_survive_the_service_and_end_in_reverse(service: Service) -> None:
    with service.start() as client:
        for name, needs in (("db", []), ("cache", []), ("web", ["db", "cache"])):
            definition = {**GUEST, "name": name, "command": ["sleep", "9999"], "host": {"depends_on": needs}}
            client.post("/v1/guests", {"definition": definition})
        client.wait(client.post("/v1/guests/web/start"))
        assert states(client) == {"db": "running", "cache": "running", "web": "running"}
        begun = first(client, "web", state="starting")
        assert first(client, "db", ready=True) < begun
        assert first(client, "cache", ready=True) < begun
        job = client.wait(client.post("/v1/guests/web/exec", {"argv": ["hostname"]}))
        assert job.result is not None
        assert job.result["stdout"] == "web\n"
        pids = {each["name"]: each["pid"] for each in client.get("/v1/guests")["guests"]}

    service.end(signal.SIGKILL)

    with service.start() as client:
        found = client.get("/v1/guests")["guests"]
        assert {each["name"]: each["pid"] for each in found} == pids
        assert all(each["ready"] for each in found)
        again = client.get(f"/v1/jobs/{job.id}")
        assert again["state"] == "done"
        client.wait(client.post("/v1/guests/db/stop"))
        assert states(client)["web"] == "ended"
        assert first(client, "web", state="ended") < first(client, "db", state="ended")
        # What nobody stopped runs on.
        assert states(client)["cache"] == "running"
        assert service.end(signal.SIGTERM) == 0
    assert [entry.name for entry in runtime.entries() if entry.is_running()] == ["cache"]
    with Client() as nobody, pytest.raises(OstlerError, match="does `ostler host serve` run"):
        nobody.get("/healthz")


def test_host_short_of_memory_takes_back_what_a_guest_can_spare_and_forks_are_admitted(
    service: Service, tmp_path: Path
) -> None:
    (tmp_path / "state").mkdir()
    # However much is available, it is less than this.
    (tmp_path / "state" / "host.toml").write_text('relief = { below = "900000G" }\n[capacity]\nmemory = "700M"\n')
    with service.start() as client:
        client.post("/v1/guests", {"definition": {**GUEST, "name": "db", "command": ["sleep", "9999"]}})
        client.wait(client.post("/v1/guests/db/start"))

        relieved = _relief_of(client, "db")

        assert relieved["refused"] == {}
        assert [*relieved["steps"]] == ["reporting", "balloon"]
        held = relieved["steps"]["balloon"]["db"]["held_bytes"]
        assert held > 16 << 20
        assert client.get("/v1/guests/db/stats", raw="true")["raw"]["balloon"]["held_bytes"] >= held
        with pytest.raises(OstlerError, match="memory: asked 320 MiB, 60 MiB left of 700 MiB"):
            client.post("/v1/guests/db/fork", {"name": "more", "count": 2})
        forked = client.wait(client.post("/v1/guests/db/fork", {"name": "one"}))
        assert forked.result is not None
        assert forked.result["children"] == ["one"]
        assert states(client) == {"db": "running", "one": "running"}


def _relief_of(client: Client, guest: str) -> dict[str, Any]:
    """The event of it; the service looks every few seconds."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for each in client.get("/v1/events")["events"]:
            data: dict[str, Any] = each["data"]
            if data.get("what") == "memory-relieved" and guest in data["steps"].get("balloon", {}):
                return data
        time.sleep(0.5)
    raise AssertionError(f"nothing was taken from {guest}")

"""Guests over the API, with a launcher that has no machines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from ostler.api.service import Service
from ostler.hostd.models import Role
from ostler.planning.history import HOST, History, Sample
from tests.unit.api.fakes import client, served
from tests.unit.hostd.fakes import GIB, FakeLauncher, table


@pytest.fixture
def launcher() -> FakeLauncher:
    return FakeLauncher()


@pytest.fixture
def service(tmp_path: Path, launcher: FakeLauncher) -> Iterator[Service]:
    with served(tmp_path, launcher) as found:
        yield found


@pytest.fixture
def admin(service: Service) -> TestClient:
    return client(service, Role.ADMIN)


def define(admin: TestClient, name: str, **host: Any) -> None:
    answer = admin.post("/v1/guests", json={"definition": table(name, **host)})
    assert answer.status_code == 201, answer.text


def ended(admin: TestClient, job: dict[str, str]) -> dict[str, str]:
    found: dict[str, str] = admin.get(f"/v1/jobs/{job['id']}", params={"wait_s": 20}).json()
    return found


def test_life_of_a_guest(admin: TestClient, launcher: FakeLauncher) -> None:
    define(admin, "db")
    begun = admin.post("/v1/guests/db/start")
    assert begun.status_code == 202
    assert begun.headers["location"] == f"/v1/jobs/{begun.json()['id']}"
    assert ended(admin, begun.json())["state"] == "done"
    assert [each["state"] for each in admin.get("/v1/guests").json()["guests"]] == ["running"]
    assert admin.post("/v1/guests/db/pause").json()["state"] == "paused"
    assert admin.post("/v1/guests/db/resume").json()["state"] == "running"
    assert admin.get("/v1/guests/db/stats").json()["vcpu_time_ns"] == [4]
    assert admin.get("/v1/guests/db/logs").json() == {"text": "db said\n", "source": "console"}
    assert admin.delete("/v1/guests/db").status_code == 409
    assert ended(admin, admin.post("/v1/guests/db/stop", json={"grace_s": 5}).json())["state"] == "done"
    assert admin.get("/v1/guests/db").json()["guest"]["status"] == 0
    assert admin.delete("/v1/guests/db").status_code == 204
    assert admin.get("/v1/guests/db").status_code == 404
    assert launcher.lives == {}


def test_definition_comes_back_as_it_was_given(admin: TestClient) -> None:
    define(admin, "db", autostart=True, restart={"policy": "always"})

    found = admin.get("/v1/guests/db").json()

    assert found["definition"]["host"] == {"autostart": True, "restart": {"policy": "always"}}
    assert admin.put("/v1/guests/db", json={"definition": found["definition"]}).status_code == 200


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"nonsense": 1}, 422, "nonsense '1': not known here"),
        ({"memory": "lots"}, 422, "memory 'lots': expected a size"),
        (
            {"cpus": 99, "host": {"reserve": {"cpu": 99}}},
            409,
            "guest 'db': cpu: asked 99 processors, 4 processors left",
        ),
        ({"host": {"depends_on": ["nobody"]}}, 409, "which is not defined"),
        ({"host": {"depends_on": ["db"]}}, 422, "depends on itself"),
        ({"cpu_reserve": 5, "host": {"reserve": {"cpu": 0.5}}}, 422, "either this or host.reserve.cpu"),
        ({"host": {"what": 1}}, 422, "host.what '1'"),
        ({"name": "a b"}, 422, "name 'a b': expected up to 40 letters"),
    ],
)
def test_define_bad_definition_is_one_clear_line(
    admin: TestClient, changes: dict[str, object], status: int, said: str
) -> None:
    answer = admin.post("/v1/guests", json={"definition": {**table("db"), **changes}})

    assert answer.status_code == status
    assert said in answer.json()["message"]
    assert "\n" not in answer.json()["message"]
    assert admin.get("/v1/guests").json()["guests"] == []


def test_define_name_in_use_is_refused(admin: TestClient) -> None:
    define(admin, "db")

    answer = admin.post("/v1/guests", json={"definition": table("db")})

    assert answer.status_code == 409
    assert answer.json()["message"] == "guest 'db': is defined already; expected another name"


def test_refusal_says_what_is_asked_and_left(admin: TestClient) -> None:
    answer = admin.post("/v1/guests", json={"definition": table("db", memory="12G")})

    assert answer.status_code == 409
    refusal = answer.json()["refusal"]
    assert refusal["resource"] == "memory"
    assert refusal["left"] == refusal["capacity"] == 8 << 30


def test_body_too_large_is_refused_with_and_without_its_length(admin: TestClient) -> None:
    body = b"x" * (1 << 20) + b"y"
    announced = admin.post("/v1/guests", content=body)
    streamed = admin.post("/v1/guests", content=iter([body[: 1 << 19], body[1 << 19 :]]))

    assert [announced.status_code, streamed.status_code] == [413, 413]
    assert announced.json()["kind"] == "TooLarge"


def test_full_database_is_told_and_nothing_begun(admin: TestClient, service: Service, launcher: FakeLauncher) -> None:
    define(admin, "db")
    service.host.store.database.limit_pages(1)
    try:
        refused = admin.post("/v1/guests", json={"definition": {**table("web"), "append": "x" * 100_000}})
    finally:
        service.host.store.database.limit_pages(0)

    assert refused.status_code == 507
    assert "no space left" in refused.json()["message"]
    assert [each["name"] for each in admin.get("/v1/guests").json()["guests"]] == ["db"]
    assert launcher.log == []


def test_console_goes_both_ways(admin: TestClient) -> None:
    define(admin, "db")
    ended(admin, admin.post("/v1/guests/db/start").json())
    with admin.websocket_connect("/v1/guests/db/console") as console:
        assert console.receive_bytes() == b"backlog"
        console.send_bytes(b"hello")
        assert console.receive_bytes() == b"HELLO"


def test_events_stream_tells_what_was_missed_and_what_happens(admin: TestClient) -> None:
    define(admin, "db")
    with admin.websocket_connect("/v1/events/stream?since=0") as stream:
        first = stream.receive_json()
        define(admin, "web")
        kinds, names = [first["kind"]], [first["guest"]]
        while "web" not in names or kinds[-1] != "definition":
            event = stream.receive_json()
            kinds.append(event["kind"])
            names.append(event["guest"])

    assert {"host", "guest", "definition"} <= set(kinds)
    assert admin.get("/v1/events").json()["last"] >= len(kinds)


def test_stats_stream_samples(admin: TestClient) -> None:
    with admin.websocket_connect("/v1/stats/stream") as stream:
        assert stream.receive_json()["host"]["cpus"] >= 1


def test_samples_are_those_that_were_kept(admin: TestClient, service: Service) -> None:
    assert admin.get("/v1/samples").json() == {"samples": []}
    now = time.time()
    used = Sample(now - 60, "db", 60.0, 0.5, GIB, GIB // 4, 1.0, 2.0, 3.0, 4.0, vcpus=1, run_cpus=0.25)
    with History(service.samples) as kept:
        kept.add([used, replace(used, guest=HOST), replace(used, time_s=now - 1)])

    rows = admin.get("/v1/samples", params={"since": now - 90, "until": now - 30}).json()["samples"]

    assert [row["guest"] for row in rows] == [None, "db"]
    assert (rows[1]["cpu_time_ns"], rows[1]["run_ns"], rows[1]["disk_read_bytes"]) == (30 * 10**9, 15 * 10**9, 60)
    assert len(admin.get("/v1/samples?guest=db").json()["samples"]) == 2
    assert len(admin.get("/v1/samples?limit=1").json()["samples"]) == 1


def test_metrics_are_those_that_are_documented(admin: TestClient) -> None:
    define(admin, "db")
    ended(admin, admin.post("/v1/guests/db/start").json())
    text = admin.get("/metrics").text
    found = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ostler_")}
    page = (Path(__file__).parents[3] / "docs" / "host.md").read_text()
    documented = {line.split("`")[1].partition("{")[0] for line in page.splitlines() if line.startswith("| `ostler_")}

    assert {name for name in found if not name.endswith("_created")} == documented
    assert 'ostler_guests{state="running"} 1.0' in text

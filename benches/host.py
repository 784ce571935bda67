"""`python -m benches.host start|load|kills`: the host service with real guests, in folders of its own.

start   twelve guests with dependencies, from the service's start to all ready: order checked, wall time
load    the same twelve running, and fifty clients that list them: percentiles, anything lost
kills   the service killed (SIGKILL) at random moments under load: guests run on, jobs and definitions come back
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ostler.api.client import Client
from ostler.errors import OstlerError

READY_S, SETTLE_S = 30.0, 60.0
GUEST = {"image": "debian", "memory": "256M", "nets": ["none"]}
COUNTING = ["sh", "-c", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done"]
# Two roots, four on each, one that needs both, one at the end of a chain.
NEEDS: dict[str, list[str]] = {
    "storage": [], "network": [],
    **{f"db-{number}": ["storage"] for number in range(4)},
    **{f"web-{number}": ["network"] for number in range(4)},
    "front": ["storage", "network"], "report": ["front", "db-0"],
}  # fmt: skip


class Service:
    """`ostler host serve` in folders of its own; guests in them outlive it until `end`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ, "OSTLER_RUNTIME": str(folder / "run"), "OSTLER_STATE": str(folder / "state"),
        }  # fmt: skip
        os.environ |= {name: self.environment[name] for name in ("OSTLER_RUNTIME", "OSTLER_STATE")}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "run" / "host.sock"

    def start(self, *options: str) -> Client:
        """Start it and wait until it answers."""
        log = (self.folder / "serve.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ostler", "host", "serve", *options], env=self.environment, stderr=log
        )
        until, client = time.monotonic() + READY_S, Client(f"unix:{self.socket}")
        while time.monotonic() < until:
            with contextlib.suppress(OstlerError):
                client.get("/healthz")
                return client
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise SystemExit(f"the service did not come up: {(self.folder / 'serve.log').read_text()[-500:]}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """Nothing is left: neither guests, nor the service, nor the pool."""
        from ostler.client import guests
        from ostler.control import pool, runtime

        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        for entry in runtime.entries():
            with contextlib.suppress(OstlerError):
                guests.remove(entry, force=True)
        pool.stop()


@contextlib.contextmanager
def service() -> Iterator[Service]:
    """One for a measurement."""
    with tempfile.TemporaryDirectory(prefix="ostler-host-") as folder:
        made = Service(Path(folder))
        try:
            yield made
        finally:
            made.end()


def write_guests(folder: Path) -> Path:
    """The twelve, a TOML file each."""
    place = folder / "guests"
    place.mkdir()
    for name, needs in NEEDS.items():
        lines = [f"{key} = {json.dumps(value)}" for key, value in GUEST.items()]
        lines += ["[host]", "autostart = true", f"depends_on = {json.dumps(needs)}"]
        (place / f"{name}.toml").write_text("\n".join(lines) + "\n")
    return place


def start_twelve(made: Service) -> Client:
    """From the service's start to all ready."""
    began = time.monotonic()
    client = made.start("--guests", str(write_guests(made.folder)))
    answers = time.monotonic() - began
    while not all(each["ready"] for each in client.get("/v1/guests")["guests"]):
        time.sleep(0.1)
    took = time.monotonic() - began
    begun: dict[str, float] = {}
    ready: dict[str, float] = {}
    for event in client.get("/v1/events")["events"]:
        if event["kind"] == "guest":
            name, data = event["guest"], event["data"]
            if data["state"] == "starting":
                begun.setdefault(name, event["id"])
            if data["ready"]:
                ready.setdefault(name, event["id"])
    wrong = [(name, need) for name, needs in NEEDS.items() for need in needs if begun[name] < ready[need]]
    print(f"start: {len(NEEDS)} guests ready after {took:.1f} s (the service answers after {answers:.1f} s); "
          f"{sum(map(len, NEEDS.values()))} dependencies, {len(wrong)} begun too early")  # fmt: skip
    if wrong:
        raise SystemExit(f"begun before what they need was ready: {wrong}")
    return client


async def list_again_and_again(path: Path, until: float, pace_s: float, took: list[float], lost: Counter[str]) -> None:
    """One client: a connection that is kept."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    request = b"GET /v1/guests HTTP/1.1\r\nhost: host\r\n\r\n"
    await asyncio.sleep(random.random() * pace_s)
    while time.monotonic() < until:
        begun = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
        body = await reader.readexactly(length)
        took.append(time.perf_counter() - begun)
        if b" 200 " not in head[:20] or len(json.loads(body)["guests"]) < len(NEEDS):
            lost["answers"] += 1
        if pace_s:
            await asyncio.sleep(max(0.0, pace_s - (time.perf_counter() - begun)))
    writer.close()


async def change_and_listen(client_path: Path, until: float, lost: Counter[str]) -> int:
    """Meanwhile a guest is defined and removed again and again, and somebody hears of it: no number is left out."""
    import websockets

    seen = 0

    async def hear() -> None:
        nonlocal seen
        last = None
        async with websockets.unix_connect(str(client_path), "ws://host/v1/events/stream") as stream:
            with contextlib.suppress(asyncio.TimeoutError):
                while time.monotonic() < until + 1:
                    event = json.loads(await asyncio.wait_for(stream.recv(), 2))
                    lost["events"] += last is not None and event["id"] != last + 1
                    last, seen = event["id"], seen + 1

    def change() -> None:
        with Client(f"unix:{client_path}") as client:
            while time.monotonic() < until:
                client.post("/v1/guests", {"definition": {**GUEST, "name": "extra"}})
                client.delete("/v1/guests/extra")
                time.sleep(0.2)

    await asyncio.gather(hear(), asyncio.to_thread(change))
    return seen


async def load(path: Path, *, clients: int, seconds: float, pace_s: float) -> None:
    """Fifty clients at once."""
    took: list[float] = []
    lost: Counter[str] = Counter()
    until = time.monotonic() + seconds
    *_, events = await asyncio.gather(
        *(list_again_and_again(path, until, pace_s, took, lost) for _ in range(clients)),
        change_and_listen(path, until, lost),
    )
    took.sort()
    shown = ", ".join(f"p{share:g} {took[min(len(took) - 1, int(len(took) * share / 100))] * 1000:.1f} ms"
                      for share in (50, 90, 99, 99.9))  # fmt: skip
    pace = f"one request every {pace_s * 1000:.0f} ms each" if pace_s else "one after another, without a pause"
    print(f"load: {clients} clients, {pace}, {seconds:.0f} s: {len(took)} lists ({len(took) / seconds:.0f}/s), "
          f"{shown}, longest {took[-1] * 1000:.1f} ms; {events} events heard; "
          f"lost: {dict(+lost) or 'nothing'}")  # fmt: skip


class Load:
    """Changes under way while the service is killed: what it was asked for, and answered, has to be found again."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.jobs: dict[str, str] = {}
        self.defined: set[str] = set()
        self.stopping = False
        self._threads = [
            threading.Thread(target=each, daemon=True) for each in (self._flap, self._execute, self._define)
        ]

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self.stopping = True
        for thread in self._threads:
            thread.join()

    def _each(self, call: Any) -> None:
        while not self.stopping:
            with contextlib.suppress(OstlerError, OSError), Client(self._url) as client:
                call(client)
            time.sleep(0.05)

    def _flap(self) -> None:
        def call(client: Client) -> None:
            job = client.post("/v1/guests/flap/start")
            self.jobs[job["id"]] = "start"
            client.get(f"/v1/jobs/{job['id']}", wait_s=random.choice((0, 1, 10)))
            client.post("/v1/guests/flap/kill")

        self._each(call)

    def _execute(self) -> None:
        def call(client: Client) -> None:
            job = client.post(f"/v1/guests/steady-{random.randrange(3)}/exec", {"argv": ["true"]})
            self.jobs[job["id"]] = "exec"
            client.wait(job)

        self._each(call)

    def _define(self) -> None:
        def call(client: Client) -> None:
            name = f"extra-{len(self.defined)}"
            client.call("PUT", f"/v1/guests/{name}", body={"definition": GUEST})
            # Answered, so it is there for good.
            self.defined.add(name)
            time.sleep(0.5)

        self._each(call)


def kills(made: Service, rounds: int) -> None:
    """See the module's text."""
    client = made.start()
    for number in range(3):
        definition = {**GUEST, "name": f"steady-{number}", "command": COUNTING}
        client.post("/v1/guests", {"definition": definition, "start": True})
    client.post("/v1/guests", {"definition": {**GUEST, "name": "flap"}})
    steady = [f"steady-{number}" for number in range(3)]
    while not all(client.get(f"/v1/guests/{name}")["guest"]["ready"] for name in steady):
        time.sleep(0.2)
    pids = {name: client.get(f"/v1/guests/{name}")["guest"]["pid"] for name in steady}
    load_ = Load(f"unix:{made.socket}")
    load_.begin()
    came_back, faults = [], 0
    for _ in range(rounds):
        time.sleep(random.uniform(0.05, 1.5))
        made.kill()
        began = time.monotonic()
        client = made.start()
        came_back.append(time.monotonic() - began)
        faults += check_round(client, pids)
    load_.end()
    faults += check_jobs(client, load_)
    came_back.sort()
    print(f"kills: {rounds} times; the service answers again after {came_back[len(came_back) // 2]:.2f} s "
          f"(longest {came_back[-1]:.2f} s); {faults} faults")  # fmt: skip
    faults += check_end(client, made)
    if faults:
        raise SystemExit(f"{faults} faults")


def check_round(client: Client, pids: dict[str, int]) -> int:
    """Guests that nobody touched are the same processes, and known as running."""
    until, wrong = time.monotonic() + SETTLE_S, [*pids]
    while time.monotonic() < until:
        found = {each["name"]: each for each in client.get("/v1/guests")["guests"]}
        wrong = [name for name, pid in pids.items() if found[name]["pid"] != pid or found[name]["state"] != "running"]
        if not wrong:
            return 0
        time.sleep(0.05)
    print(f"not as they were: {wrong}")
    return len(wrong)


def check_jobs(client: Client, load_: Load) -> int:
    """Every job somebody was told of is known, and comes to an end; every definition that was answered is there."""
    until, left = time.monotonic() + SETTLE_S, dict(load_.jobs)
    states: Counter[str] = Counter()
    while left and time.monotonic() < until:
        for identifier in [*left]:
            with contextlib.suppress(OstlerError):
                job = client.get(f"/v1/jobs/{identifier}")
                if job["state"] not in {"queued", "running"}:
                    states[f"{left.pop(identifier)} {job['state']}"] += 1
        time.sleep(0.1)
    known = {each["name"] for each in client.get("/v1/guests")["guests"]}
    lost = load_.defined - known
    print(f"kills: {len(load_.jobs)} jobs were begun: {dict(sorted(states.items()))}; "
          f"{len(left)} lost or without an end; {len(load_.defined)} definitions, {len(lost)} lost")  # fmt: skip
    return len(left) + len(lost)


def check_end(client: Client, made: Service) -> int:
    """After everything was stopped no VM process of this runtime folder is left."""
    for job in client.post("/v1/host/down")["jobs"]:
        with contextlib.suppress(OstlerError):
            client.wait(job)
    mark = f"{made.folder}/run/guests/".encode()
    left = 0
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = each.read_bytes()
            left += mark in words and b"ostler" in words
    print(f"kills: {left} processes left after all guests were stopped")
    return left


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "load", "kills"))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--pace-ms", type=float, nargs="+", default=[100], help="0: as fast as answers come")
    given = parser.parse_args()
    with service() as made:
        if given.what == "kills":
            kills(made, given.rounds)
            return
        start_twelve(made)
        if given.what == "load":
            for pace_ms in given.pace_ms:
                asyncio.run(load(made.socket, clients=given.clients, seconds=given.seconds, pace_s=pace_ms / 1000))


if __name__ == "__main__":
    main()

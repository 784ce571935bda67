"""Calls from user space of a real guest, by the tool that the agent is, and what the host sees of them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import ostler
from ostler.client import guests
from ostler.snapshot import store

pytestmark = pytest.mark.usefixtures("needs_an_agent")
TOOL = ("/proc/1/exe", "call")
OWN = 0x1000


@pytest.fixture(scope="module")
def vm() -> Iterator[ostler.VM]:
    with ostler.VM("debian", memory="384M", accel="soft", nets=["none"], calls="log,keys,ready,snapshot,own") as vm:
        yield vm


def call(vm: ostler.VM, *words: str) -> str:
    return vm.run([*TOOL, *words], check=True).text.strip()


def test_guest_logs_reports_readiness_and_exchanges_keys(vm: ostler.VM) -> None:
    with vm.events(timeout_s=60) as events:
        call(vm, "log", "hello from user space")
        assert next(e for e in events if e["event"] == "call-log")["text"] == "hello from user space"
        assert not vm.calls.is_ready
        call(vm, "ready")
        assert next(e for e in events if e["event"] == "ready")["status"] == 0
    assert vm.calls.is_ready
    call(vm, "put", "address", "10.0.0.7")
    assert vm.calls.keys == {"address": "10.0.0.7"}
    vm.calls.put("role", "primary")
    assert call(vm, "get", "role") == "primary"
    missing = vm.run([*TOOL, "get", "nothing"])
    assert (missing.returncode, b"No such file" in missing.stderr) == (1, True)


def test_call_of_ones_own_is_answered_in_python(vm: ostler.VM) -> None:
    with vm.calls.serving(OWN, lambda _arguments, data: data.upper()):
        assert call(vm, "own", str(OWN), "moon") == "4 MOON"


def test_guest_without_privilege_cannot_call(vm: ostler.VM) -> None:
    done = vm.run(["/bin/sh", "-c", "cp /proc/1/exe /tmp/agent; exec setpriv --reuid 65534 /tmp/agent call log x"])
    assert done.returncode == 1
    assert b"Operation not permitted" in done.stderr


def test_guest_saves_itself_and_its_copy_knows_that_it_is_one(vm: ostler.VM) -> None:
    name = f"{vm.name}-own"
    try:
        assert call(vm, "snapshot", "own") == f"saved {name}"
        assert store.find(name).manifest.guest == vm.name
    finally:
        store.remove(name)


def test_bench_compares_calls_with_bare_port_exits(vm: ostler.VM) -> None:
    found = json.loads(call(vm, "bench", "2000"))
    assert found["port_ns"] > 0
    assert found["call_ns"] > found["port_ns"]
    assert guests.request(vm._running().entry, "calls")["counts"]["served"] >= 10_000

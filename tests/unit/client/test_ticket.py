"""Tickets: what plain words came to is found again as long as everything it came from is what it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ostler.client import ticket
from ostler.client.job import Job
from ostler.client.plan import Plan
from ostler.config import parse_guest

WORDS = {"image": "debian", "cold": False, "memory": "1G"}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setenv("OSTLER_CACHE", str(tmp_path / "cache"))
    for name in ("vmlinuz", "initrd.img", "disk.raw", "manifest.json"):
        (tmp_path / name).write_text(name)
    spec = parse_guest(
        kernel=tmp_path / "vmlinuz", initrd=tmp_path / "initrd.img", disks=[f"{tmp_path}/disk.raw,overlay"],
        nets=["passt"], vsock_cid=3,
    )  # fmt: skip
    job = Job(("entry", "true"), {"A": "b"}, "/tmp", "nobody")
    facts = {"image": "debian", "command": ["entry", "true"], "durable": False}
    return Plan(
        "debian-ab12", spec, job, "agent", is_service=True, is_durable=False, facts=facts,
        settings={"hostname": "debian-ab12"},
    )  # fmt: skip


def leave(plan: Plan, tmp_path: Path, command: tuple[str, ...] = ("true",)) -> None:
    files = [tmp_path / "vmlinuz", tmp_path / "initrd.img", tmp_path / "manifest.json"]
    ticket.leave(WORDS, command, plan, folder=tmp_path, files=files)


def test_ticket_gives_a_guest_of_its_own_for_another_command(plan: Plan, tmp_path: Path) -> None:
    leave(plan, tmp_path)
    found = ticket.find(WORDS, ("echo", "42"))

    assert found is not None
    assert found.job == Job(("entry", "echo", "42"), {"A": "b"}, "/tmp", "nobody")
    assert found.name.startswith("debian-")
    assert found.settings == {"hostname": found.name}
    assert found.facts == {"image": "debian", "command": ["entry", "echo", "42"], "durable": False}
    assert (found.spec_json, found.folder) == (plan.spec_json, tmp_path)
    assert (found.spec.nets, found.spec.vsock_cid) == (("passt",), 3)


def rewrite(folder: Path) -> None:
    (folder / "vmlinuz").write_text("another")


def touch(folder: Path) -> None:
    os.utime(folder / "initrd.img", ns=(1, 1))


def remove(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage(folder: Path) -> None:
    (place,) = (folder / "cache" / "tickets").iterdir()
    place.write_text('{"format": 1}')


@pytest.mark.parametrize("change", [rewrite, touch, remove, damage])
def test_ticket_does_not_hold_when_something_is_another(
    plan: Plan, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    leave(plan, tmp_path)
    change(tmp_path)

    assert ticket.find(WORDS, ("true",)) is None


def test_ticket_is_for_the_same_words_and_settings(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(plan, tmp_path)

    assert ticket.find({**WORDS, "memory": "2G"}, ("true",)) is None
    monkeypatch.setenv("OSTLER_ENGINE", "interp")
    assert ticket.find(WORDS, ("true",)) is None


def test_plan_that_is_more_than_its_words_leaves_no_ticket(plan: Plan, tmp_path: Path) -> None:
    leave(plan, tmp_path, command=("false",))
    assert ticket.find(WORDS, ("true",)) is None

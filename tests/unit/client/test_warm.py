"""Which guests may begin booted, and what makes two boots the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ostler.client import warm
from ostler.client.job import Job
from ostler.client.plan import Plan
from ostler.config import parse_guest


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    for name in ("vmlinuz", "initrd.img", "disk.raw"):
        (tmp_path / name).touch()
    spec = parse_guest(
        kernel=tmp_path / "vmlinuz", initrd=tmp_path / "initrd.img", disks=[f"{tmp_path}/disk.raw,overlay"],
        nets=["passt"], vsock_cid=3,
    )  # fmt: skip
    job = Job(("true",), {}, None, None)
    return Plan("one", spec, job, "agent", is_service=True, is_durable=False, facts={"digest": "abc"})


def with_spec(plan: Plan, **values: Any) -> Plan:
    given = {**plan.spec.model_dump(), **values}
    return dataclasses.replace(plan, spec=parse_guest(**given))


def test_ordinary_guest_may_begin_booted(plan: Plan) -> None:
    assert warm.is_fit(plan)


@pytest.mark.parametrize(
    "values",
    [
        {"disks": ()},
        {"disks": ["/a.raw,overlay", "/b.raw,overlay"]},
        {"disks": ["/a.raw"]},
        {"nets": ["tap=tap0"]},
        {"nets": ["passt,ip=10.0.0.2/24"]},
        {"vsock_cid": None},
        {"test_devices": True},
    ],
)
def test_guest_with_something_of_its_own_boots(plan: Plan, values: dict[str, Any]) -> None:
    assert not warm.is_fit(with_spec(plan, **values))


def test_guest_that_is_kept_or_has_its_own_init_boots(plan: Plan) -> None:
    assert not warm.is_fit(dataclasses.replace(plan, is_durable=True))
    assert not warm.is_fit(dataclasses.replace(plan, boot="init"))


def test_key_is_that_of_everything_a_boot_depends_on(plan: Plan) -> None:
    same = dataclasses.replace(plan, name="two", job=Job((), {}, None, None), settings={"hostname": "two"})
    assert warm.key(same) == warm.key(plan)
    assert warm.key(with_spec(plan, ports=["8080:80"])) == warm.key(plan)
    others = [
        with_spec(plan, memory="1G"),
        with_spec(plan, cpus=2),
        with_spec(plan, cpu="ostler-v1.1"),
        with_spec(plan, append="quiet"),
        dataclasses.replace(plan, facts={"digest": "def"}),
    ]
    assert len({warm.key(each) for each in (plan, *others)}) == 1 + len(others)


def test_key_changes_with_the_kernel(plan: Plan) -> None:
    before = warm.key(plan)
    plan.spec.kernel.unlink()
    plan.spec.kernel.write_bytes(b"another")
    assert warm.key(plan) != before

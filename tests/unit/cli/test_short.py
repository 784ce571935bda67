"""The short way of `ostler run`: it makes the guest the long way makes, or leaves the request to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ostler.cli.short import PlainGuest, plain_guest, plain_image
from ostler.config import GuestSpec, parse_guest

PLAIN = ["run", "--kernel", "vmlinuz", "--initrd", "initrd.img", "--memory", "256M", "--cpus", "2", "--accel", "kvm"]


def same(plain: PlainGuest, spec: GuestSpec) -> bool:
    return all(getattr(plain, field) == getattr(spec, field) for field in GuestSpec.model_fields)


def test_plain_guest_is_the_one_parse_guest_makes() -> None:
    plain = plain_guest([*PLAIN, "--append", "quiet panic=-1"])

    assert plain is not None
    assert same(
        plain,
        parse_guest(
            kernel="vmlinuz", initrd="initrd.img", memory="256M", cpus="2", accel="kvm", append="quiet panic=-1"
        ),
    )


def test_short_way_loads_no_library_that_judges() -> None:
    program = "import sys, ostler.cli.kernel_run, ostler.vmm.run; sys.exit('pydantic' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_plain_guest_defaults_are_the_specifications() -> None:
    plain = plain_guest(["run", "--kernel", "vmlinuz"])

    assert plain is not None
    assert same(plain, parse_guest(kernel=Path("vmlinuz"), append="console=ttyS0"))
    assert set(PlainGuest.__dataclass_fields__) == set(GuestSpec.model_fields)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run"],
        ["doctor"],
        ["run", "debian"],
        ["run", "--kernel"],
        ["run", "--kernel="],
        ["run", "--kernel", "a", "--kernel", "b"],
        ["run", "--kernel", "--initrd"],
        ["run", "--kernel", "a", "--cpu", "ostler-v1.1"],
        ["run", "--kernel", "a", "--disk", "d"],
        ["run", "--kernel", "a", "--memory", "1M"],
        ["run", "--kernel", "a", "--memory", "1.5G"],
        ["run", "--kernel", "a", "--memory", "99999G"],
        ["run", "--kernel", "a", "--cpus", "0"],
        ["run", "--kernel", "a", "--append", "tab\there"],
        ["run", "--kernel", "a", "--accel", "xen"],
        ["run", "--timing", "--kernel", "a"],
    ],
)
def test_anything_else_goes_the_long_way(arguments: list[str]) -> None:
    assert plain_guest(arguments) is None


def test_plain_image_is_what_the_long_way_understands() -> None:
    assert plain_image(["run", "--accel", "soft", "debian", "--memory", "1G", "--cold"]) == {
        "image": "debian", "accel": "soft", "memory": "1G", "cold": True,
    }  # fmt: skip
    assert plain_image(["run", "reg.example/app:1"]) == {"image": "reg.example/app:1", "cold": False}


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["exec", "debian"],
        ["run", "debian", "again"],
        ["run", "Debian"],
        ["run", "debian", "--name", "web"],
        ["run", "debian", "--kernel", "vmlinuz"],
        ["run", "debian", "--memory", "much"],
        ["run", "debian", "--memory"],
        ["run", "debian", "--cold", "--cold"],
        ["run", "--help", "debian"],
    ],
)
def test_what_is_no_plain_image_goes_the_long_way(arguments: list[str]) -> None:
    assert plain_image(arguments) is None

"""What `ostler run` fills in where the user left something open."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from ostler.cli import kernel_run, terminal
from ostler.config import GuestSpec, parse_guest, parse_request
from ostler.errors import BadRequest
from ostler.images import Kernel, initrd, kernels
from ostler.images.progress import silent


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the archive; the names of the kernels fetched."""
    names: list[str] = []

    def fetch(name: str, progress: object) -> Kernel:
        assert progress is silent
        names.append(name)
        return Kernel(name, "6.0", "6.0-1", Path("/cache") / name, Path("/config"), (), Path("/cache/p.deb"), "0")

    monkeypatch.setattr(kernels, "fetch", fetch)
    monkeypatch.setattr(initrd, "busybox", lambda kernel, _: Path("/cache/initrd") / kernel.name)
    monkeypatch.setattr(kernel_run, "os", FakeOs(tty=False))
    return names


class FakeOs:
    """What kernel_run.py asks of the module `os`."""

    def __init__(self, *, tty: bool) -> None:
        self.environ = {"TERM": "xterm"}
        self._tty = tty

    def isatty(self, fd: int) -> bool:
        assert fd == 0
        return self._tty


def complete(
    *, image: str | None = None, kernel: str | None = None, append: str | None = None, ramdisk: str | None = None
) -> GuestSpec:
    spec = parse_guest(kernel=kernel or "/dev/null", initrd=ramdisk, append=append or "")
    return kernel_run.with_material(spec, image=image, kernel=kernel, append=append, progress=silent)


def test_nothing_given_without_terminal_is_a_report_on_the_default_kernel(fetched: list[str]) -> None:
    spec = complete()

    assert fetched == ["debian-12-cloud"]
    assert spec.kernel == Path("/cache/debian-12-cloud")
    assert spec.initrd == Path("/cache/initrd/debian-12-cloud")
    assert spec.append == "console=ttyS0 ostler.report"


def test_nothing_given_on_a_terminal_is_a_shell_that_knows_it(
    fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_run, "os", FakeOs(tty=True))
    monkeypatch.setattr(terminal, "size", lambda _: os.terminal_size((100, 30)))

    assert complete(image="debian-13-cloud").append == "console=ttyS0 ostler.tty=30x100 ostler.term=xterm"
    assert fetched == ["debian-13-cloud"]


def test_append_is_added_for_ostlers_kernel_and_chooses_what_init_does(fetched: list[str]) -> None:
    assert complete(append="quiet").append == "console=ttyS0 quiet ostler.report"
    assert complete(append="ostler.panic").append == "console=ttyS0 ostler.panic"
    assert len(fetched) == 2


def test_own_initrd_on_ostlers_kernel_is_not_told_about_ostler(fetched: list[str]) -> None:
    spec = complete(ramdisk="/my.img")

    assert (spec.initrd, spec.append) == (Path("/my.img"), "console=ttyS0")
    assert fetched == ["debian-12-cloud"]


def test_own_kernel_gets_exactly_what_was_given(fetched: list[str]) -> None:
    spec = complete(kernel="/k", append="a b")

    assert (spec.kernel, spec.initrd, spec.append) == (Path("/k"), None, "a b")
    assert complete(kernel="/k").append == "console=ttyS0"
    assert fetched == []


def test_two_kernels_are_refused(fetched: list[str]) -> None:
    with pytest.raises(BadRequest, match="only one kernel"):
        complete(image="debian-12", kernel="/k")
    assert fetched == []


def test_run_kernel_guest_has_the_policies_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    specs: list[GuestSpec] = []

    def run(spec: GuestSpec, _phases: object) -> Result:
        specs.append(spec)
        return Result(exit_status=0)

    monkeypatch.setattr(kernel_run, "run", run)
    request = parse_request(kernel="vmlinuz", initrd="initrd", on_panic="pause", cpu_weight=200, calls="none")

    assert kernel_run.run_kernel(request, timing=False) == 0

    (spec,) = specs
    assert (spec.on_panic, spec.cpu_weight, spec.calls) == ("pause", 200, ())


@dataclass
class Result:
    """All that is asked of one."""

    exit_status: int

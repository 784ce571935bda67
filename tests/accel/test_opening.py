"""Opening an accelerator: what `auto` chooses and why, and one clear line where nothing can be opened."""

import errno
import importlib
import json
import os
import sys
from pathlib import Path

import pytest

from ostler import accel
from ostler.accel import soft
from ostler.accel.kvm import KvmSystem
from ostler.accel.opener import open_accelerator
from ostler.accel.probe import KvmReport, KvmState
from ostler.errors import AccelUnavailable, BadRequest

# `ostler.accel.probe` is the function; this is the module it lives in.
probing = importlib.import_module("ostler.accel.probe")

NATIVE = (5000.0, 6000.0)
EMULATED = (0.5, 6000.0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and KVM that opens, whatever this host has."""
    monkeypatch.setattr(probing.platformdirs, "user_cache_dir", lambda _name: str(tmp_path))
    monkeypatch.setattr(probing, "KvmSystem", Openable)
    return tmp_path / "accel-probe.json"


class Openable:
    def close(self) -> None:
        pass


def measuring(monkeypatch: pytest.MonkeyPatch, result: tuple[float, float] | str) -> list[int]:
    calls: list[int] = []

    def measure() -> tuple[float, float] | str:
        calls.append(1)
        return result

    monkeypatch.setattr(probing, "_measure", measure)
    return calls


def engine(monkeypatch: pytest.MonkeyPatch, *, present: bool) -> None:
    def open_engine() -> Openable:
        if not present:
            raise AccelUnavailable("the software CPU is not built: told so")
        return Openable()

    monkeypatch.setattr(probing, "open_engine", open_engine)


def test_open_unknown_name_lists_the_known() -> None:
    with pytest.raises(BadRequest, match="accelerator 'hvf': expected one of auto, kvm, soft"):
        accel.open("hvf")


def test_open_kvm_absent_says_so(tmp_path: Path) -> None:
    with pytest.raises(AccelUnavailable, match=r"/kvm does not exist: this host offers no KVM$"):
        KvmSystem(str(tmp_path / "kvm"))


def test_open_kvm_that_is_something_else_says_so() -> None:
    with pytest.raises(AccelUnavailable, match=r"^/dev/null is not KVM: "):
        KvmSystem("/dev/null")


def test_open_kvm_forbidden_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)

    with pytest.raises(AccelUnavailable, match=r"^/dev/kvm may not be opened by this user: .* \(group kvm\)$"):
        KvmSystem()


def test_engine_absent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ostler._soft", None)

    with pytest.raises(AccelUnavailable, match=r"^the software CPU is not built: "):
        soft.open_engine()


def test_engine_without_a_capability_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldSystem:
        def ioctl(self, request: int, arg: int = 0) -> int:
            return 12 if request == 0xAE00 else int(arg != 32)

    class OldEngine:
        System = OldSystem

    monkeypatch.setattr(soft, "load_engine", OldEngine)

    with pytest.raises(AccelUnavailable, match=r"^the software CPU is too old: it lacks KVM_CAP_IRQFD$"):
        soft.open_engine()


def test_auto_takes_native_kvm(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(monkeypatch, NATIVE)
    engine(monkeypatch, present=True)

    report = probing.probe()

    assert report.choice == "kvm"
    assert report.text == "kvm: KVM runs at native speed (5,000.0 M instructions/s, the host itself 6,000.0)"
    assert cache.exists()


def test_auto_takes_the_software_cpu_where_kvm_emulates(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(monkeypatch, EMULATED)
    engine(monkeypatch, present=True)

    report = probing.probe()

    assert (report.choice, report.kvm.state) == ("soft", KvmState.EMULATED)
    assert report.text == "soft: KVM here emulates its guests (0.5 M instructions/s, the host itself 6,000.0)"
    assert cache.exists()


def test_auto_has_nothing_to_take_and_says_both_reasons(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(monkeypatch, EMULATED)
    engine(monkeypatch, present=False)

    assert probing.probe().choice is None
    with pytest.raises(AccelUnavailable, match=r"^no accelerator: KVM here emulates .*; the software CPU is not built"):
        open_accelerator("auto")
    assert cache.exists()


def test_verdict_is_cached_for_this_boot(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = measuring(monkeypatch, NATIVE)

    first, second = probing.probe_kvm(), probing.probe_kvm()

    assert len(calls) == 1
    assert (first.cached, second.cached) == (False, True)
    entry = json.loads(cache.read_text())
    entry["key"]["boot"] = "another"
    cache.write_text(json.dumps(entry))
    assert probing.probe_kvm().cached is False


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"key": 5, "report": null}', "\x00"])
def test_cache_that_makes_no_sense_is_no_cache(cache: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    measuring(monkeypatch, NATIVE)
    cache.write_text(content)

    assert probing.probe_kvm().state is KvmState.NATIVE


def test_failure_is_not_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(monkeypatch, "a short loop did not end in 10 s")

    report = probing.probe_kvm()

    assert report == KvmReport(KvmState.FAILED, "KVM is not usable: a short loop did not end in 10 s")
    assert not cache.exists()


def test_cache_that_cannot_be_written_is_done_without(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(monkeypatch, NATIVE)
    cache.mkdir()

    assert probing.probe_kvm().state is KvmState.NATIVE


@pytest.mark.usefixtures("cache")
def test_warning_for_who_insists_on_an_emulating_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(monkeypatch, EMULATED)

    text = probing.warning("kvm")

    assert text.startswith("KVM here emulates its guests (0.5 M instructions/s")
    assert text.endswith("many times slower than with --accel soft")
    assert probing.warning("soft") is None


@pytest.mark.usefixtures("cache")
def test_no_warning_where_kvm_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    measuring(monkeypatch, NATIVE)

    assert probing.warning("kvm") is None

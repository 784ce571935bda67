"""One body for every accelerator: the `lab` fixture comes once for each, a missing one is a visible skip."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from ostler import accel
from ostler.accel.api import Accel
from ostler.accel.fitting import missing_features
from ostler.accel.models import model
from ostler.accel.probe import KvmState, probe_kvm
from ostler.errors import AccelUnavailable
from tests.accel.deviations import QEMU_SVM, QEMU_SVM_AT_TIMES, host_is_qemus_emulation, table_key
from tests.accel.lab import Machine

ACCELERATORS = ("kvm", "soft")


@dataclass(frozen=True)
class Lab:
    """An accelerator, and machines on it."""

    name: str
    accel: Accel

    @functools.cached_property
    def emulated_kvm(self) -> bool:
        """A KVM that emulates ring 0 by its own instruction emulator, which knows part of the instruction set."""
        return self.name == "kvm" and not self.emulated_svm and probe_kvm().state is KvmState.EMULATED

    @functools.cached_property
    def emulated_svm(self) -> bool:
        """A native KVM, but on a processor that QEMU emulates: the nested lab."""
        return self.name == "kvm" and host_is_qemus_emulation()

    def skip_where_missing(self, *features: str) -> None:
        """For tests of what this accelerator's processor does not have and the model does."""
        lacking = sorted(set(features) & self._missing)
        if lacking:
            pytest.skip(f"{self.name} on this host gives its guests no {', '.join(lacking)}")

    @functools.cached_property
    def _missing(self) -> set[str]:
        return set(missing_features(model(), self.accel))

    def skip_where_emulated(self, reason: str) -> None:
        """For what would not end there; what merely fails is marked `emulated_kvm_deviates`."""
        if self.emulated_kvm:
            pytest.skip(reason)

    def machine(self, source: str, **options: Any) -> Machine:
        """A machine loaded with a program; see Machine for the options."""
        return Machine(self.accel, source, **options)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "emulated_kvm_deviates(reason): fails on a KVM that emulates instructions, for the reason given"
    )


@pytest.fixture(scope="session", params=ACCELERATORS)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    name: str = request.param
    try:
        opened = accel.open(name)
    except AccelUnavailable as error:
        pytest.skip(str(error))
    yield Lab(name, opened)
    opened.close()


@pytest.fixture(autouse=True)
def _expect_known_deviations(request: pytest.FixtureRequest) -> None:
    if "lab" not in request.fixturenames:
        return
    tested: Lab = request.getfixturevalue("lab")
    if tested.emulated_svm:
        key = table_key(request.node.nodeid, tested.name)
        for table, strict in ((QEMU_SVM, True), (QEMU_SVM_AT_TIMES, False)):
            if key in table:
                request.applymarker(pytest.mark.xfail(reason=table[key], strict=strict))
    marker = request.node.get_closest_marker("emulated_kvm_deviates")
    if marker is not None and tested.emulated_kvm:
        request.applymarker(pytest.mark.xfail(reason=marker.args[0], strict=True))

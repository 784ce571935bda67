"""One body for every accelerator: the `lab` fixture comes once for each, a missing one is a visible skip."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from ostler import accel
from ostler.accel.api import Accel
from ostler.accel.probe import KvmState, probe_kvm
from ostler.errors import AccelUnavailable
from tests.accel.lab import Machine

ACCELERATORS = ("kvm", "soft")


@dataclass(frozen=True, slots=True)
class Lab:
    """An accelerator, and machines on it."""

    name: str
    accel: Accel

    @property
    def emulated_kvm(self) -> bool:
        """A KVM that emulates ring 0 by its own instruction emulator, which knows part of the instruction set."""
        return self.name == "kvm" and probe_kvm().state is KvmState.EMULATED

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
    marker = request.node.get_closest_marker("emulated_kvm_deviates")
    if marker is None or "lab" not in request.fixturenames:
        return
    tested: Lab = request.getfixturevalue("lab")
    if tested.emulated_kvm:
        request.applymarker(pytest.mark.xfail(reason=marker.args[0], strict=True))

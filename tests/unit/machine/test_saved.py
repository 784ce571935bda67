"""State from another accelerator: what the one here has not got is left out where it means nothing, else refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from ostler.abi.kvm.state import Xsave
from ostler.accel.api import ExitReason
from ostler.accel.models import model
from ostler.errors import StateError
from ostler.machine import saved
from ostler.machine.machine import Machine
from ostler.testing.fake_accel import FakeVcpu
from ostler.testing.fake_script import Script, Stop

SPEC_CTRL, TSC = 0x48, 0x10


def a_vcpu(name: str) -> FakeVcpu:
    def script() -> Script:
        yield Stop(ExitReason.INTR)

    vcpu = FakeVcpu(0, script())
    vcpu.set_cpuid2(model(name).cpuid(0, 1, 1_000_000))
    return vcpu


@pytest.mark.parametrize(
    ("name", "kept_states"), [("ostler-v3.1", 0b111), ("ostler-v2.2", 0b11), ("ostler-v1.1", 0b11)]
)
def test_states_of_the_hosts_processor_are_left_out(name: str, kept_states: int) -> None:
    xsave = Xsave()
    low, high = saved.XSTATE_BV_WORDS
    xsave.region[low], xsave.region[high] = 0x207, 0x4000_0000  # x87, SSE, AVX, PKRU; AMX or the like

    kept = saved._of_the_model(xsave, a_vcpu(name))  # type: ignore[arg-type]

    assert (kept.region[low], kept.region[high]) == (kept_states, 0)


def test_register_that_holds_nothing_is_not_missed() -> None:
    assert saved._known_here({TSC: 5, SPEC_CTRL: 0}, {TSC}) == {TSC: 5}


def test_register_that_holds_something_is() -> None:
    with pytest.raises(StateError, match=r"saved MSR 0x48 holds 0x1: the accelerator here has no such register"):
        saved._known_here({TSC: 5, SPEC_CTRL: 1}, {TSC})


def test_state_goes_into_a_machine_whose_model_has_all_of_it_only() -> None:
    newer, older = (cast(Machine, SimpleNamespace(model=model(name))) for name in ("ostler-v3.1", "ostler-v2.2"))

    saved._check_model("ostler-v2.2", newer)

    with pytest.raises(
        StateError, match=r"under CPU model ostler-v3\.1: .* ostler-v2\.2, without avx, avx2, f16c, fma$"
    ):
        saved._check_model("ostler-v3.1", older)

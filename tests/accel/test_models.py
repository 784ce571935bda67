"""CPU models: fixed for good, consistent with themselves, and fitted to an accelerator by name."""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

import pytest

from ostler.abi.kvm.caps import Cap
from ostler.abi.kvm.state import CpuidEntry2
from ostler.accel.api import Accel
from ostler.accel.features import ARCH_CAPABILITIES, FEATURES, MSR_ARCH_CAPABILITIES
from ostler.accel.fitting import Policy, feature_names, fit, fit_default, missing_features
from ostler.accel.models import MODELS, model
from ostler.errors import BadRequest

GOLDEN = Path(__file__).parent / "golden"


def as_text(entries: Iterable[CpuidEntry2]) -> str:
    return "".join(
        f"{e.function:08x}.{e.index:x} {e.flags:x} {e.eax:08x} {e.ebx:08x} {e.ecx:08x} {e.edx:08x}\n" for e in entries
    )


def by_leaf(entries: Iterable[CpuidEntry2]) -> dict[tuple[int, int], CpuidEntry2]:
    return {(entry.function, entry.index): entry for entry in entries}


class PoorAccel:
    """An accelerator with the features of one model, less some, and no immunity but one."""

    name = "poor"

    def __init__(self, without: set[str]) -> None:
        whole = model()
        self._entries = [
            entry for entry in whole.cpuid(0, 1, 1_000_000) if not (entry.function == 7 and "leaf7" in without)
        ]

    def get_supported_cpuid(self) -> list[CpuidEntry2]:
        return self._entries

    def check_extension(self, cap: int) -> int:
        return cap == Cap.TSC_DEADLINE_TIMER

    def get_feature_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        return {index: 1 << ARCH_CAPABILITIES["rdcl_no"] for index in indices if index == MSR_ARCH_CAPABILITIES}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_model_once_released_never_changes(name: str) -> None:
    chosen = model(name)
    msrs = "".join(f"msr {index:x} {value:x}\n" for index, value in sorted(chosen.msrs.items()))

    assert as_text(chosen.cpuid(1, 4, 2_000_000)) + msrs == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_model_leaves_show_its_features_and_no_others(name: str) -> None:
    chosen = model(name)

    assert feature_names(chosen.cpuid(0, 1, 1_000_000)) == chosen.features


def test_models_grow_by_level() -> None:
    assert model("ostler-v1.1").features < model("ostler-v2.2").features < model("ostler-v2.1").features
    assert model("ostler-v2.2").features < model("ostler-v3.1").features


def test_model_unknown_name_lists_the_known() -> None:
    with pytest.raises(BadRequest, match=r"CPU model 'i486' is unknown: expected one of ostler-v1\.1, ostler-v2\.1"):
        model("i486")


def test_model_called_by_its_level_has_its_own_name() -> None:
    level_3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"

    assert model("x86-64-v3,-pcid").name == "ostler-v3.1,-pcid"
    assert model("x86-64-v3").features >= frozenset(level_3.split())


def test_model_with_avx_has_a_place_for_its_registers() -> None:
    leaves = by_leaf(model("ostler-v3.1").cpuid(0, 1, 1_000_000))

    assert (leaves[0xD, 0].eax, leaves[0xD, 0].ecx) == (0b111, 832)
    assert (leaves[0xD, 2].eax, leaves[0xD, 2].ebx) == (256, 576)


def test_model_changes_follow_its_name() -> None:
    changed = model("ostler-v3.1,+pku,-x2apic,-taa_no,vendor=amd")

    assert changed.immunities == model().immunities - {"taa_no"}
    assert changed.features == model().features - {"x2apic"} | {"pku"}
    assert by_leaf(changed.cpuid(0, 1, 1_000_000))[0, 0].ebx.to_bytes(4, "little") == b"Auth"
    assert changed.name == "ostler-v3.1,+pku,-x2apic,-taa_no,vendor=amd"


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ("-xsave", {"xsave", "xsaveopt", "xsavec", "xgetbv1", "xsaves", "avx", "avx2", "fma", "f16c"}),
        ("-xsavec", {"xsavec", "xsaves"}),
    ],
)
def test_model_without_a_feature_lacks_those_that_need_it(change: str, gone: set[str]) -> None:
    changed = model(f"ostler-v3.1,{change}")

    assert model().features - changed.features == gone
    assert feature_names(changed.cpuid(0, 1, 1_000_000)) == changed.features


@pytest.mark.parametrize("change", ["+unheard", "pku", "", "vendor=via", "-"])
def test_model_change_that_is_none_is_refused(change: str) -> None:
    with pytest.raises(BadRequest, match=r"expected \+FEATURE or -FEATURE"):
        model(f"ostler-v2.2,{change}")


@pytest.mark.parametrize(("vcpus", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6)])
def test_topology_of_n_vcpus_is_one_socket_of_n_cores(vcpus: int, bits: int) -> None:
    leaves = by_leaf(model().cpuid(vcpus - 1, vcpus, 1_000_000))

    assert leaves[0xB, 0].ebx == 1
    assert (leaves[0xB, 1].eax, leaves[0xB, 1].ebx, leaves[0xB, 1].edx) == (bits, vcpus, vcpus - 1)
    assert leaves[1, 0].ebx >> 24 == vcpus - 1
    assert leaves[1, 0].edx >> 28 & 1 == (vcpus > 1)
    assert leaves[4, 0].eax >> 26 == (1 << bits) - 1


def test_tsc_frequency_from_the_crystal_is_exact() -> None:
    leaf = by_leaf(model().cpuid(0, 1, 2_693_507))[0x15, 0]

    assert leaf.ecx * leaf.ebx // leaf.eax == 2_693_507_000


def test_every_feature_bit_is_named_once() -> None:
    assert len(set(FEATURES.values())) == len(FEATURES)


def test_fit_refuses_and_names_what_is_missing() -> None:
    poor = cast(Accel, PoorAccel({"leaf7"}))

    with pytest.raises(BadRequest, match=r"CPU model ostler-v3\.1: poor on this host lacks adx, .*smep"):
        fit(model(), poor, Policy.REFUSE)


def test_fit_default_without_a_part_of_the_level_is_the_level_before() -> None:
    fitted, missing = fit_default(cast(Accel, PoorAccel({"leaf7"})))

    assert fitted.name == "ostler-v2.2"
    assert "smep" in missing


def test_fit_masks_what_is_missing() -> None:
    poor = cast(Accel, PoorAccel({"leaf7"}))

    fitted, missing = fit(model(), poor, Policy.MASK)

    assert "smep" in missing
    assert "smep" not in feature_names(fitted.cpuid(0, 1, 1_000_000))
    assert fitted.msrs[MSR_ARCH_CAPABILITIES] == 1 << ARCH_CAPABILITIES["rdcl_no"]
    assert missing_features(fitted, poor) == []

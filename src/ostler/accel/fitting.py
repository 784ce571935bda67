"""A CPU model on an accelerator: what the accelerator cannot give is refused or taken out, never assumed."""

import enum
from collections.abc import Iterable
from dataclasses import replace

from ostler.abi.kvm.caps import Cap
from ostler.abi.kvm.state import CpuidEntry2
from ostler.accel.api import VCPU, Accel
from ostler.accel.features import ARCH_CAPABILITIES, FEATURES, MSR_ARCH_CAPABILITIES, without
from ostler.accel.models import DEFAULT_MODEL, FALLBACK_MODEL, CpuModel, model
from ostler.errors import BadRequest

# KVM does not list these as its own although it gives them.
_ALWAYS_THERE = frozenset({"hypervisor"})
# Documentation/virt/kvm/x86/cpuid.rst
KVM_FEATURES_LEAF, KVM_FEATURE_STEAL_TIME = 0x4000_0001, 5


class Policy(enum.Enum):
    """What becomes of features the accelerator lacks."""

    REFUSE = "refuse"
    MASK = "mask"


def missing_features(model: CpuModel, accel: Accel) -> list[str]:
    """Names of the model's features and immunities that the accelerator cannot give, in alphabetical order."""
    supported = {(entry.function, entry.index): entry for entry in accel.get_supported_cpuid()}
    lacking = {name for name in model.features - _ALWAYS_THERE if not _has(supported, name)}
    if accel.check_extension(Cap.TSC_DEADLINE_TIMER):
        lacking.discard("tsc_deadline_timer")
    immune = accel.get_feature_msrs([MSR_ARCH_CAPABILITIES]).get(MSR_ARCH_CAPABILITIES, 0)
    lacking |= {name for name in model.immunities if not immune >> ARCH_CAPABILITIES[name] & 1}
    return sorted(lacking)


def fit(model: CpuModel, accel: Accel, policy: Policy) -> tuple[CpuModel, list[str]]:
    """The model as this accelerator can give it, and the features taken out of it.

    Raises BadRequest, naming them, where some are missing and the policy is to refuse.
    """
    missing = missing_features(model, accel)
    if missing and policy is Policy.REFUSE:
        raise BadRequest(f"CPU model {model.name}: {accel.name} on this host lacks {', '.join(missing)}")
    fitted = replace(
        model,
        features=without(model.features, set(missing)),
        immunities=model.immunities - set(missing),
    )
    return fitted, missing


def fit_default(accel: Accel) -> tuple[CpuModel, list[str]]:
    """The model of a guest that asks for none, as `fit` gives it; what is missing is taken out.

    An accelerator without the whole level that the default brings (a host without AVX2) gives the level before:
    programs look for levels, and a processor that is between two is one that nobody tests.
    """
    chosen, before = model(DEFAULT_MODEL), model(FALLBACK_MODEL)
    if (chosen.features - before.features) & set(missing_features(chosen, accel)):
        chosen = before
    return fit(chosen, accel, Policy.MASK)


def gives_steal_time(accel: Accel) -> bool:
    """Whether guests can be told for how long they wanted to run and did not."""
    leaves = (each.eax for each in accel.get_supported_cpuid() if each.function == KVM_FEATURES_LEAF)
    return any(eax >> KVM_FEATURE_STEAL_TIME & 1 for eax in leaves)


def install(model: CpuModel, vcpu: VCPU, vcpus: int, *, steal_time: bool = False) -> None:
    """Give a new vCPU its CPUID and feature MSRs; `vcpus` is how many the VM will have.

    Steal time is no model's: a guest uses it where it finds it as it boots, and a saved one that found it keeps
    the register it switched it on by.
    """
    table = model.cpuid(vcpu.id, vcpus, vcpu.get_tsc_khz())
    for entry in table:
        if entry.function == KVM_FEATURES_LEAF and steal_time:
            entry.eax |= 1 << KVM_FEATURE_STEAL_TIME
    vcpu.set_cpuid2(table)
    vcpu.set_msrs(model.msrs)


def feature_names(entries: Iterable[CpuidEntry2]) -> frozenset[str]:
    """The known features a CPUID table shows."""
    table = {(entry.function, entry.index): entry for entry in entries}
    return frozenset(name for name in FEATURES if _has(table, name))


def _has(table: dict[tuple[int, int], CpuidEntry2], name: str) -> bool:
    feature = FEATURES[name]
    entry = table.get((feature.leaf, feature.subleaf))
    return entry is not None and bool(getattr(entry, feature.register) >> feature.bit & 1)

"""The guest's processor: named, versioned, fixed CPUID sets, the same on every host and accelerator.

A saved guest finds on the next host the processor it left. So a model, once released, never changes; what is
to change gets a new number.

Why it looks like Intel's, family 6, of a model number Intel never used. Linux decides on its speculation
mitigations by vendor and model lists and by IA32_ARCH_CAPABILITIES (arch/x86/kernel/cpu/common.c,
cpu_set_bug_bits). Some old models are on the list of processors that do not speculate at all, and to pose as one
would silence everything; but that cannot be taken back on a host where it is false. ARCH_CAPABILITIES states
each immunity by a bit of its own, which `ostler.accel.fitting` checks against KVM's, bit by bit:

- RDCL_NO: neither Meltdown nor L1TF, so no page-table isolation. MDS_NO, TAA_NO, SSB_NO, PSCHANGE_MC_NO, GDS_NO,
  RFDS_NO, ITS_NO and the three MMIO bits (SBDR_SSDP_NO, FBSDP_NO, PSDP_NO) each close one entry.
- Spectre v2 has no such bit on Intel's side. IBRS_ALL with SPEC_CTRL chooses "Enhanced IBRS": one write of MSR
  0x48 for each processor at boot, and no retpolines, which would defeat a translator's return prediction. PBRSB_NO
  drops one of that mode's extra sequences. RSBA and RRSBA stay clear, as they would bring retpolines back.
- Branch history: since 2025 Linux no longer takes BHI_NO for an answer. BHI_CTRL (SPEC_CTRL.BHI_DIS_S, set once)
  spares each system call and exception a loop of a hundred instructions that overwrites the history.
- TSC_ADJUST with a constant and nonstop TSC lets Linux trust the TSC. Without it a watchdog compares clocks twice a
  second, and a host that takes the processor away between two readings can make it call the TSC unstable.
- An unknown model number keeps the guest off the lists of affected models, and off drivers that match one model
  and would read its MSRs.

The engine follows Intel where vendors differ: SYSENTER works in long mode, SYSCALL in 64-bit mode only.
The numbers are the levels of the x86-64 psABI: v2.2 has all of x86-64-v2, v3.1 all of x86-64-v3, and each may be
called so.

Left out on purpose: MTRR, PMU, VME, MONITOR, TSX, AVX-512. In no model, but to be asked for: machine checks (`mce`,
`mca`) and KVM's calls (`kvm_pv_…`).

A model can be changed where it is named, for tests of single features: `ostler-v2.1,+pku,-x2apic,vendor=amd`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ostler.abi.kvm.state import CpuidEntry2
from ostler.accel import leaves
from ostler.accel.features import ARCH_CAPABILITIES, FEATURES, MSR_ARCH_CAPABILITIES, without
from ostler.errors import BadRequest

MSR_UCODE_REV = 0x8B
MSR_MISC_ENABLE = 0x1A0

# Fast strings on, or Linux takes ERMS back; branch trace and PEBS unavailable, for there is no PMU.
_MISC_ENABLE = 1 << 0 | 1 << 11 | 1 << 12
# What KVM shows on Intel's processors: revision 1, in the upper half.
_UCODE_REV = 1 << 32

_SIGNATURE = leaves.signature(family=6, model=0xFE, stepping=1)

_V1 = """
    fpu de pse tsc msr pae cx8 apic sep pge cmov pat pse36 clflush mmx fxsr sse sse2
    pni cx16 x2apic tsc_deadline_timer hypervisor arat tsc_adjust spec_ctrl bhi_ctrl arch_capabilities
    lahf_lm syscall nx rdtscp lm nonstop_tsc
"""
# The second revision has no SHA extensions: most Intel servers in use lack them, and a software CPU on such a host
# would emulate what OpenSSL and the kernel do faster with SSSE3.
_V2_2 = f"""
    {_V1}
    ssse3 sse4_1 sse4_2 popcnt movbe pclmulqdq aes rdrand rdseed bmi1 bmi2 abm adx 3dnowprefetch
    xsave xsaveopt xsavec xgetbv1 xsaves
    pcid invpcid smep smap umip fsgsbase erms fsrm clflushopt pdpe1gb
"""
_V2_1 = f"{_V2_2} sha_ni"
# Beside these, level 3 is the BMI, LZCNT and MOVBE that v2 has already.
_V3_1 = f"{_V2_2} avx avx2 fma f16c"


@dataclass(frozen=True, slots=True)
class CpuModel:
    """A processor model: its features by name and the leaves that show them."""

    name: str
    brand: str
    features: frozenset[str]
    signature: int = _SIGNATURE
    physical_bits: int = 39  # of the smallest KVM hosts, Intel's desktop processors
    immunities: frozenset[str] = field(default=frozenset(ARCH_CAPABILITIES))
    vendor: str = "intel"

    @property
    def msrs(self) -> Mapping[int, int]:
        """Feature MSRs to set on every vCPU after its CPUID."""
        immune = sum(1 << ARCH_CAPABILITIES[name] for name in self.immunities)
        return {MSR_UCODE_REV: _UCODE_REV, MSR_ARCH_CAPABILITIES: immune, MSR_MISC_ENABLE: _MISC_ENABLE}

    def cpuid(self, vcpu_id: int, vcpus: int, tsc_khz: int) -> list[CpuidEntry2]:
        """The leaves vCPU `vcpu_id` of `vcpus` shows: one socket of single-threaded cores."""
        processor = leaves.Processor(
            signature=self.signature,
            brand=self.brand,
            features=self.features,
            physical_bits=self.physical_bits,
            vendor=self.vendor,
        )
        return leaves.build(processor, leaves.Place(vcpu_id, vcpus, tsc_khz))


MODELS: Mapping[str, CpuModel] = {
    model.name: model
    for model in (
        CpuModel("ostler-v1.1", "Ostler virtual CPU v1.1", frozenset(_V1.split())),
        CpuModel("ostler-v2.1", "Ostler virtual CPU v2.1", frozenset(_V2_1.split())),
        CpuModel("ostler-v2.2", "Ostler virtual CPU v2.2", frozenset(_V2_2.split())),
        CpuModel("ostler-v3.1", "Ostler virtual CPU v3.1", frozenset(_V3_1.split())),
    )
}

# What the levels are called elsewhere, and the model here that has all of them.
ALIASES: Mapping[str, str] = {"x86-64-v2": "ostler-v2.2", "x86-64-v3": "ostler-v3.1"}

DEFAULT_MODEL = "ostler-v3.1"
# The default where an accelerator lacks what the default is newer for, see `ostler.accel.fitting.fit_default`.
FALLBACK_MODEL = "ostler-v2.2"


def model(name: str = DEFAULT_MODEL) -> CpuModel:
    """The model of that name, with the changes that follow it. Raises BadRequest, which says what there is.

    The model's own name has no alias in it: it is what is saved with a guest.
    """
    asked, *changes = name.split(",")
    known = ALIASES.get(asked, asked)
    if known not in MODELS:
        raise BadRequest(f"CPU model {known!r} is unknown: expected one of {', '.join(sorted([*MODELS, *ALIASES]))}")
    chosen = MODELS[known]
    for change in changes:
        chosen = _changed(chosen, change)
    return replace(chosen, name=",".join([known, *changes]))


def _changed(chosen: CpuModel, change: str) -> CpuModel:
    sign, feature = change[:1], change[1:]
    if sign in ("+", "-") and feature in ARCH_CAPABILITIES:
        immune = chosen.immunities | {feature} if sign == "+" else chosen.immunities - {feature}
        return replace(chosen, immunities=immune)
    if sign in ("+", "-") and feature in FEATURES:
        changed = chosen.features | {feature} if sign == "+" else without(chosen.features, {feature})
        return replace(chosen, features=changed)
    key, _, vendor = change.partition("=")
    if key == "vendor" and vendor in leaves.VENDORS:
        return replace(chosen, vendor=vendor)
    raise BadRequest(
        f"CPU model {chosen.name!r} cannot be changed by {change!r}: "
        f"expected +FEATURE or -FEATURE as in /proc/cpuinfo, or vendor={'|'.join(leaves.VENDORS)}"
    )

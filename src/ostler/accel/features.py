"""CPUID feature bits by name (Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E).

Names are those of Linux's /proc/cpuinfo where it has one. Only bits some CPU model of Ostler's gives, or
that a host must be asked for, are listed.
"""

from collections.abc import Set as AbstractSet
from typing import NamedTuple


class Feature(NamedTuple):
    """Where a feature bit lives."""

    leaf: int
    subleaf: int
    register: str
    bit: int


def _row(leaf: int, subleaf: int, register: str, bits: dict[int, str]) -> dict[str, Feature]:
    return {name: Feature(leaf, subleaf, register, bit) for bit, name in bits.items()}


FEATURES: dict[str, Feature] = {
    **_row(
        0x1,
        0,
        "edx",
        {
            0: "fpu",
            2: "de",
            3: "pse",
            4: "tsc",
            5: "msr",
            6: "pae",
            7: "mce",
            8: "cx8",
            9: "apic",
            11: "sep",
            13: "pge",
            14: "mca",
            15: "cmov",
            16: "pat",
            17: "pse36",
            19: "clflush",
            23: "mmx",
            24: "fxsr",
            25: "sse",
            26: "sse2",
        },
    ),
    **_row(
        0x1,
        0,
        "ecx",
        {
            0: "pni",
            1: "pclmulqdq",
            9: "ssse3",
            12: "fma",
            13: "cx16",
            17: "pcid",
            19: "sse4_1",
            20: "sse4_2",
            21: "x2apic",
            22: "movbe",
            23: "popcnt",
            24: "tsc_deadline_timer",
            25: "aes",
            26: "xsave",
            28: "avx",
            29: "f16c",
            30: "rdrand",
            31: "hypervisor",
        },
    ),
    **_row(0x6, 0, "eax", {2: "arat"}),
    **_row(
        0x7,
        0,
        "ebx",
        {
            0: "fsgsbase",
            1: "tsc_adjust",
            3: "bmi1",
            5: "avx2",
            7: "smep",
            8: "bmi2",
            9: "erms",
            10: "invpcid",
            18: "rdseed",
            19: "adx",
            20: "smap",
            23: "clflushopt",
            29: "sha_ni",
        },
    ),
    **_row(0x7, 0, "ecx", {2: "umip", 3: "pku", 31: "pks"}),
    **_row(0x7, 0, "edx", {4: "fsrm", 26: "spec_ctrl", 29: "arch_capabilities"}),
    **_row(0x7, 2, "edx", {4: "bhi_ctrl"}),
    **_row(0xD, 1, "eax", {0: "xsaveopt", 1: "xsavec", 2: "xgetbv1", 3: "xsaves"}),
    # Linux's Documentation/virt/kvm/x86/cpuid.rst; in no model, for what they bring depends on the host.
    **_row(0x4000_0001, 0, "eax", {7: "kvm_pv_unhalt", 11: "kvm_pv_send_ipi", 13: "kvm_pv_sched_yield"}),
    **_row(0x8000_0001, 0, "ecx", {0: "lahf_lm", 5: "abm", 8: "3dnowprefetch"}),
    **_row(0x8000_0001, 0, "edx", {11: "syscall", 20: "nx", 26: "pdpe1gb", 27: "rdtscp", 29: "lm"}),
    **_row(0x8000_0007, 0, "edx", {8: "nonstop_tsc"}),
}

# What makes no sense without another: the leaf or the instruction it belongs to is not there.
_NEEDS: dict[str, str] = {
    "mca": "mce",
    "xsaveopt": "xsave",
    "xsavec": "xsave",
    "xgetbv1": "xsave",
    "xsaves": "xsavec",
    "avx": "xsave",
    "avx2": "avx",
    "fma": "avx",
    "f16c": "avx",
}


def without(features: frozenset[str], lost: AbstractSet[str]) -> frozenset[str]:
    """The features that are left when some are lost, and those with them that need them."""
    left = features - lost
    while dangling := {name for name in left if name in _NEEDS and _NEEDS[name] not in left}:
        left -= dangling
    return left


# IA32_ARCH_CAPABILITIES (SDM volume 4): what the processor is immune to, and how it restricts prediction.
ARCH_CAPABILITIES: dict[str, int] = {
    "rdcl_no": 0,
    "ibrs_all": 1,
    "skip_l1dfl_vmentry": 3,
    "ssb_no": 4,
    "mds_no": 5,
    "pschange_mc_no": 6,
    "taa_no": 8,
    "sbdr_ssdp_no": 13,
    "fbsdp_no": 14,
    "psdp_no": 15,
    "bhi_no": 20,
    "pbrsb_no": 24,
    "gds_no": 26,
    "rfds_no": 27,
    "its_no": 62,
}

MSR_ARCH_CAPABILITIES = 0x10A
